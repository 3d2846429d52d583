"""Small functions that run inside kernels."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-not-found"
from __future__ import annotations

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton, or the interpreter: kernels are then launched without overlap
    gdc_launch_dependents = gdc_wait = None

CAN_OVERLAP = gdc_wait is not None


@triton.jit
def stream_place(column, STREAMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a column of a vector stands in stream order (kernels/plain.py says what that is)."""
    if STREAMS == 1:
        return column
    return (column % STREAMS) * (COLUMNS // STREAMS) + column // STREAMS


@triton.jit
def wait_for_earlier_kernel(OVERLAP: tl.constexpr):
    """Everything that the kernel before wrote is visible from here on; what came before ran beside its end.

    Lets the next kernel start at once too: it waits here in turn.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def gelu(value):
    """The tanh form: x · ½(1 + tanh z) is x · sigmoid(2z)."""
    return value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
