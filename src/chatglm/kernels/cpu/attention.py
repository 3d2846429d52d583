"""Rotary, KV cache and attention of new tokens: one head of one token a chunk.

`place_keys` turns queries and keys in place and writes keys and values into the cache; `attend_one` lets one new token
of each sequence look at all slots of its own, and can do the first in the same go where no other token waits for it.
Scores, softmax and sums are fp32, whatever the cache is stored in; the softmax is taken block by block with a running
maximum, so no score matrix is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .emitter import F32, I32, I64, POINTER, Function, Module, Value, Variable, field, vector
from .float_rows import load_floats, store_floats
from .pointwise import exp
from .target import Target

FIELDS = ("qkv", "cosines", "sines", "keys", "values", "slots", "slots_a_row", "lengths", "out")
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

BLOCK = 16
"""Tokens whose scores are computed before the running maximum is renewed."""


@dataclass(frozen=True)
class Heads:
    """Shape of attention. streams: halves of a head that turn on their own (2-D: 2, 1-D: 1, learned positions: 0)."""

    heads: int
    head_dim: int
    streams: int
    per_head: bool
    dtype: str

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def places(self, head: Value) -> tuple[Value, Value, Value]:
        """Where query, key and value of a head stand in a row of 3 · hidden."""
        if self.per_head:
            first = head * (3 * self.head_dim)
            return first, first + self.head_dim, first + 2 * self.head_dim
        first = head * self.head_dim
        return first, first + self.hidden, first + 2 * self.hidden


def _get(function: Function, arguments: Value, name: str, kind: Any = POINTER) -> Value:
    return field(function, arguments, FIELDS, name, kind)


def _turn(function: Function, target: Target, heads: Heads, vector_: Value, arguments: Value, token: Value) -> None:
    """Rotate one head's query or key [head_dim] in place. Pairs are (j, j + dim/2) inside each stream."""
    if not heads.streams:
        return
    half = heads.head_dim // (2 * heads.streams)
    angles = token * (heads.streams * half)
    cosines = function.at(_get(function, arguments, "cosines"), angles, F32)
    sines = function.at(_get(function, arguments, "sines"), angles, F32)
    lanes = min(target.lanes, half & -half)
    kind = vector(F32, lanes)
    for stream in range(heads.streams):
        for start in range(0, half, lanes):
            place = 2 * stream * half + start
            first, second = function.load(vector_, kind, place), function.load(vector_, kind, place + half)
            cosine = function.load(cosines, kind, stream * half + start)
            sine = function.load(sines, kind, stream * half + start)
            function.store(first * cosine - second * sine, vector_, place)
            function.store(second * cosine + first * sine, vector_, place + half)


def _write(
    function: Function, target: Target, heads: Heads, source: Value, cache: Value, slot: Value, head: Value
) -> None:
    """A key or value [head_dim] fp32 into its slot of a cache [slots, heads, head_dim]."""
    lanes = min(target.lanes, heads.head_dim & -heads.head_dim)
    start = slot * heads.hidden + head * heads.head_dim
    for place in range(0, heads.head_dim, lanes):
        value = function.load(source, vector(F32, lanes), place)
        store_floats(function, value, cache, heads.dtype, start + place)


def _prepare(
    function: Function, target: Target, heads: Heads, arguments: Value, token: Value, head: Value, slot: Value
) -> Value:
    """Turn and store one token's head; returns where its query stands."""
    row = function.at(_get(function, arguments, "qkv"), token * (3 * heads.hidden), F32)
    query, key, value = (function.at(row, place, F32) for place in heads.places(head))
    _turn(function, target, heads, query, arguments, token)
    _turn(function, target, heads, key, arguments, token)
    _write(function, target, heads, key, _get(function, arguments, "keys"), slot, head)
    _write(function, target, heads, value, _get(function, arguments, "values"), slot, head)
    return query


def place_keys(module: Module, name: str, target: Target, heads: Heads) -> None:
    """Kernel: qkv fp32 [tokens, 3 · hidden] turned in place; keys, values to `slots` int32 [tokens]. Chunk: a token."""
    function = Function(module, name, [POINTER, I64])
    arguments, token = function.arguments
    slot = function.load(_get(function, arguments, "slots"), I32, token).cast(I64)
    with function.loop(heads.heads) as head:
        _prepare(function, target, heads, arguments, token, head, slot)
    function.close()


