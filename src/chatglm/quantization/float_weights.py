"""The weights of a checkpoint as floats, one at a time, whatever form they are stored in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..checkpoint.layout import EMBEDDING, HEAD
from ..checkpoint.loading import untied
from ..checkpoint.problem import FileError
from ..checkpoint.reading import holds_same, read_tensor
from .on_load import SCALE, bits_of, widened_parts


class FloatWeights:
    """Reads tensors of a checkpoint by their plain names. Memory: the tensor asked for, and its codes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises FileError where a stored head differs from the embedding that it is tied to."""
        self.checkpoint, self.config = checkpoint, checkpoint.config
        if self.config.tied_head:
            for leaf in ("", SCALE):
                head, table = (checkpoint.tensors.get(name + leaf) for name in (HEAD, EMBEDDING))
                if head is not None and (table is None or not holds_same(head, table)):
                    raise FileError(untied(head))
        self.names = [
            name
            for name in checkpoint.tensors
            if not name.endswith(SCALE) and not (self.config.tied_head and name == HEAD)
        ]
        """Every tensor as a float model has it, a tied head left out."""

    def bits(self, name: str) -> int:
        """In which a weight is stored; 0 for a float."""
        return bits_of(name, self.config.quantization_bit, self.config.embedding_bits)

    def dtype(self, name: str) -> str:
        """In which the floats of a tensor are to be kept: as stored, fp16 for what is stored as codes."""
        return "float16" if self.bits(name) else self.checkpoint.tensors[name].dtype

    def stored_bytes(self, name: str) -> int:
        """Bytes in the files, scales included."""
        entries = (self.checkpoint.tensors.get(name + leaf) for leaf in ("", SCALE))
        return sum(entry.nbytes for entry in entries if entry is not None)

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU: as stored, fp32 for what is stored as codes."""
        parts = [*self.parts(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, name: str) -> Iterator[Tensor]:
        """The same, some rows at a time where it is stored as codes."""
        tensor = read_tensor(self.checkpoint.tensors[name])
        bits = self.bits(name)
        if not bits:
            yield tensor
            return
        scale = read_tensor(self.checkpoint.tensors[name + SCALE])
        yield from widened_parts(tensor, scale, bits, self.config.quantization_group_size)

    def stored(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Codes and scales as they are, under their names."""
        for stored_name in (name, name + SCALE):
            yield stored_name, read_tensor(self.checkpoint.tensors[stored_name])
