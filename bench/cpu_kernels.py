"""Time the CPU kernels at the true shapes of Qwen-VL, against the memory bandwidth measured in the same run.

    python bench/cpu_kernels.py [gemv] [int3] [token] [attention] [--threads 1 2] [--realtime]

Weights come from a pool much larger than the caches. Reading the same bytes and the kernel are timed in turns, so that
a change of the machine's speed affects both; shares are ratios of medians. A table, then one JSON document as the last
line.
"""

from __future__ import annotations

import itertools

import harness
import numpy as np
from harness import interleave, print_row

from qvl_kernels.cpu import CpuOps, features
from qvl_kernels.cpu.arrays import CpuCache
from qvl_kernels.cpu.measure import read_seconds
from qvl_kernels.cpu.runner import aligned
from qvl_kernels.ops import Norm
from qvl_kernels.packing import Matrix, packed_shapes

HIDDEN, FFN, LAYERS, HEADS, VOCABULARY = 4096, 11008, 32, 32, 151936
GEMV_SHAPES = ((22016, HIDDEN), (HIDDEN, FFN), (3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN))


class Weights:
    """Packed matrices in one pool of random bytes, with small constant scales."""

    def __init__(self, nbytes: int):
        self.pool = aligned(nbytes)
        piece = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
        for begin in range(0, nbytes, len(piece)):
            self.pool[begin : begin + len(piece)] = piece[: nbytes - begin]
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = int(np.prod(shape)) * dtype.itemsize
        if self.used + size > len(self.pool):
            raise MemoryError("the pool is used up")
        array = self.pool[self.used : self.used + size].view(dtype).reshape(shape)
        self.used += -(-size // 64) * 64
        return array

    def matrix(self, n: int, k: int, bits: int = 4, group: int = 128, zeros: bool = False) -> Matrix:
        arrays = {name: self.take(*kind) for name, kind in packed_shapes(n, k, bits, group, zeros=zeros).items()}
        if bits == 16:
            arrays["weight"][:] = 0.01
            return Matrix(n, k, 16, group, arrays["weight"])
        arrays["scales"][:] = 0.002
        if zeros:
            arrays["zeros"][:] = 8
        return Matrix(n, k, bits, group, arrays["qweight"], arrays["scales"], arrays.get("zeros"))


def report(rows: list[dict], row: dict) -> None:
    rows.append(row)
    print_row(row)


def bench_gemv(ops: CpuOps, rows: list[dict], nbytes: int = 1 << 30) -> None:
    """One vector by int4 (symmetric and asymmetric), int8 and fp16 weights."""
    for n, k in GEMV_SHAPES:
        for label, bits, zeros in (
            ("int4", 4, False),
            ("int4 asymmetric", 4, True),
            ("int8", 8, False),
            ("fp16", 16, False),
        ):
            weights = Weights(nbytes)
            matrices = []
            try:
                while True:
                    matrices.append(ops.weight(weights.matrix(n, k, bits, zeros=zeros)))
            except MemoryError:
                pass
            x, out = np.random.default_rng(1).standard_normal((1, k)).astype(np.float32), ops.empty((1, n))
            replay = ops.capture(lambda ms=matrices, x=x, out=out: [ops.linear(x, m, out=out) for m in ms])
            read = weights.pool[: weights.used]
            seconds = interleave({"read": lambda r=read: read_seconds(ops, r), "gemv": replay}, 7)
            report(rows, {
                "bench": "gemv", "threads": ops.threads, "weights": label, "n": n, "k": k,
                "GB/s": weights.used / seconds["gemv"] / 1e9, "read GB/s": weights.used / seconds["read"] / 1e9,
                "share": seconds["read"] / seconds["gemv"], "others": seconds["others"],
            })  # fmt: skip


def bench_int3(ops: CpuOps, rows: list[dict], nbytes: int = 200 << 20) -> None:
    """int3 and int4 weights by the same rows of activations, in turns."""
    n, k = 11008, HIDDEN
    for m in (1, 2, 4, 16, 64, 256):
        x, out = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32), ops.empty((m, n))
        calls, count = {}, nbytes // (n * k // 2) if m <= 16 else 2
        for bits in (3, 4):
            weights = Weights((count + 1) * n * k * bits // 7)
            ws = [ops.weight(weights.matrix(n, k, bits)) for _ in range(count)]
            calls[f"int{bits}"] = ops.capture(lambda ws=ws, x=x, out=out: [ops.linear(x, w, out=out) for w in ws])
            calls[f"read {bits}"] = lambda r=weights.pool[: weights.used]: read_seconds(ops, r)
        seconds = interleave(calls, 9)
        report(rows, {
            "bench": "int3", "threads": ops.threads, "rows": m, "n": n, "k": k,
            **{f"{name} us": 1e6 * seconds[name] / count for name in calls}, "others": seconds["others"],
        })  # fmt: skip


class Token:
    """A decoder step of the true size over `Ops`, with random weights."""

    def __init__(self, ops: CpuOps, context: int, kind: str):
        self.weights = Weights(3_750_000_000)
        take = lambda n, k: ops.weight(self.weights.matrix(n, k))  # noqa: E731
        self.layers = [
            (take(3 * HIDDEN, HIDDEN), take(HIDDEN, HIDDEN), take(FFN, HIDDEN), take(FFN, HIDDEN), take(HIDDEN, FFN))
            for _ in range(LAYERS)
        ]
        head, norm = take(VOCABULARY, HIDDEN), Norm(np.ones(HIDDEN, np.float32), None, 1e-6)
        self.cache = CpuCache(LAYERS, HEADS, HIDDEN // HEADS, context + 16, kind)
        # Pages that were never written share one zero page, and reading them would cost nothing.
        self.cache.keys[:], self.cache.values[:], self.cache.scales[:] = 1, 1, 0.01
        rope, logn = np.ones((context + 16, HIDDEN // HEADS), np.float32), np.ones(context + 16, np.float32)
        start, h = (
            np.array([context], np.int32),
            np.random.default_rng(2).standard_normal((1, HIDDEN)).astype(np.float32),
        )
        qkv, mixed, gated, logits = (ops.empty((1, n)) for n in (3 * HIDDEN, HIDDEN, FFN, VOCABULARY))
        chosen = ops.empty((1,), np.int32)

        def step() -> None:
            for index, (w_qkv, w_out, w_gate, w_up, w_down) in enumerate(self.layers):
                ops.linear(h, w_qkv, out=qkv, norm=norm)
                ops.rope_append(qkv, rope=rope, logn=logn, cache=self.cache, layer=index, start=start)
                ops.cached_attention(qkv, self.cache, index, start, out=mixed)
                ops.linear(mixed, w_out, out=h, residual=h)
                ops.gate_up(h, w_gate, w_up, out=gated, norm=norm)
                ops.linear(gated, w_down, out=h, residual=h)
            ops.linear(h, head, out=logits, norm=norm)
            ops.argmax(logits, out=chosen)

        self.replay = ops.capture(step)
        self.bytes = self.weights.used + self.cache.nbytes * context // (context + 16)


def bench_token(ops: CpuOps, rows: list[dict]) -> None:
    """A whole token, in bytes a second of weights and cache against reading the weights."""
    for context, kind in ((512, "fp16"), (8000, "int8")):
        token = Token(ops, context, kind)
        weights = token.weights
        read = weights.pool[: weights.used]
        seconds = interleave({"read": lambda r=read: read_seconds(ops, r), "token": token.replay}, 7)
        report(rows, {
            "bench": "token", "threads": ops.threads, "context": context, "cache": kind, "GB": token.bytes / 1e9,
            "tokens/s": 1 / seconds["token"], "GB/s": token.bytes / seconds["token"] / 1e9,
            "read GB/s": weights.used / seconds["read"] / 1e9,
            "share": seconds["read"] / weights.used * token.bytes / seconds["token"], "others": seconds["others"],
        })  # fmt: skip


def bench_attention(ops: CpuOps, rows: list[dict]) -> None:
    """Decode attention alone, against reading the cache: each head with keys of its own, and groups of four."""
    for kv_heads, context, kind in itertools.product((HEADS, HEADS // 4), (2048, 8192), ("fp16", "int8")):
        cache = CpuCache(8 * HEADS // kv_heads, kv_heads, HIDDEN // HEADS, context, kind)
        cache.keys[:], cache.values[:], cache.scales[:] = 1, 1, 0.01
        qkv = np.ones((1, (HEADS + 2 * kv_heads) * (HIDDEN // HEADS)), np.float32)
        out, start = ops.empty((1, HIDDEN)), np.array([context - 1], np.int32)

        def attend(cache=cache, qkv=qkv, start=start, out=out):
            for layer in range(cache.layers):
                ops.cached_attention(qkv, cache, layer, start, out=out)

        def read(cache=cache):
            return read_seconds(ops, cache.keys) + read_seconds(ops, cache.values)

        seconds = interleave({"read": read, "attention": ops.capture(attend)}, 15)
        vectors = cache.keys.nbytes + cache.values.nbytes
        report(rows, {
                "bench": "attention", "threads": ops.threads, "kv heads": kv_heads, "context": context, "cache": kind,
                "GB/s": cache.nbytes / seconds["attention"] / 1e9, "read GB/s": vectors / seconds["read"] / 1e9,
                "share": cache.nbytes / seconds["attention"] * seconds["read"] / vectors, "others": seconds["others"],
            })  # fmt: skip


BENCHES = {"gemv": bench_gemv, "int3": bench_int3, "token": bench_token, "attention": bench_attention}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("what", nargs="*", choices=[*BENCHES, []], help="all by default")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, CpuOps().threads])
    harness.add_timing(parser)
    arguments = parser.parse_args()
    if arguments.realtime:
        harness.take_processors()
    rows: list[dict] = []
    for threads in sorted(set(arguments.threads)):
        ops = CpuOps(threads=threads)
        for name in arguments.what or BENCHES:
            BENCHES[name](ops, rows)
    harness.print_document(level=features.selected().name, results=rows)


if __name__ == "__main__":
    main()
