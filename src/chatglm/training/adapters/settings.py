"""The `method` section of a run for each adapter method.

Source of the usual values: spec/training.md §3.3; LoRA (Hu et al. 2021) §4; P-Tuning v2 (ACL 2022) §3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import TrainingError
from ..run_config import AT_LEAST_1
from ..settings import build, in_range

TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The four linears of a layer, by the last part of their names."""


@dataclass(frozen=True)
class LoraSettings:
    """A low-rank product beside frozen linears, in fp32.

    r        rank
    alpha    the product is scaled by alpha / r
    dropout  of what goes into the product
    targets  linears by the last part of their names
    start    an adapter folder to go on from, in the place of a fresh one
    """

    name: str = "lora"
    r: int = field(default=8, metadata=AT_LEAST_1)
    alpha: int = field(default=32, metadata=AT_LEAST_1)
    dropout: float = field(default=0.1, metadata=in_range(low=0, high=0.99))
    targets: tuple[str, ...] = ("query_key_value",)
    start: str | None = None

    def __post_init__(self) -> None:
        for target in self.targets:
            if target not in TARGETS:
                raise TrainingError(
                    f"`method.targets` names {target!r}; the linears of a layer are {', '.join(TARGETS)}"
                )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise TrainingError(f"`method.targets` is {list(self.targets)}; name each linear once")


@dataclass(frozen=True)
class QloraSettings(LoraSettings):
    """The same over a base of few bits.

    bits        of a base that is stored as floats; a quantised checkpoint keeps its own
    group_size  columns that share a scale; 0: one scale a row, the original's format
    """

    name: str = "qlora"
    bits: Literal[4, 8] = 4
    group_size: int | None = field(default=None, metadata=in_range(low=0))


@dataclass(frozen=True)
class PtuningSettings:
    """Learned keys and values in front of every layer, in fp32.

    pre_seq_len        vectors of a layer
    prefix_projection  make them through a two-layer network, which learns too
    bits               quantise a base that is stored as floats; 0: leave it. A quantised checkpoint keeps its own
    group_size         as for qlora
    start              a folder with a prefix to go on from
    """

    name: str = "ptuning"
    pre_seq_len: int = field(default=128, metadata=AT_LEAST_1)
    prefix_projection: bool = False
    bits: Literal[0, 4, 8] = 0
    group_size: int | None = field(default=None, metadata=in_range(low=0))
    start: str | None = None


def settings_of(method: Mapping[str, Any]) -> LoraSettings | QloraSettings | PtuningSettings | None:
    """The settings of an adapter method; None for any other. Raises TrainingError for a wrong key or value."""
    kinds: dict[str, type[LoraSettings] | type[QloraSettings] | type[PtuningSettings]] = {
        "lora": LoraSettings,
        "qlora": QloraSettings,
        "ptuning": PtuningSettings,
    }
    kind = kinds.get(str(method.get("name", "full")))
    return None if kind is None else build(kind, method, "run", "method.")
