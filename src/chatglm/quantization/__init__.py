"""Weight formats: fewer bits for the linears, written down exactly.

Row-wise as the original's checkpoints have it, and group-wise, which is the project's own. Read in this order:
row_format, group_format, modules, swap.
"""

from .group_format import dequantize_groups, quantize_groups
from .modules import (
    GroupQuantizedEmbedding,
    GroupQuantizedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    RowQuantizedEmbedding,
    RowQuantizedLinear,
)
from .row_format import dequantize_rows, pack_int4, quantize_rows, unpack_int4
from .swap import dequantize_model, quantize_on_load, swap_linears

__all__ = [
    "GroupQuantizedEmbedding",
    "GroupQuantizedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RowQuantizedEmbedding",
    "RowQuantizedLinear",
    "dequantize_groups",
    "dequantize_model",
    "dequantize_rows",
    "pack_int4",
    "quantize_groups",
    "quantize_on_load",
    "quantize_rows",
    "swap_linears",
    "unpack_int4",
]
