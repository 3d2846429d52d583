"""Kernels for CPUs, compiled at run time by llvmlite (the extra `cpu`); no C compiler takes part.

Read in this order: target, emitter (the language that kernels are written in), jit; formats, dot_products, quantize,
few_tokens, many_tokens, float_rows, norm, attention, pointwise (the kernels); workers (threads and programs); weights,
passes, network (a whole GLM). llvmlite is imported only behind `runtime`, after `probe` found it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kit import Kit
    from .workers import Workers


@functools.cache
def kernel_kit(target_name: str | None = None) -> Kit:
    """The kernels for this machine's best target, or for one by name (kernels/cpu/target.py)."""
    from .jit import Compiler, host_targets
    from .kit import Kit

    targets = {target.name: target for target in host_targets()}
    target = targets[target_name] if target_name else next(iter(targets.values()))
    return Kit(Compiler(target))


@functools.cache
def worker_threads(threads: int) -> Workers:
    """The threads that all models of this process share, by their number."""
    from .workers import Workers

    return Workers(kernel_kit().compiler, threads)
