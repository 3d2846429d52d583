"""Activations to INT8: one scale for each group of neighbouring columns of a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .emitter import F32, I8, I32, I64, POINTER, Function, Module, Value, field, vector
from .formats import Layout, Tile
from .pointwise import gelu
from .target import Target

Change = Callable[[Function, Value], Value]
"""What is done to activations before they are rounded."""

TOKEN_FIELDS = ("input", "codes", "scales", "corrections")
TILE_FIELDS = ("input", "codes", "starts", "scales", "tokens")


@dataclass
class Rounded:
    """A group of activations: codes (vectors of i8 in column order), their scale fp32 and their sum i32."""

    codes: list[Value]
    scale: Value
    total: Value


def round_group(
    function: Function,
    target: Target,
    source: Value,
    place: Value,
    group: int,
    columns: int,
    is_real: Value | None = None,
    change: Change | None = None,
) -> Rounded:
    """Read `group` fp32 values from `place` of `source` (`columns` of them real, the others 0) and round them.

    scale = largest magnitude / 127. A NaN or infinity in the group makes the scale NaN. Where not `is_real` all is 0.
    """
    width = min(group, 2 * target.lanes)
    pieces = []
    for start in range(0, group, width):
        count = max(0, min(width, columns - start))
        piece = function.load_some(source, vector(F32, width), count, place + start)
        pieces.append(piece if change is None else change(function, piece))
    if is_real is not None:
        one_or_zero = function.select(is_real, function.constant(1, F32), function.constant(0, F32))
        pieces = [piece * one_or_zero for piece in pieces]
    absolute = [function.call(f"llvm.fabs.v{width}f32", piece.kind, piece) for piece in pieces]
    highest = absolute[0]
    for piece in absolute[1:]:
        highest = piece.max(highest)
    largest = highest.highest()
    check = pieces[0] * 0.0
    for piece in pieces[1:]:
        check = check + piece * 0.0
    poison = check.sum()  # 0, or NaN where a value is not finite
    inverse = function.select(largest.compare(">", 0), 127 / largest, function.constant(0, F32))
    codes, total = [], function.constant(0, vector(I32, width))
    for piece in pieces:
        rounded = function.call(f"llvm.rint.v{width}f32", piece.kind, piece * inverse).cast(I32)
        total = total + rounded
        codes.append(rounded.cast(I8))
    return Rounded(codes, largest * (1 / 127) + poison, total.sum())


def quantize_tokens(module: Module, name: str, layout: Layout, *, segments: int = 1, has_gelu: bool = False) -> None:
    """Kernel: fp32 [tokens, columns] → codes, scales and corrections of `layout`. A chunk is a segment of a token.

    has_gelu  the input goes through GELU first
    """
    function = Function(module, name, [POINTER, I64])
    arguments, chunk = function.arguments
    steps = -(-layout.columns // layout.step)
    assert steps % segments == 0 and (segments == 1 or layout.columns % layout.step == 0)
    token, segment = chunk // segments, chunk % segments
    source = function.at(field(function, arguments, TOKEN_FIELDS, "input"), token * layout.columns, F32)
    places = token_places(function, arguments, TOKEN_FIELDS, layout, token)
    first = segment * (steps // segments)
    quantize_token(function, layout, source, places, first, steps // segments, gelu if has_gelu else None)
    function.close()


def token_places(
    function: Function, arguments: Value, fields: tuple[str, ...], layout: Layout, token: Value
) -> tuple[Value, Value, Value]:
    """Where the codes, scales and corrections of a token lie; `fields` has them under these names."""
    return (
        function.at(field(function, arguments, fields, "codes"), token * layout.padded_columns),
        function.at(field(function, arguments, fields, "scales"), token * layout.groups, F32),
        function.at(field(function, arguments, fields, "corrections"), token * layout.groups, F32),
    )


def quantize_token(
    function: Function,
    layout: Layout,
    source: Value,
    places: tuple[Value, Value, Value],
    first: Value,
    steps: int,
    change: Change | None = None,
) -> None:
    """Some steps of one token. The correction of a group is offset · Σ codes · scale."""
    rest = layout.columns % layout.step
    with function.loop(first + (steps - bool(rest)), first) as step:
        _quantize_step(function, layout, source, places, step, layout.step, change)
    if rest:
        _quantize_step(function, layout, source, places, first + (steps - 1), rest, change)
    zero = function.constant(0, F32)
    for group in range(layout.padded_columns // layout.group, layout.groups):  # spare lanes of the last register
        function.store(zero, places[1], group)
        function.store(zero, places[2], group)


def _quantize_step(
    function: Function,
    layout: Layout,
    source: Value,
    places: tuple[Value, Value, Value],
    step: Value,
    columns: int,
    change: Change | None,
) -> None:
    """The groups of one step; `columns` of it are real."""
    codes, scales, corrections = places
    groups = layout.step // layout.group
    parts: list[Value] = []
    for group in range(groups):
        real = max(0, min(layout.group, columns - group * layout.group))
        start = step * layout.step + group * layout.group
        rounded = round_group(function, layout.target, source, start, layout.group, real, change=change)
        parts += rounded.codes
        index = step * groups + group
        function.store(rounded.scale, scales, index)
        function.store(rounded.total.cast(F32) * rounded.scale * float(layout.offset), corrections, index)
    _store_blocks(function, layout, parts, codes, step)


def _store_blocks(function: Function, layout: Layout, parts: list[Value], codes: Value, step: Value) -> None:
    """Codes in column order → blocks, even columns before odd ones."""
    while parts[0].lanes < layout.block:
        parts = [left.pick(range(2 * left.lanes), right) for left, right in zip(parts[::2], parts[1::2], strict=True)]
    for number, block in enumerate(parts):
        start = step * layout.step + number * layout.block
        for half in range(layout.halves):
            place = start + half * (layout.block // layout.halves)
            function.store(block.pick(range(half, layout.block, layout.halves)), codes, place)


def quantize_tiles(module: Module, name: str, tile: Tile, *, has_gelu: bool = False) -> None:
    """Kernel: fp32 [tokens, columns] → codes, starts and scales of `tile`. A chunk is one tile; spare tokens are 0."""
    function = Function(module, name, [POINTER, I64])
    arguments, number = function.arguments

    def get(wanted: str, kind: object = POINTER) -> Value:
        return field(function, arguments, TILE_FIELDS, wanted, kind)

    source, tokens = get("input"), get("tokens", I64)
    places = (
        function.at(get("codes"), number * (tile.padded_columns * tile.tokens)),
        function.at(get("starts"), number * (tile.groups * tile.tokens), I32),
        function.at(get("scales"), number * (tile.groups * tile.tokens), F32),
    )
    change = gelu if has_gelu else None
    with function.loop(tile.tokens) as token:
        wanted = number * tile.tokens + token
        row = function.at(source, wanted.min(tokens - 1) * tile.columns, F32)
        is_real = wanted.compare("<", tokens)
        whole = tile.columns // tile.group
        with function.loop(whole) as group:
            _quantize_group(function, tile, row, places, token, group, tile.group, is_real, change)
        if rest := tile.columns % tile.group:
            _quantize_group(function, tile, row, places, token, function.constant(whole, I64), rest, is_real, change)
    function.close()


def _quantize_group(
    function: Function,
    tile: Tile,
    row: Value,
    places: tuple[Value, Value, Value],
    token: Value,
    group: Value,
    columns: int,
    is_real: Value,
    change: Change | None,
) -> None:
    """One group of one token of a tile; `columns` of it are real."""
    codes, starts, scales = places
    rounded = round_group(function, tile.target, row, group * tile.group, tile.group, columns, is_real, change)
    function.store(rounded.scale, scales, group * tile.tokens + token)
    function.store(rounded.total * -tile.offset, starts, group * tile.tokens + token)
    for number, part in enumerate(rounded.codes):
        first = group * (tile.group // tile.quad) + number * (part.lanes // tile.quad)
        for half in range(tile.halves):
            quads = part.pick(range(half, part.lanes, tile.halves)).bits_as(vector(I32, part.lanes // tile.quad))
            for quad in range(quads.lanes):
                place = (first + quad) * (tile.halves * tile.tokens) + half * tile.tokens + token
                function.store(quads.lane(quad), codes, place)
