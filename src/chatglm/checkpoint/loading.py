"""Tensors of a checkpoint into a model, one at a time: peak memory is the model and one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .folder import Checkpoint
from .layout import FLOATS, PREFIX, SCORE
from .mapping import MappedFiles
from .problem import FileError, Problem, reward_problem
from .reading import holds_same, read_tensor, torch_dtype
from .tensor_file import ITEM_BYTES, Progress, TensorEntry, named

Transform = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]
"""Turns a stored tensor into the tensors that the model has for it, such as codes and scales of a weight."""

LARGEST_ON_HEAP = 8 << 20
"""What glibc's allocator may take from its heap; more is mapped on its own."""

TABLE = "transformer.word_embeddings."
HEAD_MODULE = "lm_head."
SCALE = ".weight_scale"


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    transform: Transform | None = None,
    may_miss: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> list[str]:
    """Fill `model` (a GLM on the meta device, plain or swapped to its quantised form) with the checkpoint's tensors.

    dtype      of weights, biases and norms, whatever they are stored in; int8 codes and fp16 scales keep theirs
    transform  applied to each tensor as it arrives, e.g. quantization.quantize_on_load(4); it may keep codes and
               scales back, not float weights, and give what it makes of them with a later one
    may_miss   beginnings of names that the checkpoint may lack; these stay as they are
    returns    the names that were missing so

    A stored `lm_head` of a tied model is compared with the embedding and not kept. Raises CheckpointError, before
    anything is read where that is possible, for a missing or unexpected tensor, a wrong shape, integers for floats, a
    NaN or infinity, a value that does not fit `dtype`, and a tied head that differs.
    """
    return _Loading(model, checkpoint, dtype, torch.device(device), transform, progress).run(may_miss)


