"""Compare int4 products with the kernels of onnxruntime, OpenVINO and PyTorch (if installed), in turns.

    pip install onnx onnxruntime openvino torch
    python bench/cpu_peers.py [--threads 2] [--rounds 7] [--realtime]

Groups of 128, symmetric. Every call multiplies several matrices that are larger than the caches together. M = 1 is
reported in bytes of codes and scales a second, M = 256 in operations a second. Activations: ours 16 bits at M = 1 and 8
bits with a scale for 32 at M = 256; onnxruntime's 8 bits (accuracy level 4), OpenVINO's 8 bits with a scale for 128,
PyTorch's bf16. A table, then one JSON document as the last line.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import harness
import numpy as np
from cpu_gemm import peak
from cpu_kernels import FFN, HIDDEN, Weights
from harness import interleave

from qvl_kernels.cpu import CpuOps
from qvl_kernels.cpu.measure import read_seconds

SHAPES, COUNT, GROUP = ((2 * FFN, HIDDEN), (HIDDEN, FFN)), 6, 128
Call = Callable[[], object]


def silent(call: Call) -> Callable[[], None]:
    """A call that returns nothing, as `interleave` takes a result for seconds."""

    def run() -> None:
        call()

    return run


def codes(n: int, k: int) -> np.ndarray:
    """Random bytes, two codes each, [n, k / 2]."""
    return np.resize(np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8), (n, k // 2))


def ours(n: int, k: int, m: int, threads: int) -> Call:
    ops, pool = CpuOps(threads=threads), Weights(COUNT * (n * k // 2 + n * k // 64 + 4096))
    matrices = [ops.weight(pool.matrix(n, k)) for _ in range(COUNT)]
    x, out = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32), ops.empty((m, n))
    return ops.capture(lambda: [ops.linear(x, w, out=out) for w in matrices])


def onnxruntime(n: int, k: int, m: int, threads: int) -> Call:
    """MatMulNBits with int8 activations."""
    import onnx
    import onnxruntime as ort

    nodes, held, outputs = [], [], []
    packed, scales = codes(n, k).reshape(n, k // GROUP, GROUP // 2), np.full(n * k // GROUP, 0.002, np.float32)
    for i in range(COUNT):
        held += [onnx.numpy_helper.from_array(packed, f"w{i}"), onnx.numpy_helper.from_array(scales, f"s{i}")]
        attributes = {"K": k, "N": n, "bits": 4, "block_size": GROUP, "accuracy_level": 4, "domain": "com.microsoft"}
        nodes.append(onnx.helper.make_node("MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], **attributes))
        outputs.append(onnx.helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, [m, n]))
    x_info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [m, k])
    graph = onnx.helper.make_graph(nodes, "products", [x_info], outputs, held)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    return lambda: session.run(None, {"x": x})


def openvino(n: int, k: int, m: int, threads: int) -> Call:
    """Compressed weights with dynamically quantized activations."""
    import openvino as ov
    from openvino import opset13 as op

    x, outputs = op.parameter([m, k], ov.Type.f32), []
    packed = codes(n, k).reshape(-1)  # a constant borrows the memory it is made of
    eight = np.array([0x88], np.uint8)
    for _ in range(COUNT):
        w = op.constant(ov.Tensor(packed, ov.Shape([n, k // GROUP, GROUP]), ov.Type.u4))
        zero = op.constant(ov.Tensor(eight, ov.Shape([1, 1, 1]), ov.Type.u4))
        scale = op.constant(np.full((n, k // GROUP, 1), 0.002, np.float16))
        w = op.multiply(op.subtract(op.convert(w, "f16"), op.convert(zero, "f16")), scale)
        w = op.convert(op.reshape(w, np.array([n, k]), False), "f32")
        outputs.append(op.matmul(x, w, False, True))
    settings = {"INFERENCE_NUM_THREADS": threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP}
    compiled = ov.compile_model(ov.Model(outputs, [x]), "CPU", settings)
    request = compiled.create_infer_request()
    values = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
    return lambda held=(packed, eight): request.infer({0: values})


def torch_int4(n: int, k: int, m: int, threads: int) -> Call:
    """The int4 product of PyTorch, bf16 activations."""
    import torch

    torch.set_num_threads(threads)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    scales = torch.full((k // GROUP, n, 2), 0.002, dtype=torch.bfloat16)
    unpacked = torch.from_numpy(np.resize(codes(n, k) & 15, (n, k)).astype(np.int32))
    matrices = [packed(unpacked, 2) for _ in range(COUNT)]
    x, multiply = torch.randn(m, k, dtype=torch.bfloat16), torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda: [multiply(x, w, GROUP, scales) for w in matrices]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    harness.add_timing(parser, rounds=7)
    arguments = parser.parse_args()
    rows, ops = [], CpuOps(threads=arguments.threads)
    memory = Weights(1 << 30).pool
    for m in (1, 256):
        for n, k in SHAPES:
            calls: dict[str, Call] = {}
            for make in (ours, onnxruntime, openvino, torch_int4):
                try:
                    calls[make.__name__] = silent(make(n, k, m, arguments.threads))
                except ImportError as error:
                    print(f"left out: {error}")
            if arguments.realtime:
                harness.take_processors()
            limit = {"read": lambda: read_seconds(ops, memory)} if m == 1 else {"peak": peak(ops, bits=4)}
            seconds = interleave(limit | calls, arguments.rounds)
            work = COUNT * (n * k // 2 + n * k // 64 if m == 1 else 2 * m * n * k) / 1e9
            row: dict = {"m": m, "n": n, "k": k, "unit": "GB/s" if m == 1 else "GOP/s"}
            row["machine"] = memory.nbytes / seconds["read"] / 1e9 if m == 1 else 1e3 / seconds["peak"]
            row |= {name: work / seconds[name] for name in calls}
            rows.append(row)
            harness.print_row(row)
    harness.print_document(threads=arguments.threads, results=rows)


if __name__ == "__main__":
    main()
