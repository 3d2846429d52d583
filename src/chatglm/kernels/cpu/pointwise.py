"""Functions of one number, as vectors."""

from __future__ import annotations

from .emitter import F32, I32, I64, POINTER, Function, Module, Value, each_register, field, vector
from .target import Target

LOG2_E = 1.4426950408889634
LN_2_HIGH, LN_2_LOW = 0.693145751953125, 1.42860682030941723212e-6
"""ln 2 in two parts: multiples of the first are exact."""

EXP_TERMS = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)


def exp(function: Function, value: Value) -> Value:
    """Powers of e for fp32, to about 1e-7 of the result; below -87 it is e^-87, above 88 e^88. NaN stays NaN."""
    suffix = f"v{value.lanes}f32" if value.lanes > 1 else "f32"
    clamped = function.select(value.compare("<", -87.0), function.like(value, -87.0), value)
    clamped = function.select(clamped.compare(">", 88.0), function.like(value, 88.0), clamped)
    power = function.call(f"llvm.rint.{suffix}", value.kind, clamped * LOG2_E)
    rest = clamped - power * LN_2_HIGH - power * LN_2_LOW
    result = function.like(value, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        result = result * rest + term
    bits = (power.cast(I32) + 127) << 23
    return result * bits.bits_as(value.kind)


def gelu(function: Function, value: Value) -> Value:
    """The tanh form: x · ½(1 + tanh z) is x / (1 + e^(-2z)), z = √(2/π) · (x + 0.044715 x³)."""
    inner = value * (value * value * 0.044715 + 1.0) * -1.5957691216057308
    return value / (exp(function, inner) + 1.0)


def gelu_in_place(module: Module, name: str, target: Target, columns: int) -> None:
    """Kernel: GELU of fp32 numbers in place. A chunk is `columns` of them."""
    function = Function(module, name, [POINTER, I64])
    arguments, chunk = function.arguments
    source = function.at(field(function, arguments, ("input",), "input"), chunk * columns, F32)

    def change(place: Value, real: int) -> None:
        value = gelu(function, function.load_some(source, vector(F32, target.lanes), real, place))
        function.store_some(value, source, real, place)

    each_register(function, columns, target.lanes, change)
    function.close()
