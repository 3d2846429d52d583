"""What the instruction for sums of byte products can do at best: operands in registers, no memory at all.

The limit that a first pass over quantised weights is held against.
"""

from __future__ import annotations

import time

import numpy

from .dot_products import dot
from .emitter import I8, I32, I64, POINTER, Function, Module, Value, Variable, vector
from .kit import Kit
from .target import Target
from .workers import Operation, Program, Workers

TURNS = 200_000
"""Turns of the loop in one chunk: some milliseconds."""

SUMS = 12
"""Sums that do not wait for each other, each of products with other activations."""

REGISTERS = 2 + SUMS
"""What a chunk has in memory: two weights that take turns, and the activations."""


def dot_loop(module: Module, name: str, target: Target) -> None:
    """Kernel: TURNS times SUMS products of registers; what they sum up to is written, so that none may be left out."""
    function = Function(module, name, [POINTER, I64])
    arguments, chunk = function.arguments
    out = function.load(arguments, POINTER)
    lanes, four = target.lanes, vector(I8, target.register_bytes)
    place = chunk * (REGISTERS * lanes)
    activations = [function.load(out, vector(I32, lanes), place + (2 + number) * lanes) for number in range(SUMS)]
    sums = [Variable(function, function.constant(number, vector(I32, lanes))) for number in range(SUMS)]
    with function.loop(TURNS) as turn:  # one weight a turn from the nearest cache: a fixed one would be multiplied once
        weight = function.load(out, vector(I32, lanes), place + lanes * (turn % 2)).bits_as(four) & 15
        for total, activation in zip(sums, activations, strict=True):
            total.set(dot(function, target, 4, total.get(), weight, activation.bits_as(four)))
    result: Value = sums[0].get()
    for total in sums[1:]:
        result = result + total.get()
    function.store(result, out, place)
    function.close()


def dot_operations_per_s(kit: Kit, workers: Workers, repeats: int = 5) -> float:
    """INT8 operations a second of all threads (a product and a sum are two); the best of some runs."""
    kernel = kit.dot_loop()
    chunks = 16 * workers.threads
    out = numpy.ones((chunks, REGISTERS * kit.target.lanes), dtype=numpy.int32)
    program = Program([Operation(kernel, numpy.array([out.ctypes.data], dtype=numpy.int64), chunks)], out)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        workers.run(program)
        seconds.append(time.perf_counter() - begin)
    return 2.0 * chunks * TURNS * SUMS * kit.target.register_bytes / min(seconds)