def attend_one(module: Module, name: str, target: Target, heads: Heads, places: bool) -> None:
    """Kernel: qkv of one new token a sequence → mixed values `out` fp32 [sequences, hidden]. Chunk: a head of one.

    slots    int32 [sequences, slots_a_row], the new token's last
    lengths  int32 [sequences]: how many of them count
    places   turn and store the token first; else `place_keys` did so for all
    """
    function = Function(module, name, [POINTER, I64])
    arguments, chunk = function.arguments
    token, head = chunk // heads.heads, chunk % heads.heads
    slots = function.at(_get(function, arguments, "slots"), token * _get(function, arguments, "slots_a_row", I64), I32)
    length = function.load(_get(function, arguments, "lengths"), I32, token).cast(I64)
    if places:
        newest = function.load(slots, I32, length - 1).cast(I64)
        query = _prepare(function, target, heads, arguments, token, head, newest)
    else:
        row = function.at(_get(function, arguments, "qkv"), token * (3 * heads.hidden), F32)
        query = function.at(row, heads.places(head)[0], F32)
    lanes = min(target.lanes, heads.head_dim & -heads.head_dim)
    state = _Softmax(function, target, heads, query, lanes, head)
    keys, values = _get(function, arguments, "keys"), _get(function, arguments, "values")
    whole = length - length % BLOCK
    with function.loop(whole, 0, BLOCK) as start:
        state.take(slots, start, BLOCK, keys, values)
    with function.loop(length, whole) as start:
        state.take(slots, start, 1, keys, values)
    state.finish(function.at(_get(function, arguments, "out"), token * heads.hidden + head * heads.head_dim, F32))
    function.close()


class _Softmax:
    """The softmax-weighted sum of values so far: running maximum, sum of weights, and mixed values in registers."""

    def __init__(self, function: Function, target: Target, heads: Heads, query: Value, lanes: int, head: Value) -> None:
        self.function, self.heads, self.lanes = function, heads, lanes
        self.parts = range(0, heads.head_dim, lanes)
        scale = heads.head_dim**-0.5
        self.query = [function.load(query, vector(F32, lanes), place) * scale for place in self.parts]
        self.first = head * heads.head_dim
        zero = function.constant(0, vector(F32, lanes))
        self.highest = Variable(function, function.constant(-3e38, F32))
        self.total = Variable(function, function.constant(0, F32))
        self.mixed = [Variable(function, zero) for _ in self.parts]

    def take(self, slots: Value, start: Value, count: int, keys: Value, values: Value) -> None:
        """Look at `count` more tokens."""
        function, heads, lanes = self.function, self.heads, self.lanes
        places = []
        for number in range(count):
            slot = function.load(slots, I32, start + number).cast(I64)
            places.append(slot * heads.hidden + self.first)
        products = []
        for place in places:
            total = self.query[0] * load_floats(function, keys, heads.dtype, lanes, place)
            for number, part in enumerate(list(self.parts)[1:], 1):
                total = total + self.query[number] * load_floats(function, keys, heads.dtype, lanes, place + part)
            products.append(total)
        scores = sum_each(products)
        before = self.highest.get()
        highest = before.max(scores.highest())
        weights = exp(function, scores - highest)
        shrink = exp(function, before - highest)
        self.highest.set(highest)
        self.total.set(self.total.get() * shrink + weights.sum())
        mixed = [variable.get() * shrink for variable in self.mixed]
        for number, place in enumerate(places):
            weight = function.spread(weights.lane(number) if count > 1 else weights, lanes)
            for part_number, part in enumerate(self.parts):
                value = load_floats(function, values, heads.dtype, lanes, place + part)
                mixed[part_number] = mixed[part_number] + weight * value
        for variable, result in zip(self.mixed, mixed, strict=True):
            variable.set(result)

    def finish(self, out: Value) -> None:
        """Write the mixed values."""
        inverse = 1.0 / self.total.get()
        for variable, place in zip(self.mixed, self.parts, strict=True):
            self.function.store(variable.get() * inverse, out, place)


def sum_each(rows: list[Value]) -> Value:
    """The sums of the lanes of each register, as the lanes of one: halves of two registers are added until all are one.

    A single register gives a scalar. The number of registers must be a power of two.
    """
    if len(rows) == 1:
        return rows[0].sum()
    lanes, count = rows[0].lanes, len(rows)
    while len(rows) > 1 and lanes > 1:
        joined = []
        for one, other in zip(rows[::2], rows[1::2], strict=True):
            width = one.lanes  # made of parts of `lanes` lanes, one for each summed register
            even = [part * lanes + lane for part in range(width // lanes) for lane in range(lanes // 2)]
            odd = [place + lanes // 2 for place in even]
            low = one.pick([*even, *(width + place for place in even)], other)
            high = one.pick([*odd, *(width + place for place in odd)], other)
            joined.append(low + high)
        rows, lanes = joined, lanes // 2
    while lanes > 1:
        one = rows[0]
        even = [part * lanes + lane for part in range(one.lanes // lanes) for lane in range(lanes // 2)]
        rows, lanes = [one.pick(even) + one.pick([place + lanes // 2 for place in even])], lanes // 2
    result = rows[0]
    for other in rows[1:]:
        result = result.pick(range(2 * result.lanes), other) if other.lanes == result.lanes else _append(result, other)
    assert result.lanes == count
    return result


def _append(one: Value, other: Value) -> Value:
    """The lanes of `one`, then those of the shorter `other`."""
    padded = other.pick([lane % other.lanes for lane in range(one.lanes)])
    return one.pick(range(one.lanes + other.lanes), padded)
