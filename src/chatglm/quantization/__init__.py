"""Weight formats: fewer bits for the linears, written down exactly.

Row-wise as the original's checkpoints have it, and group-wise, which is the project's own. Read in this order:
row_format, group_format, modules, swap, on_load.
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
from .on_load import convert_on_load, quantize_on_load
from .row_format import dequantize_rows, pack_int4, quantize_rows, unpack_int4
from .swap import dequantize_model, swap_as_described, swap_linears

__all__ = [
    "GroupQuantizedEmbedding",
    "GroupQuantizedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RowQuantizedEmbedding",
    "RowQuantizedLinear",
    "convert_on_load",
    "dequantize_groups",
    "dequantize_model",
    "dequantize_rows",
    "pack_int4",
    "quantize_groups",
    "quantize_on_load",
    "quantize_rows",
    "swap_as_described",
    "swap_linears",
    "unpack_int4",
]
