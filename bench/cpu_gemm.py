"""Time products of several rows, a prompt and a picture on the CPU, and measure the errors of their activations.

    python bench/cpu_gemm.py [products] [few] [prompt] [image] [errors] [--threads 2] [--rounds 5]

The machine's int8 peak (products from registers) is measured in turns with everything else; shares are ratios of
medians. Products of 1 to 16 rows are those of a step of so many answers, by weights that are larger than the caches. A
prompt is 512 tokens through 32 decoder layers of the true size, with norms, rotation and attention but without the
head; an image is 1024 patches through the 48 layers of the vision transformer. 4 layers are timed, with one set of
weights that is larger than the caches. With one thread the CPU time counts, so that other programs matter only by the
caches they use. A table, then one JSON document as the last line.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import harness
import numpy as np
from cpu_kernels import FFN, HEADS, HIDDEN, LAYERS, Weights, report
from harness import interleave

from qvl_kernels.cpu import CpuOps, features
from qvl_kernels.cpu.measure import products_per_second
from qvl_kernels.ops import Norm
from qvl_kernels.packing import pack
from qvl_kernels.reference import ReferenceOps
from qvl_kernels.reference.functions import attention, erf_gelu

VISION, VISION_HEADS, VISION_FFN, VISION_LAYERS, PATCHES = 1664, 16, 8192, 48, 1024
PRODUCTS = (
    ("int4", 4, "int8", 2 * FFN, HIDDEN, 256),
    ("int4", 4, "int8", HIDDEN, FFN, 256),
    ("int4", 4, "int8", 2 * FFN, HIDDEN, 64),
    ("int4", 4, "int16", 2 * FFN, HIDDEN, 256),
    ("int8", 8, "int8", VISION_FFN, VISION, PATCHES),
    ("int8", 8, "int8", VISION, VISION_FFN, PATCHES),
    ("fp16", 16, "int8", HIDDEN, HIDDEN, 256),
)


FEW, FEW_SHAPES = (1, 2, 4, 8, 16), (("int4", 4, 9728, 2560), ("int4", 4, 2560, 9728), ("int8", 8, 30000, 2560))
TIMED_LAYERS = 4


def timed(ops: CpuOps, call: Callable[[], object], factor: float = 1) -> Callable[[], float]:
    """A call for `interleave` that returns its own seconds, multiplied by `factor`."""
    clock = time.thread_time if ops.threads == 1 else time.perf_counter

    def run() -> float:
        begin = clock()
        call()
        return (clock() - begin) * factor

    return run


def peak(ops: CpuOps, bits: int) -> Callable[[], float]:
    """The seconds of 1e12 operations at the peak rate of products with weights of `bits`."""
    return lambda: 1e12 / products_per_second(ops, min(bits, 8), rounds=500_000)


def bench_products(threads: int, rounds: int, rows: list[dict]) -> None:
    for label, bits, activations, n, k, m in PRODUCTS:
        ops = CpuOps(threads=threads, activations=activations)
        w = ops.weight(Weights(n * k * bits // 8 + n * k // 32 + (1 << 20)).matrix(n, k, bits))
        x, out = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32), ops.empty((m, n))
        call = ops.capture(lambda ops=ops, x=x, w=w, out=out: ops.linear(x, w, out=out))
        seconds = interleave({"peak": peak(ops, bits), "product": timed(ops, call)}, rounds)
        rate = 2e-9 * m * n * k / seconds["product"]
        report(rows, {
            "bench": "product", "threads": threads, "weights": label, "activations": activations, "m": m, "n": n,
            "k": k, "GOP/s": rate, "peak GOP/s": 1e3 / seconds["peak"], "share": rate * seconds["peak"] / 1e3,
            "others": seconds["others"],
        })  # fmt: skip


def bench_few(threads: int, rounds: int, rows: list[dict]) -> None:
    ops, rng = CpuOps(threads=threads), np.random.default_rng(0)
    for label, bits, n, k in FEW_SHAPES:
        weights, calls = Weights(160 << 20), {}
        matrices = [ops.weight(weights.matrix(n, k, bits)) for _ in range((150 << 20) // (n * k * bits // 8))]
        for m in FEW:
            x, out = rng.standard_normal((m, k)).astype(np.float32), ops.empty((m, n))
            calls[str(m)] = ops.capture(lambda ws=matrices, x=x, out=out: [ops.linear(x, w, out=out) for w in ws])
        seconds = interleave(calls, rounds)
        for m in FEW:
            a_product = seconds[str(m)] / len(matrices)
            report(rows, {
                "bench": "few", "threads": threads, "weights": label, "m": m, "n": n, "k": k, "ms": 1e3 * a_product,
                "GOP/s": 2e-9 * m * n * k / a_product, "times one row": seconds[str(m)] / seconds["1"],
                "others": seconds["others"],
            })  # fmt: skip


def bench_prompt(threads: int, rounds: int, rows: list[dict], tokens: int = 512) -> None:
    weights = Weights(130 << 20)
    ops = CpuOps(threads=threads)
    qkv_w, out_w, gate, up, down = (
        ops.weight(weights.matrix(n, k))
        for n, k in ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))
    )
    cache, norm = ops.kv_cache(1, HEADS, HIDDEN // HEADS, tokens, "fp16"), Norm(np.ones(HIDDEN, np.float32), None, 1e-6)
    rope = np.random.default_rng(1).random((tokens, HIDDEN // HEADS)).astype(np.float32)
    logn, start = np.ones(tokens, np.float32), np.zeros(1, np.int32)
    h = np.random.default_rng(2).standard_normal((tokens, HIDDEN)).astype(np.float32)
    qkv, mixed, gated, after = (ops.empty((tokens, n)) for n in (3 * HIDDEN, HIDDEN, FFN, HIDDEN))

    def attend() -> None:
        for _ in range(TIMED_LAYERS):
            ops.cached_attention(qkv, cache, 0, start, out=mixed)

    def layers() -> None:
        for _ in range(TIMED_LAYERS):
            ops.linear(h, qkv_w, out=qkv, norm=norm)
            ops.rope_append(qkv, rope=rope, logn=logn, cache=cache, layer=0, start=start)
            ops.cached_attention(qkv, cache, 0, start, out=mixed)
            ops.linear(mixed, out_w, out=after, residual=h)
            ops.gate_up(after, gate, up, out=gated, norm=norm)
            ops.linear(gated, down, out=after, residual=h)

    factor = LAYERS / TIMED_LAYERS
    calls = {"prompt": timed(ops, ops.capture(layers), factor), "attention": timed(ops, ops.capture(attend), factor)}
    seconds = interleave({"peak": peak(ops, 4), **calls}, rounds)
    operations = 2 * tokens * LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    report(rows, {
        "bench": "prompt", "threads": threads, "tokens": tokens, "seconds": seconds["prompt"],
        "tokens/s": tokens / seconds["prompt"], "of it attention": seconds["attention"],
        "peak GOP/s": 1e3 / seconds["peak"], "share": operations / seconds["prompt"] * seconds["peak"] / 1e12,
        "others": seconds["others"],
    })  # fmt: skip


def bench_image(threads: int, rounds: int, rows: list[dict]) -> None:
    weights = Weights(60 << 20)
    ops = CpuOps(threads=threads)
    qkv_w, out_w, up, down = (
        ops.weight(weights.matrix(n, k, 8))
        for n, k in ((3 * VISION, VISION), (VISION, VISION), (VISION_FFN, VISION), (VISION, VISION_FFN))
    )
    norm = Norm(np.ones(VISION, np.float32), np.zeros(VISION, np.float32), 1e-6)
    h = np.random.default_rng(0).standard_normal((PATCHES, VISION)).astype(np.float32)
    qkv, mixed, wide, after = (ops.empty((PATCHES, n)) for n in (3 * VISION, VISION, VISION_FFN, VISION))

    def attend() -> None:
        for _ in range(TIMED_LAYERS):
            ops.vision_attention(qkv, VISION_HEADS, out=mixed)

    def layers() -> None:
        for _ in range(TIMED_LAYERS):
            ops.linear(h, qkv_w, out=qkv, norm=norm)
            ops.vision_attention(qkv, VISION_HEADS, out=mixed)
            ops.linear(mixed, out_w, out=after, residual=h)
            ops.linear(after, up, out=wide, norm=norm, activation="gelu")
            ops.linear(wide, down, out=after, residual=h)

    factor = VISION_LAYERS / TIMED_LAYERS
    calls = {"image": timed(ops, ops.capture(layers), factor), "attention": timed(ops, ops.capture(attend), factor)}
    seconds = interleave({"peak": peak(ops, 8), **calls}, rounds)
    operations = 2 * PATCHES * VISION_LAYERS * (4 * VISION * VISION + 2 * VISION * VISION_FFN)
    report(rows, {
        "bench": "image", "threads": threads, "seconds": seconds["image"], "of it attention": seconds["attention"],
        "peak GOP/s": 1e3 / seconds["peak"], "share": operations / seconds["image"] * seconds["peak"] / 1e12,
        "others": seconds["others"],
    })  # fmt: skip


def bench_errors(threads: int, rounds: int, rows: list[dict]) -> None:
    """Relative errors that come from quantized activations alone (same weights), and of attention."""
    rng, n, k, m = np.random.default_rng(0), 1024, 2048, 64

    def outliers(factor: float) -> np.ndarray:
        x = rng.standard_normal((m, k)).astype(np.float32)
        x[:, rng.choice(k, 3, False)] *= factor
        return x

    inputs = {
        "normal": rng.standard_normal((m, k)).astype(np.float32),
        "3 channels x100": outliers(100),
        "3 channels x1000": outliers(1000),
        "after GELU": erf_gelu(2 * rng.standard_normal((m, k)).astype(np.float32)),
        "silu(a) * b": np.prod([rng.standard_normal((m, k)) for _ in range(3)], 0).astype(np.float32),
    }
    for bits in (4, 8):
        limit = {4: 7, 8: 127}[bits]
        values = rng.standard_normal((n, k // 128, 128)).astype(np.float32)
        scales = np.abs(values).max(-1, keepdims=True) / limit
        codes = (np.rint(values / scales) + limit + 1).astype(np.uint8).reshape(n, k)
        matrix = pack(codes, scales[..., 0], bits, 128)
        for name, x in inputs.items():
            want, row = np.empty((m, n), np.float32), {"bench": "error", "weights": f"int{bits}", "inputs": name}
            ReferenceOps().linear(x, matrix, out=want)
            for activations in ("int8", "int16"):
                ops = CpuOps(threads=threads, activations=activations)
                out = ops.empty((m, n))
                ops.linear(x, ops.weight(matrix), out=out)
                row[activations] = float(np.linalg.norm(out - want) / np.linalg.norm(want))
            report(rows, row)
    ops, d = CpuOps(threads=threads), VISION // VISION_HEADS
    qkv = 1.5 * rng.standard_normal((PATCHES, 3 * d)).astype(np.float32)
    out = ops.empty((PATCHES, d))
    ops.vision_attention(qkv, 1, out=out)
    q, key, value = qkv.astype(np.float64).reshape(PATCHES, 3, 1, d).transpose(1, 2, 0, 3)
    want = attention(q, key, value)[:, 0]
    report(rows, {"bench": "error", "vision attention": float(np.linalg.norm(out - want) / np.linalg.norm(want))})


BENCHES = {
    "products": bench_products,
    "few": bench_few,
    "prompt": bench_prompt,
    "image": bench_image,
    "errors": bench_errors,
}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("what", nargs="*", choices=[*BENCHES, []], help="all by default")
    parser.add_argument("--threads", type=int, default=CpuOps().threads)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows: list[dict] = []
    for name in arguments.what or BENCHES:
        BENCHES[name](arguments.threads, arguments.rounds, rows)
    harness.print_document(level=features.selected().name, results=rows)


if __name__ == "__main__":
    main()
