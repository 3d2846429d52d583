"""A model file for chatglm.cpp with random weights in ChatGLM-6B's shape, written without a checkpoint.

The format as `chatglm_cpp/convert.py` of version 0.4.2 has it: a header, a SentencePiece file, then every tensor with
its name and shape at a multiple of 16 bytes. Matrices are q4_0: blocks of 32 weights, an fp16 scale and 16 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy

ROOT = Path(__file__).parents[1]
PIECES = ROOT / "src/chatglm/assets/mini/ice_text.model"
"""Any SentencePiece file will do: no text is encoded."""

HIDDEN, HEADS, INNER, ROWS, LONGEST = 4096, 32, 16384, 130_528, 2048
EOP, PAD = 130_005, 3
Q4_0, F32, BLOCK = 2, 0, 32
WEIGHT_STD, CODE_STD = 0.02, 4.61
BLOCK_OF_CODES = numpy.dtype([("scale", "<f2"), ("codes", "u1", (BLOCK // 2,))])


def matrices(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file."""
    yield "transformer.word_embeddings.weight", (ROWS, HIDDEN)
    parts = {
        "input_layernorm": (HIDDEN,),
        "attention.query_key_value": (3 * HIDDEN, HIDDEN),
        "attention.dense": (HIDDEN, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.dense_h_to_4h": (INNER, HIDDEN),
        "mlp.dense_4h_to_h": (HIDDEN, INNER),
    }
    for layer in range(layers):
        for part, shape in parts.items():
            yield f"transformer.layers.{layer}.{part}.weight", shape
            yield f"transformer.layers.{layer}.{part}.bias", shape[:1]
    yield "transformer.final_layernorm.weight", (HIDDEN,)
    yield "transformer.final_layernorm.bias", (HIDDEN,)


def write_peer_file(path: Path, layers: int) -> int:
    """Random q4_0 weights in chatglm.cpp's format (version 2 of its header). Returns the bytes that a step reads."""
    generator = numpy.random.default_rng(0)
    pieces, read = PIECES.read_bytes(), 0
    with path.open("wb") as file:
        file.write(b"ggml" + struct.pack("<ii", 1, 2))
        file.write(struct.pack("<iiiiiii", Q4_0, ROWS, HIDDEN, HEADS, HEADS, layers, INNER))
        file.write(struct.pack("<fifiii", 1e-5, 0, 10_000.0, LONGEST, EOP, PAD))
        file.write(struct.pack("<i", len(pieces)) + pieces)
        for name, shape in matrices(layers):
            kind = Q4_0 if len(shape) == 2 else F32
            title = name.encode()
            head = struct.pack("<i", len(title)) + title
            head += struct.pack(f"<{2 + len(shape)}i", len(shape), *shape, kind)
            file.write(head)
            read += put(file, shape, name, generator)
    return read


def put(file: BinaryIO, shape: tuple[int, ...], name: str, generator: numpy.random.Generator) -> int:
    """One tensor at the next multiple of 16 bytes."""
    file.seek(-(-file.tell() // 16) * 16)
    if len(shape) == 1:
        value = 1.0 if name.endswith("layernorm.weight") else 0.0
        return file.write(numpy.full(shape, value, "<f4").tobytes())
    blocks = numpy.empty(shape[0] * shape[1] // BLOCK, BLOCK_OF_CODES)
    blocks["scale"] = WEIGHT_STD / CODE_STD
    blocks["codes"] = generator.integers(0, 256, (len(blocks), BLOCK // 2), dtype=numpy.uint8)
    return file.write(blocks.tobytes())
