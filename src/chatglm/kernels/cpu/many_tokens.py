"""A linear over many tokens: panels of weights against tiles of activations, sums in registers.

A chunk is one panel of rows. Its packed weights are turned once so that a register holds the same columns of as many
rows as it has lanes; INT4 stays packed until it is multiplied. Then for every tile of tokens and every group the sums
of products stay in registers, and are scaled into fp32 once a group.
"""

from __future__ import annotations

from typing import Any

from .dot_products import dot, nibbles
from .emitter import F16, F32, I8, I32, I64, POINTER, Function, Module, Value, Variable, field, vector
from .formats import Matrix, Tile
from .target import Target

FIELDS = ("weight", "scale", "bias", "codes", "starts", "scales", "out", "rows", "tokens")

SIGN_BITS = -0x77777778
"""0x88888888: flips two's complement nibbles to code + 8."""


def linear_many(module: Module, name: str, target: Target, matrix: Matrix) -> None:
    """Kernel: tiles of quantised activations → fp32 [tokens, rows]. One chunk is one panel of rows."""
    function = Function(module, name, [POINTER, I64])
    arguments, number = function.arguments
    panel = _Panel(function, target, matrix, arguments, number)
    panel.turn()
    panel.widen_scales()
    tile = panel.tile
    tokens = field(function, arguments, FIELDS, "tokens", I64)
    with function.loop((tokens + (tile.tokens - 1)) // tile.tokens) as place:
        panel.multiply(arguments, place)
        panel.write_out(arguments, place * tile.tokens, tokens)
    function.close()


class _Panel:
    """The rows of one chunk, and the scratch memory on the stack that they are worked on in.

    turned   [registers, words, lanes] i32: word w of row register * lanes + lane
    factors  [groups, rows] fp32: scales of the weights
    sums     [tokens, rows] fp32
    """

    def __init__(self, function: Function, target: Target, matrix: Matrix, arguments: Value, number: Value) -> None:
        self.function, self.target, self.matrix = function, target, matrix
        self.tile = tile = Tile.of(target, matrix)
        self.lanes, self.width = target.lanes, target.register_bytes
        self.align = min(64, self.width)
        self.words = -(-matrix.row_bytes // self.width) * self.lanes
        self.turned = function.reserve(I32, tile.registers * self.words * self.lanes, align=64)
        self.factors = function.reserve(F32, tile.groups * tile.rows, align=64)
        self.sums = function.reserve(F32, tile.tokens * tile.rows, align=64)
        self.weight = field(function, arguments, FIELDS, "weight")
        self.scale = field(function, arguments, FIELDS, "scale")
        self.rows = field(function, arguments, FIELDS, "rows", I64)
        self.first_row = number * tile.rows

    def _row(self, row: Value | int) -> Value:
        """The number of a row of the panel in the matrix; the last one again behind the end."""
        return (self.first_row + row).min(self.rows - 1)

    def turn(self) -> None:
        """Fill `turned`."""
        row_bytes, width = self.matrix.row_bytes, self.width
        whole = row_bytes // width
        if whole:
            with self.function.loop(whole) as square:
                self._turn_square(square, width)
        if rest := row_bytes % width:
            self._turn_square(self.function.constant(whole, I64), rest)

    def _turn_square(self, square: Value, real_bytes: int) -> None:
        """One register of bytes of every row."""
        function, lanes = self.function, self.lanes
        for register in range(self.tile.registers):
            rows = []
            for lane in range(lanes):
                row = function.at(self.weight, self._row(register * lanes + lane) * self.matrix.row_bytes)
                loaded = function.load_some(row, vector(I8, self.width), real_bytes, square * self.width)
                rows.append(loaded.bits_as(vector(I32, lanes)))
            if self.matrix.is_original and self.matrix.bits == 4:
                rows = [row ^ SIGN_BITS for row in rows]
            for word, column in enumerate(transpose(rows)):
                place = square * lanes + (register * self.words + word)
                function.store(column, self.turned, place * lanes, align=self.align)

    def widen_scales(self) -> None:
        """Fill `factors`."""
        if not self.matrix.group:
            return
        function, groups = self.function, self.tile.groups
        with function.loop(self.tile.rows) as row:
            own = function.at(self.scale, self._row(row) * groups, F16)
            with function.loop(groups) as group:
                function.store(function.load(own, F16, group).cast(F32), self.factors, group * self.tile.rows + row)

    def multiply(self, arguments: Value, number: Value) -> None:
        """Fill `sums` for one tile of tokens."""
        function, tile = self.function, self.tile
        codes, starts, scales = (field(function, arguments, FIELDS, name) for name in ("codes", "starts", "scales"))
        codes = function.at(codes, number * (tile.padded_columns * tile.tokens))
        starts = function.at(starts, number * (tile.groups * tile.tokens), I32)
        scales = function.at(scales, number * (tile.groups * tile.tokens), F32)
        for place in range(0, tile.tokens * tile.rows, self.lanes):
            function.store(function.constant(0, vector(F32, self.lanes)), self.sums, place, align=self.align)
        whole = self.matrix.columns // tile.group
        with function.loop(whole) as group:
            self._scale(scales, group, self._products(codes, starts, group, tile.group))
        if rest := self.matrix.columns % tile.group:
            last = function.constant(whole, I64)
            self._scale(scales, last, self._products(codes, starts, last, rest))

    def _products(self, codes: Value, starts: Value, group: Value, columns: int) -> list[list[Variable]]:
        """Sums of products of one group, for each token and register of rows; `columns` of the group are real."""
        function, tile, lanes = self.function, self.tile, self.lanes
        totals = []
        for token in range(tile.tokens):
            start = function.spread(function.load(starts, I32, group * tile.tokens + token), lanes)
            totals.append([Variable(function, start) for _ in range(tile.registers)])
        first = group * (tile.group // tile.quad)
        with function.loop(first + columns // tile.quad, first) as quad:
            for half, weights in enumerate(self._weights(quad)):
                for token in range(tile.tokens):
                    place = quad * (tile.halves * tile.tokens) + (half * tile.tokens + token)
                    four = function.spread(function.load(codes, I32, place), lanes).bits_as(vector(I8, self.width))
                    for total, weight in zip(totals[token], weights, strict=True):
                        total.set(dot(function, self.target, self.matrix.bits, total.get(), weight, four))
        return totals

    def _weights(self, quad: Value) -> list[list[Value]]:
        """One word of every row; of INT4 the even and the odd columns apart. [halves][registers]."""
        registers = [
            self.function.load(
                self.turned, vector(I32, self.lanes), (quad + register * self.words) * self.lanes, align=self.align
            ).bits_as(vector(I8, self.width))
            for register in range(self.tile.registers)
        ]
        if self.matrix.bits == 8:
            return [registers]
        pairs = [nibbles(self.function, register) for register in registers]
        order = (1, 0) if self.matrix.is_original else (0, 1)
        return [[pair[half] for pair in pairs] for half in order]

    def _scale(self, scales: Value, group: Value, totals: list[list[Variable]]) -> None:
        """Add the products of a group to `sums`, scaled."""
        function, tile, lanes = self.function, self.tile, self.lanes
        kind = vector(F32, lanes)
        factors: list[Any] = [1.0] * tile.registers
        if self.matrix.group:
            starts = [group * tile.rows + register * lanes for register in range(tile.registers)]
            factors = [function.load(self.factors, kind, start, align=self.align) for start in starts]
        for token in range(tile.tokens):
            scale = function.spread(function.load(scales, F32, group * tile.tokens + token), lanes)
            for register, total in enumerate(totals[token]):
                place = token * tile.rows + register * lanes
                before = function.load(self.sums, kind, place, align=self.align)
                scaled = total.get().cast(F32) * (scale * factors[register])
                function.store(before + scaled, self.sums, place, align=self.align)

    def write_out(self, arguments: Value, first_token: Value, tokens: Value) -> None:
        """Sums of the tile's real tokens and the panel's real rows to their places, with bias."""
        function, tile, lanes = self.function, self.tile, self.lanes
        out, bias = field(function, arguments, FIELDS, "out"), field(function, arguments, FIELDS, "bias")
        rows = (self.rows - self.first_row).min(tile.rows)
        with function.loop((tokens - first_token).min(tile.tokens)) as token:
            source = function.at(self.sums, token * tile.rows, F32)
            place = function.at(out, (first_token + token) * self.rows + self.first_row, F32)

            def finish(row: Value | int, single: Any, half: Any, source: Value = source, place: Value = place) -> None:
                value = function.load(source, single, row)
                if not self.matrix.group:
                    value = value * function.load(self.scale, half, self.first_row + row).cast(F32)
                value = value + function.load(bias, single, self.first_row + row)
                function.store(value, place, row)

            with function.when(rows.compare("==", tile.rows)):
                for register in range(tile.registers):
                    finish(register * lanes, vector(F32, lanes), vector(F16, lanes))
            with function.when(rows.compare("!=", tile.rows)), function.loop(rows) as row:
                finish(row, F32, F16)


def transpose(rows: list[Value]) -> list[Value]:
    """A square of registers turned over its diagonal: log2(lanes) rounds of two-register shuffles."""
    lanes, step, turned = len(rows), 1, list(rows)
    while step < lanes:
        first = [lane if not lane & step else lanes + lane - step for lane in range(lanes)]
        second = [lane + step if not lane & step else lanes + lane for lane in range(lanes)]
        for number in range(lanes):
            if not number & step:
                one, other = turned[number], turned[number + step]
                turned[number], turned[number + step] = one.pick(first, other), one.pick(second, other)
        step *= 2
    return turned
