"""A linear over one or a few tokens: a stream over the stored weights at the speed of memory.

Activations are rounded to INT8 with a scale a group, once for all rows (quantize.py). A chunk is some neighbouring
rows, read in the order in which they are stored: one register of packed weights against two of activations, summed as
integers over a group, then scaled into fp32. Biases are fp32 and always there.
"""

from __future__ import annotations

from .dot_products import dot, nibbles
from .emitter import F16, F32, I8, I32, I64, POINTER, Function, Module, Value, Variable, field, vector
from .formats import Layout, Matrix
from .target import Target

FIELDS = ("weight", "scale", "bias", "codes", "scales", "corrections", "out", "rows", "rows_a_chunk")

UNROLL = 2
"""Steps in one turn of the inner loop."""

SIGN_BITS = -0x78
"""0x88: flips two's complement nibbles to code + 8."""


def linear_few(module: Module, name: str, target: Target, matrix: Matrix, tokens: int) -> None:
    """Kernel: quantised activations of `tokens` tokens → fp32 [tokens, rows]. A chunk is `rows_a_chunk` rows."""
    function = Function(module, name, [POINTER, I64])
    arguments, chunk = function.arguments
    rows, rows_a_chunk = (field(function, arguments, FIELDS, name, I64) for name in ("rows", "rows_a_chunk"))
    products = _Products(function, target, matrix, arguments, tokens)
    first = chunk * rows_a_chunk
    with function.loop((first + rows_a_chunk).min(rows), first) as row:
        products.compute(row, rows)
    function.close()


class _Products:
    """One row after the other against all tokens: a single stream, which memory serves faster than several.

    factors  [tokens][groups] fp32 on the stack: products of the scales of the row and of the token
    """

    def __init__(self, function: Function, target: Target, matrix: Matrix, arguments: Value, tokens: int) -> None:
        self.function, self.target, self.matrix = function, target, matrix
        self.layout = layout = Layout.of(target, matrix)
        self.tokens = range(tokens)

        def get(name: str) -> Value:
            return field(function, arguments, FIELDS, name)

        self.weight, self.scale, self.bias, self.out = get("weight"), get("scale"), get("bias"), get("out")
        self.codes = [function.at(get("codes"), token * layout.padded_columns) for token in self.tokens]
        self.scales = [function.at(get("scales"), token * layout.groups, F32) for token in self.tokens]
        self.corrections = [function.at(get("corrections"), token * layout.groups, F32) for token in self.tokens]
        self.factors = self.scales
        if matrix.group:
            space = function.reserve(F32, tokens * layout.groups, align=64)
            self.factors = [function.at(space, token * layout.groups, F32) for token in self.tokens]

    def compute(self, row: Value, rows: Value) -> None:
        """The outputs of one row of `rows`."""
        function, layout, matrix = self.function, self.layout, self.matrix
        surplus = self._join_scales(row)
        packed = function.at(self.weight, row * matrix.row_bytes)
        zero = function.constant(0, vector(F32, self.target.lanes))
        sums = [Variable(function, zero) for _ in self.tokens]
        steps = matrix.columns // layout.step
        unrolled = steps - steps % UNROLL
        with function.loop(unrolled, 0, UNROLL) as step:
            for turn in range(UNROLL):
                self._step(packed, sums, step + turn, layout.step)
        for number in range(unrolled, steps):
            self._step(packed, sums, function.constant(number, I64), layout.step)
        if rest := matrix.columns % layout.step:
            self._step(packed, sums, function.constant(steps, I64), rest)
        added = function.load(self.bias, F32, row)
        for token in self.tokens:
            result = sums[token].get().sum() - surplus[token]
            if not matrix.group:
                result = result * function.load(self.scale, F16, row).cast(F32)
            function.store(result + added, self.out, row + rows * token)

    def _join_scales(self, row: Value) -> list[Value]:
        """Fill `factors`; returns for each token what the offset of the weights adds to the row's sum."""
        function, layout, matrix = self.function, self.layout, self.matrix
        zero = function.constant(0, F32)
        if not layout.offset and not matrix.group:
            return [zero for _ in self.tokens]
        kind, half = vector(F32, self.target.lanes), vector(F16, self.target.lanes)
        surplus = [Variable(function, function.constant(0, kind)) for _ in self.tokens]
        groups = -(-matrix.columns // layout.group)
        own = function.at(self.scale, row * groups, F16)

        def part(start: Value, count: int) -> None:
            weights = function.load_some(own, half, count, start).cast(F32) if matrix.group else None
            for token in self.tokens:
                correction = function.load(self.corrections[token], kind, start)
                if weights is not None:
                    correction = correction * weights
                    product = function.load(self.scales[token], kind, start) * weights
                    function.store(product, self.factors[token], start)
                surplus[token].set(surplus[token].get() + correction)

        lanes = self.target.lanes
        whole = groups // lanes
        if whole <= 4:
            for register in range(whole):
                part(function.constant(register * lanes, I64), lanes)
        else:
            with function.loop(whole * lanes, 0, lanes) as start:
                part(start, lanes)
        if groups % lanes:
            part(function.constant(whole * lanes, I64), groups % lanes)
        return [variable.get().sum() for variable in surplus]

    def _step(self, packed: Value, sums: list[Variable], step: Value, columns: int) -> None:
        """Products of one step, scaled and added to `sums`; `columns` of it are real."""
        function, layout, width = self.function, self.layout, self.target.register_bytes
        zero = function.constant(0, vector(I32, self.target.lanes))
        totals = [zero for _ in self.tokens]
        blocks = layout.step // layout.block
        for block in range(blocks):
            real_bytes = max(0, min(layout.block, columns - block * layout.block)) * layout.bits // 8
            if not real_bytes:
                continue
            number = step * blocks + block
            weights = self._halves(packed, number, real_bytes)
            for token in self.tokens:
                for half, values in enumerate(weights):
                    place = (number * layout.halves + half) * width
                    activations = function.load(self.codes[token], vector(I8, width), place)
                    totals[token] = dot(function, self.target, layout.bits, totals[token], values, activations)
        for token in self.tokens:
            scaled = totals[token].cast(F32) * self._factor(self.factors[token], step)
            sums[token].set(sums[token].get() + scaled)

    def _halves(self, row: Value, number: Value, real_bytes: int) -> tuple[Value, ...]:
        """One register of weights; of INT4 the even and the odd columns apart."""
        width = self.target.register_bytes
        register = self.function.load_some(row, vector(I8, width), real_bytes, number * width)
        if self.layout.bits == 8:
            return (register,)
        low, high = nibbles(self.function, register ^ SIGN_BITS if self.matrix.is_original else register)
        return (high, low) if self.matrix.is_original else (low, high)

    def _factor(self, factors: Value, step: Value) -> Value:
        """The factors of the groups of one step, each in the lanes that hold its products."""
        function, lanes = self.function, self.target.lanes
        groups = self.layout.step // self.layout.group
        if groups == 1:
            return function.spread(function.load(factors, F32, step), lanes)
        few = function.load(factors, vector(F32, groups), step * groups)
        return few.pick([lane * groups // lanes for lane in range(lanes)])
