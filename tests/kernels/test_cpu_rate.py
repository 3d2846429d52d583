"""The rate test really does the products that it counts."""

from __future__ import annotations

import numpy
import pytest

pytest.importorskip("llvmlite")

from chatglm.kernels.cpu import kernel_kit, rate, worker_threads
from chatglm.kernels.cpu.jit import Compiler, host_targets
from chatglm.kernels.cpu.workers import Operation, Program


@pytest.mark.parametrize("target", host_targets(), ids=lambda target: target.name)
def test_every_counted_product_is_in_the_result(target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "TURNS", 10)
    compiler = Compiler(target)
    kernel = compiler.compile("ten turns", ("k",), lambda module: rate.dot_loop(module, "k", target))["k"]
    memory = numpy.zeros((rate.REGISTERS, target.lanes), dtype=numpy.int32)
    codes = memory.view(numpy.int8)
    codes[0], codes[1] = 3, 5  # the weights of even and odd turns
    codes[2:] = numpy.arange(rate.SUMS)[:, None]
    worker_threads(1).run(Program([Operation(kernel, numpy.array([memory.ctypes.data], dtype=numpy.int64), 1)], memory))
    products = 5 * (3 + 5) * 4 * sum(range(rate.SUMS))  # ten turns, four products a lane
    assert memory[0].tolist() == [products + sum(range(rate.SUMS))] * target.lanes  # each sum starts at its number


def test_a_rate_is_a_number_of_operations() -> None:
    assert rate.dot_operations_per_s(kernel_kit(), worker_threads(1), repeats=1) > 0
