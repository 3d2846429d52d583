"""One INT4 matrix of ChatGLM-6B's shape through libraries that a reader can install, beside the native kernels.

    pip install onnx onnxruntime
    python benchmarks/cpu_libraries.py --out benchmarks/results/cpu-libraries-zen4.json

Six distinct matrices in turn, so that nothing is read from a cache twice. One token is told in GB/s of stored weights,
many tokens in operations a second. A library that is absent is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

ROWS, COLUMNS, GROUP, MATRICES, THREADS = 4096, 4096, 128, 6, 2

Run = Callable[[int], None]
"""Runs matrix number n over the tokens that it was made for."""


def native(tokens: int) -> Run:
    from chatglm.config import ModelConfig
    from chatglm.kernels.cpu import kernel_kit, worker_threads
    from chatglm.kernels.cpu.attention import Heads
    from chatglm.kernels.cpu.formats import Matrix
    from chatglm.kernels.cpu.passes import Pass, padded
    from chatglm.kernels.cpu.weights import Weight
    from chatglm.kernels.cpu.workers import Program

    matrix = Matrix(COLUMNS, 4, GROUP, False)
    hidden, out = torch.randn(padded(tokens), COLUMNS), torch.empty(padded(tokens), ROWS)
    programs = []
    for _ in range(MATRICES):
        codes = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8)
        scale = torch.rand(ROWS, COLUMNS // GROUP).half()
        weight = Weight(matrix, COLUMNS, ROWS, codes, scale, torch.zeros(ROWS))
        emitted = Pass(kernel_kit(), ModelConfig(), Heads(32, 128, 2, True, "float16"), tokens)
        emitted.linear(weight, hidden, out)
        programs.append(Program(emitted.operations, emitted))
    workers = worker_threads(THREADS)
    return lambda number: workers.run(programs[number])


def onnx_matmul_nbits(tokens: int, block: int, accuracy: int) -> Run:
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    sessions = []
    for _ in range(MATRICES):
        codes = numpy.random.randint(0, 256, (ROWS, COLUMNS // block, block // 2), dtype=numpy.uint8)
        scales = numpy.random.rand(ROWS * COLUMNS // block).astype(numpy.float32)
        node = helper.make_node(
            "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
            K=COLUMNS, N=ROWS, bits=4, block_size=block, accuracy_level=accuracy,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, COLUMNS])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, ROWS])],
            [numpy_helper.from_array(codes, "w"), numpy_helper.from_array(scales, "s")],
        )
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]))
    hidden = numpy.random.randn(tokens, COLUMNS).astype(numpy.float32)
    return lambda number: sessions[number].run(None, {"x": hidden})


def torch_int4pack(tokens: int) -> Run:
    packed, scales = [], []
    for _ in range(MATRICES):
        codes = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.int32)
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scales.append(torch.rand(COLUMNS // GROUP, ROWS, 2, dtype=torch.bfloat16))
    hidden = torch.randn(tokens, COLUMNS, dtype=torch.bfloat16)
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda number: run(hidden, packed[number], GROUP, scales[number])


def torch_dynamic_int8(tokens: int) -> Run:
    """INT8 weights, activations rounded on the way, by torch's own engine for quantised linears."""
    from torch.ao.nn.quantized import dynamic

    linears = []
    for _ in range(MATRICES):
        linear = dynamic.Linear(COLUMNS, ROWS)
        zeros = torch.zeros(ROWS, dtype=torch.int64)
        weight = torch.quantize_per_channel(
            torch.randn(ROWS, COLUMNS), torch.full((ROWS,), 0.03), zeros, 0, torch.qint8
        )
        linear.set_weight_bias(weight, torch.zeros(ROWS))
        linears.append(linear)
    hidden = torch.randn(tokens, COLUMNS)
    wanted = hidden @ weight.dequantize().T
    error = float((linears[-1](hidden) - wanted).norm() / wanted.norm())
    assert error < 0.05, f"it computes something else: relative error {error}"
    return lambda number: linears[number](hidden)


def torch_int8_product(tokens: int) -> Run:
    weights = [torch.randint(-127, 128, (COLUMNS, ROWS), dtype=torch.int8) for _ in range(MATRICES)]
    hidden = torch.randint(-127, 128, (tokens, COLUMNS), dtype=torch.int8)
    return lambda number: torch._int_mm(hidden, weights[number])


def torch_dequantised(tokens: int) -> Run:
    from chatglm.quantization import GroupQuantizedLinear

    linears = []
    for _ in range(MATRICES):
        linear = GroupQuantizedLinear(COLUMNS, ROWS, 4, GROUP)
        linear.weight.random_(0, 256)
        linear.weight_scale.uniform_()
        linears.append(linear)
    hidden = torch.randn(tokens, COLUMNS)
    return lambda number: linears[number](hidden)


WAYS: dict[str, tuple[float, Callable[[int], Run]]] = {
    "native kernels, INT4 group 128": (4 + 16 / 128, native),
    "ONNX Runtime MatMulNBits, block 128, accuracy 4": (4 + 32 / 128, lambda n: onnx_matmul_nbits(n, 128, 4)),
    "ONNX Runtime MatMulNBits, block 32, accuracy 4": (4 + 32 / 32, lambda n: onnx_matmul_nbits(n, 32, 4)),
    "torch _weight_int4pack_mm, group 128, bf16": (4 + 32 / 128, torch_int4pack),
    "torch dynamic INT8 linear": (8, torch_dynamic_int8),
    "torch _int_mm (product alone)": (8, torch_int8_product),
    "dequantise, then multiply (the slow twin)": (4 + 16 / 128, torch_dequantised),
}
"""Bits a weight that are read, and how it is made."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    chosen = parser.parse_args()
    torch.set_num_threads(THREADS)
    results = {}
    for name, (bits, make) in WAYS.items():
        facts = {}
        for tokens in (1, 512):
            try:
                run = make(tokens)
                seconds = measure(run, rounds=8 if tokens == 1 else 1)
            except Exception as error:  # absent, or no kernel for this machine: told, not fatal
                facts[f"{tokens} tokens"] = str(error).splitlines()[0][:100]
                continue
            facts[f"{tokens} tokens"] = {
                "ms": round(1e3 * seconds, 3),
                "weights_GB_per_s": round(ROWS * COLUMNS * bits / 8 / seconds / 1e9, 2),
                "TOP_per_s": round(2 * tokens * ROWS * COLUMNS / seconds / 1e12, 4),
            }
        results[name] = facts
        print(name, json.dumps(facts), file=sys.stderr, flush=True)
    from cpu_model import machine

    text = json.dumps({"machine": machine(), "shape": [ROWS, COLUMNS], "results": results}, indent=1) + "\n"
    Path(chosen.out).write_text(text) if chosen.out else print(text)


def measure(run: Run, rounds: int) -> float:
    """Median seconds of one matrix; the first round does not count."""
    for number in range(MATRICES):
        run(number)
    times = []
    for _ in range(rounds):
        for number in range(MATRICES):
            begin = time.perf_counter()
            run(number)
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
