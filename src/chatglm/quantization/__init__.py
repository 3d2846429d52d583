"""Weight formats: fewer bits for the linears, written down exactly.

Row-wise as the original's checkpoints have it. Read in this order: row_format, modules, swap.
"""

from .modules import RowQuantizedEmbedding, RowQuantizedLinear
from .row_format import dequantize_rows, pack_int4, quantize_rows, unpack_int4
from .swap import dequantize_model, quantize_on_load, swap_linears

__all__ = [
    "RowQuantizedEmbedding",
    "RowQuantizedLinear",
    "dequantize_model",
    "dequantize_rows",
    "pack_int4",
    "quantize_on_load",
    "quantize_rows",
    "swap_linears",
    "unpack_int4",
]
