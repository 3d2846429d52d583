"""A checkpoint into a quantised one, tensor by tensor: never more in memory than one tensor and what it becomes.

With calibration: one layer, the hidden states of the calibration text, and the Hessian of one linear.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, Progress, check, expected_tensors, open_checkpoint
from ..checkpoint.atomic import whole_folder
from ..checkpoint.converting import small_files
from ..checkpoint.filling import Filling, sizes_of
from ..checkpoint.folder import CONFIG, QUANTIZATION_RECORD
from ..checkpoint.reading import torch_dtype
from ..checkpoint.saving import MAX_SHARD_BYTES, dump
from ..config import to_original
from ..errors import CheckpointError, QuantizationError
from ..model.block import Block
from ..tokenizer import Tokenizer
from ..tokenizer.examples import Example
from .calibration import Calibration
from .float_weights import FloatWeights
from .modules import GroupQuantizedLinear
from .on_load import SCALE, bits_of, shrunk_parts
from .recipe import Recipe
from .swap import LINEARS

LAYERS = "transformer.layers."
EMBEDDED = ("transformer.word_embeddings.weight", "position_embeddings.weight", "block_position_embeddings.weight")


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint `source`, in whatever form, as `target`, quantised; returns the folder.

    device  where a calibrated layer is computed; plain rounding always runs on the CPU
    The folder appears whole or not at all. A run that was killed goes on where it was when it is given the same source,
    target and recipe again. Biases, norms and a P-tuning prefix stay as they are stored. Raises CheckpointError for a
    broken source or a full disk, QuantizationError for a weight that cannot be quantised.
    """
    check(source, tokenizer=False)
    checkpoint = open_checkpoint(source)
    if Path(target).resolve() == checkpoint.folder.resolve():
        raise CheckpointError(f"{target} is the source itself", cure="give another target")
    if checkpoint.is_prefix_only:
        raise CheckpointError(f"{source} holds a P-tuning prefix alone", cure="quantise its base, or merge both first")
    return _Writing(checkpoint, recipe, torch.device(device), progress).run(Path(target), overwrite, max_shard_bytes)


