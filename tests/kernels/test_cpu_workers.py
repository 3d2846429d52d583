"""Threads that share a program: every chunk once, in order of operations, whatever the threads do."""

from __future__ import annotations

import itertools
import os
import threading

import numpy
import pytest

pytest.importorskip("llvmlite")

from chatglm.kernels.cpu.emitter import I32, I64, POINTER, Function, Module
from chatglm.kernels.cpu.jit import Compiler, host_targets
from chatglm.kernels.cpu.workers import Operation, Program, Workers


def count_chunk(module: Module) -> None:
    """Kernel: adds one to counts[chunk]; with a second field, first adds what stands in before[0] there."""
    function = Function(module, "count_chunk", [POINTER, I64])
    arguments, chunk = function.arguments
    counts, before = function.load(arguments, POINTER), function.load(arguments, POINTER, 1)
    place = function.at(counts, chunk, I32)
    function.atomic_add(place, function.load(before, I32) + 1)
    function.close()


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    return Compiler(host_targets()[0])


@pytest.fixture(scope="module")
def kernel(compiler: Compiler) -> int:
    return compiler.compile("a test's kernel", ("count_chunk",), count_chunk)["count_chunk"]


def chain(kernel: int, operations: int, chunks: int) -> tuple[Program, list[numpy.ndarray]]:
    """Operations that each add one to what the operation before left in its last chunk."""
    counts = [numpy.zeros(chunks, dtype=numpy.int32) for _ in range(operations + 1)]
    made = []
    for before, after in itertools.pairwise(counts):
        fields = numpy.array([after.ctypes.data, before.ctypes.data + 4 * (chunks - 1)], dtype=numpy.int64)
        made.append(Operation(kernel, fields, chunks))
    return Program(made, counts), counts


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("parks", [False, True])
def test_every_chunk_runs_once_and_after_the_operation_before(
    compiler: Compiler, kernel: int, threads: int, parks: bool
) -> None:
    workers = Workers(compiler, threads, parks=parks)
    for chunks in (1, 2, 37):
        program, counts = chain(kernel, 50, chunks)
        for turn in range(1, 20):
            for array in counts:
                array[:] = 0
            workers.run(program)
            for number, array in enumerate(counts):
                assert (array == number).all(), (turn, number)


def test_a_part_of_a_program_runs_alone(compiler: Compiler, kernel: int) -> None:
    program, counts = chain(kernel, 6, 3)
    Workers(compiler, 2).run(program, 2, 4)
    assert [int(array.sum()) for array in counts] == [0, 0, 0, 3, 6, 0, 0]


def test_callers_in_several_threads_take_turns(compiler: Compiler, kernel: int) -> None:
    workers = Workers(compiler, 3)
    programs = [chain(kernel, 20, 7) for _ in range(4)]

    def call(program: Program) -> None:
        for _ in range(5):
            workers.run(program)

    threads = [threading.Thread(target=call, args=(program,)) for program, _ in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, counts in programs:
        assert (counts[1] == 5).all()
        assert (counts[2] == 1 + 2 + 3 + 4 + 5 + 5).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python warns of threads at every fork
def test_a_forked_process_has_threads_of_its_own(compiler: Compiler, kernel: int) -> None:
    workers = Workers(compiler, 2)
    program, counts = chain(kernel, 5, 9)
    workers.run(program)
    child = os.fork()
    if not child:
        for array in counts:
            array[:] = 0
        workers.run(program)
        os._exit(0 if (counts[-1] == 5).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    for array in counts:
        array[:] = 0
    workers.run(program)
    assert (counts[-1] == 5).all()


def test_threads_end_with_their_workers(compiler: Compiler, kernel: int) -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("chatglm kernels 7")]

    for parks in (False, True):
        workers = Workers(compiler, 8, parks=parks)
        workers.run(chain(kernel, 2, 2)[0])
        mine = [thread for thread in threading.enumerate() if thread.name == "chatglm kernels 7"]
        assert mine
        del workers
        for thread in mine:
            thread.join(timeout=60)
        assert not names()
