"""Which instructions this processor has, as far as the kernels care."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A kind of processor that kernels are written for.

    name            as logged and asked for
    register_bytes  of one vector register
    registers       vector registers that there are
    dot             how four products of bytes are summed: vnni, maddubs, sdot or plain (kernels/cpu/dot_products.py)
    cpu, features   LLVM's names; empty for what LLVM finds here
    """

    name: str
    register_bytes: int
    registers: int
    dot: str
    cpu: str = ""
    features: str = ""

    @property
    def lanes(self) -> int:
        """32-bit numbers in a register."""
        return self.register_bytes // 4


KNOWN = (
    Target("avx512-vnni", 64, 32, "vnni"),
    Target("avx512", 64, 32, "maddubs"),
    Target("avx-vnni", 32, 16, "vnni"),
    Target("avx2", 32, 16, "maddubs", "haswell", "+avx2,+fma,+f16c"),
    Target("arm-dotprod", 16, 32, "sdot"),
    Target("generic", 16, 16, "plain"),
)
"""From the best to the one that runs everywhere."""

NEEDS = {
    "avx512-vnni": ("avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    "avx512": ("avx512f", "avx512bw", "avx512vl"),
    "avx-vnni": ("avx2", "fma", "f16c", "avxvnni"),
    "avx2": ("avx2", "fma", "f16c"),
    "arm-dotprod": ("neon", "dotprod"),
    "generic": (),
}
"""The features that LLVM must find for each."""


def runnable(features: dict[str, bool], *, is_x86: bool) -> list[Target]:
    """The targets that a processor with these features (LLVM's names) can run, best first.

    On x86 every target needs F16C: without it a conversion of fp16 is a call into a C library.
    """
    if is_x86 and not features.get("f16c"):
        return []
    return [target for target in KNOWN if all(features.get(feature) for feature in NEEDS[target.name])]
