"""LayerNorm with the residual sum before it, and the rounding of its result after it."""

from __future__ import annotations

from .emitter import F32, F64, I64, POINTER, Function, Module, Value, Variable, each_register, field, vector
from .formats import Layout
from .quantize import quantize_token, token_places
from .target import Target

FIELDS = ("input", "residual", "weight", "bias", "out", "kept", "factors", "codes", "scales", "corrections")


def norm(
    module: Module, name: str, target: Target, columns: int, *, has_residual: bool, keeps: bool, layout: Layout | None
) -> None:
    """Kernel: x = input (+ scale · residual); out = LayerNorm(x). All fp32 [tokens, columns]; a chunk is one token.

    factors  two fp64: scale and epsilon
    keeps    x itself is kept, for the residual of a pre-LN block
    layout   also round `out` to codes, scales and corrections
    """
    function = Function(module, name, [POINTER, I64])
    arguments, token = function.arguments

    def row(wanted: str) -> Value:
        return function.at(field(function, arguments, FIELDS, wanted), token * columns, F32)

    def number(place: int) -> Value:
        return function.load(field(function, arguments, FIELDS, "factors"), F64, place).cast(F32)

    source, out = row("input"), row("out")
    residual = row("residual") if has_residual else None
    kept = row("kept") if keeps else out
    weight, bias = field(function, arguments, FIELDS, "weight"), field(function, arguments, FIELDS, "bias")
    lanes = target.lanes
    scale = number(0)
    kind = vector(F32, lanes)
    total = Variable(function, function.constant(0, kind))
    squares = Variable(function, function.constant(0, kind))

    def add(place: Value, real: int) -> None:
        value = function.load_some(source, kind, real, place)
        if residual is not None:
            value = value + function.load_some(residual, kind, real, place) * scale
        function.store_some(value, kept, real, place)
        total.set(total.get() + value)

    each_register(function, columns, lanes, add)
    mean = total.get().sum() * (1 / columns)

    def square(place: Value, real: int) -> None:
        value = function.load_some(kept, kind, real, place) - mean
        if real < lanes:
            value = value * function.constants([float(lane < real) for lane in range(lanes)], F32)
        squares.set(squares.get() + value * value)

    each_register(function, columns, lanes, square)
    variance = squares.get().sum() * (1 / columns) + number(1)
    inverse = 1.0 / function.call("llvm.sqrt.f32", F32, variance)

    def finish(place: Value, real: int) -> None:
        value = (function.load_some(kept, kind, real, place) - mean) * inverse
        value = value * function.load_some(weight, kind, real, place)
        function.store_some(value + function.load_some(bias, kind, real, place), out, real, place)

    each_register(function, columns, lanes, finish)
    if layout is not None:
        places = token_places(function, arguments, FIELDS, layout, token)
        steps = -(-columns // layout.step)
        quantize_token(function, layout, out, places, function.constant(0, I64), steps)
    function.close()