class _Loading:
    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        transform: Transform | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.checkpoint = model, checkpoint
        self.dtype, self.device = dtype, device
        self.transform, self.progress = transform, progress
        self.is_tied = checkpoint.config.tied_head
        places = model.state_dict(keep_vars=True)
        self.places = {name: t for name, t in places.items() if not (self.is_tied and name.startswith(HEAD_MODULE))}
        self.filled: set[str] = set()
        self.scratch: Tensor | None = None
        self.done = 0
        self.mapped = MappedFiles()

    def run(self, may_miss: tuple[str, ...]) -> list[str]:
        entries = dict(self.checkpoint.tensors)
        stored_heads = [name for name in entries if name.startswith(HEAD_MODULE)] if self.is_tied else []
        heads = {name: entries.pop(name) for name in stored_heads}
        missing = self._check_before(entries, may_miss)
        self.total = sum(entry.nbytes for entry in (*entries.values(), *heads.values()))
        order = sorted(entries, key=lambda name: (not name.startswith(TABLE), entries[name].file, entries[name].offset))
        tables = [name for name in order if name.startswith(TABLE)]
        for name in tables:
            self._load(name, entries[name])
        for name, entry in heads.items():  # while the model is still small
            self._check_head(name, entry)
        for name in order[len(tables) :]:
            self._load(name, entries[name])
        if left := sorted(self.places.keys() - self.filled - set(missing)):
            raise CheckpointError(f"{self.checkpoint.folder}: nothing filled {_some(left)} of the model")
        self._tie()
        self._place_dtype_marks()
        return missing

    def _check_before(self, entries: dict[str, TensorEntry], may_miss: tuple[str, ...]) -> list[str]:
        """Names and shapes, before anything is read.

        A transform may change shapes and make or take scales, so then only the names of the weights are compared.
        """
        made, found = set(self.places), set(entries)
        if self.transform is not None:
            made, found = ({name.removesuffix("_scale") for name in names} for names in (made, found))
        missing = sorted(made - found)
        wrong = [name for name in missing if not name.startswith(may_miss or "\0")]
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint.folder} lacks {_some(wrong)}",
                cure=_prefix_cure(wrong) or "`chatglm verify` says which files are incomplete",
            )
        if foreign := sorted(found - made):
            if foreign[0].startswith(SCORE):
                raise FileError(reward_problem(str(self.checkpoint.folder), foreign[0]))
            raise CheckpointError(
                f"{self.checkpoint.folder} holds {_some(foreign)}, which the model does not have",
                cure="config.json must describe these weights (num_layers, pre_seq_len, quantization_bit)",
            )
        if self.transform is None:
            for name, entry in entries.items():
                self._check_fit(name, entry.shape, torch_dtype(entry.dtype), entry)
        return missing

    def _check_fit(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, entry: TensorEntry) -> None:
        place = self.places[name]
        if tuple(place.shape) != tuple(shape) or place.dtype.is_floating_point != dtype.is_floating_point:
            raise FileError(
                Problem(
                    entry.file.name,
                    f"holds {_said(shape, dtype)} where the model has {_said(tuple(place.shape), place.dtype)}",
                    "config.json must describe these weights (sizes, quantization_bit, quantization_embeddings)",
                    name,
                )
            )

    def _load(self, name: str, entry: TensorEntry) -> None:
        if (codes := self._codes_in_place(entry)) is not None:
            self._put(name, codes)
            self.filled.add(name)
            return
        tensor = read_tensor(entry, count=self._count, into=self._scratch(entry))
        for made_name, made in self.transform(name, tensor) if self.transform else ((name, tensor),):
            if made_name not in self.places:
                raise CheckpointError(f"the model has no {made_name}, which {name} was turned into")
            self._check_fit(made_name, tuple(made.shape), made.dtype, entry)
            self._put(made_name, self._cast(made_name, made, entry))
            self.filled.add(made_name)

    def _scratch(self, entry: TensorEntry) -> Tensor | None:
        """The same memory for every weight that is not kept but turned into something smaller.

        Freed and allocated anew between the tensors that stay, it would leave holes in the heap that nothing fills.
        Larger ones get pages of their own, which go back to the system.
        """
        nbytes = entry.span * ITEM_BYTES[entry.dtype]
        is_weight = entry.dtype in FLOATS and len(entry.shape) > 1 and not entry.name.endswith(SCALE)
        if self.transform is None or not is_weight or nbytes >= LARGEST_ON_HEAP:
            return None
        if self.scratch is None or len(self.scratch) < nbytes:
            self.scratch = torch.empty(nbytes, dtype=torch.uint8)
        return self.scratch

    def _codes_in_place(self, entry: TensorEntry) -> Tensor | None:
        """Codes that need no change, mapped instead of read; None for another tensor."""
        if self.transform is not None or self.device.type != "cpu":
            return None
        codes = self.mapped.codes(entry)
        if codes is not None:
            self._count(entry.nbytes)
        return codes

    def _cast(self, name: str, tensor: Tensor, entry: TensorEntry) -> Tensor:
        wanted = torch.float16 if name.endswith(SCALE) else self.dtype if tensor.is_floating_point() else tensor.dtype
        made = tensor.to(device=self.device, dtype=wanted)
        if self.scratch is not None and made.untyped_storage().data_ptr() == self.scratch.untyped_storage().data_ptr():
            made = made.clone()
        if made.dtype == torch.float16 != tensor.dtype and not bool(made.isfinite().all()):
            what, cure = "holds values beyond 65,504, which fp16 cannot hold", "load it as bf16 or fp32"
            raise FileError(Problem(entry.file.name, what, cure, str(entry)))
        return made

    def _put(self, name: str, tensor: Tensor) -> None:
        module_name, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        place = self.places[name]
        if isinstance(place, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=place.requires_grad)
        setattr(module, leaf, tensor)

    def _check_head(self, name: str, entry: TensorEntry) -> None:
        """Raises unless a stored head equals the stored embedding."""
        table = self.checkpoint.tensors.get(TABLE + name.removeprefix(HEAD_MODULE))
        if table is None or not holds_same(entry, table):
            raise FileError(untied(entry))
        self._count(entry.nbytes)

    def _tie(self) -> None:
        """Let a tied head have the tensors of the embedding; a quantised one has two."""
        if not self.is_tied:
            return
        head, table = self.model.get_submodule(HEAD_MODULE[:-1]), self.model.get_submodule(TABLE[:-1])
        for leaf in ("weight", "weight_scale"):
            if hasattr(head, leaf):
                setattr(head, leaf, getattr(table, leaf))

    def _place_dtype_marks(self) -> None:
        """Buffers outside the state that are still on the meta device: they hold no values, only device and dtype."""
        for name, buffer in list(self.model.named_buffers()):
            if buffer.is_meta and name not in self.places:
                module_name, _, leaf = name.rpartition(".")
                mark = torch.empty(buffer.shape, device=self.device, dtype=self.dtype)  # empty_like would import sympy
                setattr(self.model.get_submodule(module_name), leaf, mark)

    def _count(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total, "loading weights")


def untied(head: TensorEntry) -> Problem:
    """A stored head that differs from the embedding although the config ties them."""
    return Problem(
        head.file.name,
        "holds an output head that differs from the embedding, but config.json ties them",
        'write `"tie_word_embeddings": false` into config.json to keep both, or delete the stored head',
        str(head),
    )


def _said(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"


def _some(names: list[str]) -> str:
    return named([f"`{names[0]}`", *names[1:]])


def _prefix_cure(missing: list[str]) -> str | None:
    """The usual reason for a missing prefix encoder."""
    if not all(name.startswith(PREFIX) for name in missing):
        return None
    return "give the P-tuning folder that belongs to this base, or take `pre_seq_len` out of config.json"
