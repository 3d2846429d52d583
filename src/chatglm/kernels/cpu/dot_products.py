"""Sums of four byte products in every 32-bit lane, the instruction that everything else here is built around.

Weights are unsigned nibbles (code + 8) or signed bytes, activations are signed bytes. Where the instruction wants an
unsigned operand, a signed weight is moved up by 128; what an offset adds to a sum is offset · Σ activation, which does
not depend on the row and is subtracted once a group.
"""

from __future__ import annotations

from .emitter import I8, I16, I32, Function, Value, vector
from .target import Target


def weight_offset(target: Target, bits: int) -> int:
    """What is added to every weight before the product."""
    if bits == 4:
        return 8
    return 128 if target.dot == "vnni" else 0


def dot(function: Function, target: Target, bits: int, total: Value, weight: Value, activation: Value) -> Value:
    """Add to total i32 [lanes] the sums of four neighbouring products. weight, activation: i8 [4 * lanes].

    INT4 weights are nibbles 0 … 15; INT8 weights are signed, moved by `weight_offset` in here. Activations lie in
    -127 … 127, so no sum of two products of the 16-bit instructions overflows.
    """
    if target.dot == "vnni":
        if bits == 8:
            weight = weight ^ -128
        name = f"llvm.x86.avx512.vpdpbusd.{8 * target.register_bytes}"
        return function.call(name, total.kind, total, weight.bits_as(total.kind), activation.bits_as(total.kind))
    if target.dot == "sdot":
        lanes = total.lanes
        name = f"llvm.aarch64.neon.sdot.v{lanes}i32.v{4 * lanes}i8"
        return function.call(name, total.kind, total, weight, activation)
    if target.dot == "maddubs":
        return total + _madd(function, target, bits, weight, activation)
    return total + _plain(bits, weight, activation)


def _plain(bits: int, weight: Value, activation: Value) -> Value:
    """Instructions that every processor has: even and odd bytes apart in 16 bits, where two products fit."""
    halves, lanes = vector(I16, weight.lanes // 2), vector(I32, weight.lanes // 4)
    weights, activations = weight.bits_as(halves), activation.bits_as(halves)
    odd = weights.shift_signed(8)
    even = weights & 255 if bits == 4 else (weights << 8).shift_signed(8)
    pairs = even * (activations << 8).shift_signed(8) + odd * activations.shift_signed(8)
    quads = pairs.bits_as(lanes)
    return (quads << 16).shift_signed(16) + quads.shift_signed(16)


def _madd(function: Function, target: Target, bits: int, weight: Value, activation: Value) -> Value:
    """AVX2 and AVX-512 without VNNI: unsigned · signed bytes to 16 bits, then pairs of these to 32."""
    if bits == 8:  # |weight| · (activation with the weight's sign)
        is_negative = weight.compare("<", 0)
        activation = function.select(is_negative, 0 - activation, activation)
        weight = function.select(is_negative, 0 - weight, weight)
    halves, lanes = vector(I16, weight.lanes // 2), vector(I32, weight.lanes // 4)
    ones = function.constant(1, halves)
    if target.register_bytes == 64:
        pairs = function.call("llvm.x86.avx512.pmaddubs.w.512", halves, weight, activation)
        return function.call("llvm.x86.avx512.pmaddw.d.512", lanes, pairs, ones)
    pairs = function.call("llvm.x86.avx2.pmadd.ub.sw", halves, weight, activation)
    return function.call("llvm.x86.avx2.pmadd.wd", lanes, pairs, ones)


def nibbles(function: Function, packed: Value) -> tuple[Value, Value]:
    """Bytes of two unsigned nibbles → the low ones and the high ones, each 0 … 15."""
    low = packed & 15
    words = packed.bits_as(vector(I16, packed.lanes // 2))  # bytes have no shift of their own
    high = (words >> 4).bits_as(vector(I8, packed.lanes)) & 15
    return low, high