class _Writing:
    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, device: torch.device, progress: Progress | None) -> None:
        self.checkpoint, self.recipe, self.device, self.progress = checkpoint, recipe, device, progress
        self.weights = FloatWeights(checkpoint)
        self.wanted = recipe.applied_to(checkpoint.config)
        self.total = sum(self.weights.stored_bytes(name) for name in self.weights.names)
        self.done = 0
        self.record = {**recipe.record(self.wanted), "source": _described(checkpoint)}
        self.examples: list[Example] = []
        if recipe.method == "gptq":
            if checkpoint.tokenizer_file is None:
                raise QuantizationError(f"{checkpoint.folder} holds no tokenizer", cure="add its ice_text.model")
            tokenizer = Tokenizer.from_folder(checkpoint.folder, config=checkpoint.config)
            self.examples = recipe.calibration.examples(tokenizer, checkpoint.config.max_sequence_length)
            self.record["calibration"] = recipe.calibration.record(self.examples)

    def run(self, target: Path, overwrite: bool, max_shard_bytes: int) -> Path:
        shapes = self._shapes()
        own = {CONFIG: dump(to_original(self.wanted)), QUANTIZATION_RECORD: dump(self.record)}
        small = {**small_files(self.checkpoint), **own}
        job = json.dumps({"record": self.record, "shard_bytes": max_shard_bytes}, sort_keys=True)
        needed = sum(sizes_of(shapes).values()) + sum(map(len, small.values()))
        with whole_folder(target, needed, overwrite=overwrite, job=job) as folder:
            for name, data in small.items():
                (folder / name).write_bytes(data)
            self.filling = Filling(folder, shapes, max_shard_bytes)
            is_calibrated = self.recipe.method == "gptq"
            for name in self.weights.names:
                if not (is_calibrated and name.startswith(LAYERS)):
                    self._write(name)
            if is_calibrated:
                self._write_calibrated_layers()
            self.filling.finish()
        return target

    def _shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of every tensor of the result, in the original's order."""
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, spec in expected_tensors(self.wanted).items():
            if spec.is_optional:
                continue
            floats = "float16" if name.endswith(SCALE) else self.weights.dtype(name)
            shapes[name] = spec.kinds[0] if spec.is_codes else floats, spec.shape
        return shapes

    def _bits(self, name: str) -> int:
        return bits_of(name, self.wanted.quantization_bit, self.wanted.embedding_bits)

    def _write(self, name: str) -> None:
        """One tensor by plain rounding, or as it is."""
        made = (name, name + SCALE) if self._bits(name) else (name,)
        if not self.filling.holds(*made):
            bits, group_size = self._bits(name), self.wanted.quantization_group_size
            is_kept = bits and (self.weights.bits(name), self.weights.config.quantization_group_size) == (
                bits,
                group_size,
            )
            parts = self.weights.parts(name)
            for made_name, part in (
                self.weights.stored(name) if is_kept else shrunk_parts(name, parts, bits, group_size)
            ):
                self.filling.add(made_name, part.to(torch_dtype(self.filling.shapes[made_name][0])))
            if self._bits(name):
                self.filling.commit()
        self._count(name)

    def _count(self, name: str) -> None:
        self.done += self.weights.stored_bytes(name)
        if self.progress is not None:
            self.progress(self.done, self.total, "quantising")

    # With calibration

    def _write_calibrated_layers(self) -> None:
        run = Calibration(self.examples, self.weights.config, self._embed(), self.device)
        for number in range(self.wanted.num_layers):
            prefix = f"{LAYERS}{number}."
            names = [name for name in self.weights.names if name.startswith(prefix)]
            layer = self._plain_layer(number, prefix, names)
            made = [name for name in self.filling.shapes if name.startswith(prefix)]
            if self.filling.holds(*made):
                self._put_codes(layer, prefix)
                run.advance(layer)
            else:
                run.quantize(layer, self.wanted.quantization_bit, self.wanted.quantization_group_size)
                state = layer.state_dict()
                for name in made:
                    leaf = name.removeprefix(prefix)
                    is_code = leaf.endswith(SCALE) or f"{name}{SCALE}" in self.filling.shapes
                    self.filling.add(name, state[leaf] if is_code else self.weights.read(name))
                self.filling.commit()
            for name in names:
                self._count(name)

    def _embed(self) -> Any:
        """(ids, positions) → the input of the first layer, from float tables."""
        tables = {name: self.weights.read(name) for name in self.weights.names if name.endswith(EMBEDDED)}

        def looked_up(leaf: str, ids: Tensor) -> Tensor:
            table = next(table for name, table in tables.items() if name.endswith(f".{leaf}.weight"))
            return nn.functional.embedding(ids.cpu(), table).float().to(self.device)

        def embed(ids: Tensor, positions: Tensor) -> Tensor:
            hidden = looked_up("word_embeddings", ids)
            if self.wanted.position_encoding == "learned_2d":
                hidden += looked_up("position_embeddings", positions[:, 0])
                hidden += looked_up("block_position_embeddings", positions[:, 1])
            return hidden

        return embed

    def _plain_layer(self, number: int, prefix: str, names: list[str]) -> Block:
        """A layer in fp32 on the device."""
        with torch.device("meta"):
            layer = Block(self.weights.config.quantized(0), number)
        state = {name.removeprefix(prefix): self.weights.read(name).float().to(self.device) for name in names}
        layer.load_state_dict(state, assign=True)
        return layer.eval()

    def _put_codes(self, layer: Block, prefix: str) -> None:
        """The linears of a layer from what an earlier run wrote."""
        for path in LINEARS:
            plain = layer.get_submodule(path)
            assert isinstance(plain, nn.Linear)
            with torch.device("meta"):
                linear = GroupQuantizedLinear(
                    plain.in_features,
                    plain.out_features,
                    self.wanted.quantization_bit,
                    self.wanted.quantization_group_size,
                    bias=False,
                )
            linear.weight = self.filling.read(f"{prefix}{path}.weight").to(self.device)
            linear.weight_scale = self.filling.read(f"{prefix}{path}.weight{SCALE}").to(self.device)
            linear.bias = plain.bias
            layer.set_submodule(path, linear)


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the weights were made from: files with their sizes, and what was stored in them."""
    files = {path.name: path.stat().st_size for path in checkpoint.files}
    return {"folder": checkpoint.folder.resolve().name, "files": files, "dtypes": checkpoint.dtypes}
