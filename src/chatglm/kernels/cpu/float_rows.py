"""A linear with floating weights over a few tokens, sums in fp32: a stream over the stored weights.

Each output is summed in an order that depends on the columns alone, so a token's result is the same in every batch.
"""

from __future__ import annotations

from typing import Any

from .emitter import F16, F32, I16, I32, I64, POINTER, Function, Module, Value, Variable, field, vector
from .target import Target

FIELDS = ("weight", "bias", "input", "out", "rows", "rows_a_chunk", "tokens")

AT_ONCE = 4
"""Tokens that share one look at a row."""

ACCUMULATORS = 2
"""Registers over which the sum of a row is spread, so that additions need not wait for each other."""


def load_floats(
    function: Function, pointer: Value, dtype: str, lanes: int, place: Value, real: int | None = None
) -> Value:
    """`lanes` numbers of a torch dtype (float32, float16, bfloat16) as fp32; `real` of them, the others 0."""
    count = lanes if real is None else real
    if dtype == "bfloat16":  # the upper half of an fp32
        bits = function.load_some(pointer, vector(I16, lanes), count, place).cast(I32, signed=False) << 16
        return bits.bits_as(vector(F32, lanes))
    kind: Any = F16 if dtype == "float16" else F32
    return function.load_some(pointer, vector(kind, lanes), count, place).cast(F32)


def store_floats(function: Function, value: Value, pointer: Value, dtype: str, place: Value) -> None:
    """fp32 lanes to memory in a torch dtype, rounded to the nearest, ties to even."""
    if dtype == "bfloat16":
        bits = value.bits_as(vector(I32, value.lanes))
        rounded = bits + ((bits >> 16) & 1) + 0x7FFF
        is_nan = value.compare("!=", value)
        rounded = function.select(is_nan, function.like(rounded, 0x7FC00000), rounded)
        function.store((rounded >> 16).cast(I16), pointer, place)
    else:
        function.store(value.cast(F16) if dtype == "float16" else value, pointer, place)


def linear_floats(module: Module, name: str, target: Target, columns: int, dtype: str) -> None:
    """Kernel: fp32 [tokens, columns] times weightᵀ in `dtype`, plus an fp32 bias → fp32 [tokens, rows]."""
    function = Function(module, name, [POINTER, I64])
    arguments, chunk = function.arguments

    def get(wanted: str, kind: Any = POINTER) -> Value:
        return field(function, arguments, FIELDS, wanted, kind)

    weight, bias, source, out = get("weight"), get("bias"), get("input"), get("out")
    rows, tokens = get("rows", I64), get("tokens", I64)
    item = {"float32": F32}.get(dtype, F16)
    first = chunk * get("rows_a_chunk", I64)
    last = (first + get("rows_a_chunk", I64)).min(rows)

    def some(start: Value, count: int) -> None:
        inputs = [function.at(source, (start + token) * columns, F32) for token in range(count)]
        with function.loop(last, first) as row:
            sums = _row_sums(function, target, function.at(weight, row * columns, item), inputs, columns, dtype)
            added = function.load(bias, F32, row)
            for token, total in enumerate(sums):
                function.store(total.sum() + added, out, (start + token) * rows + row)

    together = tokens - tokens % AT_ONCE
    with function.loop(together, 0, AT_ONCE) as start:
        some(start, AT_ONCE)
    with function.loop(tokens, together) as start:
        some(start, 1)
    function.close()


def _row_sums(
    function: Function, target: Target, row: Value, inputs: list[Value], columns: int, dtype: str
) -> list[Value]:
    """For each token the products with one row, still spread over the lanes."""
    lanes = target.lanes
    zero = function.constant(0, vector(F32, lanes))
    sums = [[Variable(function, zero) for _ in range(ACCUMULATORS)] for _ in inputs]

    def part(place: Value, number: int, real: int) -> None:
        weights = load_floats(function, row, dtype, lanes, place, real)
        for token_sums, source in zip(sums, inputs, strict=True):
            values = function.load_some(source, vector(F32, lanes), real, place)
            token_sums[number].set(token_sums[number].get() + weights * values)

    turn = lanes * ACCUMULATORS
    whole = columns - columns % turn
    with function.loop(whole, 0, turn) as start:
        for number in range(ACCUMULATORS):
            part(start + number * lanes, number, lanes)
    for place in range(whole, columns, lanes):
        part(function.constant(place, I64), 0, min(lanes, columns - place))
    return [token_sums[0].get() + token_sums[1].get() for token_sums in sums]
