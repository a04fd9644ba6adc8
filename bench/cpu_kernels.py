"""Time the CPU kernels at the true shapes of Qwen-VL, against what the machine can read and multiply in the same run.

    python bench/cpu_kernels.py [gemv] [token] [attention] [gemm] [--threads 1 2]

Weights are taken from a pool much larger than the caches, one matrix after another. Reading the same bytes and every
kernel take turns, so that a change of the machine's speed hits all of them; shares are ratios of medians. A table, then
one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date

import numpy as np

from qvl_kernels.cpu import CpuOps, features
from qvl_kernels.cpu.arrays import CpuCache
from qvl_kernels.cpu.measure import products_per_second, read_seconds
from qvl_kernels.cpu.runner import aligned
from qvl_kernels.ops import Norm
from qvl_kernels.packing import Matrix, packed_shapes

HIDDEN, FFN, LAYERS, HEADS, VOCABULARY = 4096, 11008, 32, 32, 151936
GEMV_SHAPES = ((22016, HIDDEN), (HIDDEN, FFN), (3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN))


def busy_seconds() -> float:
    """Processor seconds everybody has used so far (0 where the system does not tell)."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def undisturbed(wanted: bool) -> Iterator[None]:
    """Let no other program take the processors from this one's threads meanwhile (Linux, root)."""
    if not wanted:
        yield
        return
    threads = [thread.native_id for thread in threading.enumerate()]
    for thread in threads:
        os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        for thread in threads:
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


REALTIME = False


def interleave(calls: dict[str, Callable[[], float | None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call (what it returns, if anything, else what it took), all taking turns.

    ``others`` is the number of processors that other programs kept busy meanwhile: on a shared machine it says how
    far the figures can be trusted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    busy, own_busy, since = busy_seconds(), time.process_time(), time.perf_counter()
    with undisturbed(REALTIME):
        for _ in range(rounds):
            for name, call in calls.items():
                begin = time.perf_counter()
                own = call()
                seconds[name].append(time.perf_counter() - begin if own is None else own)
    others = (busy_seconds() - busy - (time.process_time() - own_busy)) / (time.perf_counter() - since)
    return {"others": max(others, 0.0), **{name: float(np.median(values)) for name, values in seconds.items()}}


class Weights:
    """Packed matrices cut from one pool of random bytes; scales are small and constant."""

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
    print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )
    sys.stdout.flush()


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
        # Pages nobody has written are all the same zero page: write them, or reading the cache costs nothing.
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
    """Decode attention alone, against reading the cache."""
    for context in (2048, 8192):
        for kind in ("fp16", "int8"):
            cache = CpuCache(8, HEADS, HIDDEN // HEADS, context, kind)
            cache.keys[:], cache.values[:], cache.scales[:] = 1, 1, 0.01
            qkv, out = np.ones((1, 3 * HIDDEN), np.float32), ops.empty((1, HIDDEN))
            start = np.array([context - 1], np.int32)
            replay = ops.capture(
                lambda c=cache, q=qkv, s=start, o=out: [ops.cached_attention(q, c, i, s, out=o) for i in range(8)]
            )

            def read(c=cache):
                return read_seconds(ops, c.keys) + read_seconds(ops, c.values)

            seconds, vectors = (
                interleave({"read": read, "attention": replay}, 15),
                cache.keys.nbytes + cache.values.nbytes,
            )
            report(rows, {
                "bench": "attention", "threads": ops.threads, "context": context, "cache": kind,
                "GB/s": cache.nbytes / seconds["attention"] / 1e9, "read GB/s": vectors / seconds["read"] / 1e9,
                "share": cache.nbytes / seconds["attention"] * seconds["read"] / vectors, "others": seconds["others"],
            })  # fmt: skip


def bench_gemm(ops: CpuOps, rows: list[dict]) -> None:
    """Many rows by int4 and int8 weights, in operations a second against the peak out of registers."""
    for label, bits in (("int4", 4), ("int8", 8)):
        peak = products_per_second(ops, bits)
        for activations in ("int8", "int16"):
            own = CpuOps(activations=activations, threads=ops.threads)
            for m, n, k in ((64, 2 * FFN, HIDDEN), (256, 2 * FFN, HIDDEN), (512, HIDDEN, FFN)):
                w = own.weight(Weights(n * k * bits // 8 + n * k // 32).matrix(n, k, bits))
                x, out = np.ones((m, k), np.float32), own.empty((m, n))
                seconds = interleave({"gemm": own.capture(lambda a=own, x=x, w=w, o=out: a.linear(x, w, out=o))}, 5)
                report(rows, {
                    "bench": "gemm", "threads": ops.threads, "weights": label, "activations": activations,
                    "m": m, "n": n, "k": k, "GOP/s": 2e-9 * m * n * k / seconds["gemm"], "peak GOP/s": peak / 1e9,
                    "share": 2 * m * n * k / seconds["gemm"] / peak, "others": seconds["others"],
                })  # fmt: skip


BENCHES = {"gemv": bench_gemv, "token": bench_token, "attention": bench_attention, "gemm": bench_gemm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*BENCHES, []], help="all by default")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, CpuOps().threads])
    parser.add_argument("--realtime", action="store_true", help="keep other programs off the processors (root)")
    arguments = parser.parse_args()
    global REALTIME
    REALTIME = arguments.realtime
    rows: list[dict] = []
    for threads in sorted(set(arguments.threads)):
        ops = CpuOps(threads=threads)
        for name in arguments.what or BENCHES:
            BENCHES[name](ops, rows)
    machine = {"processor": platform.processor() or platform.machine(), "level": features.selected().name}
    print(json.dumps({"date": date.today().isoformat(), "machine": machine, "results": rows}))


if __name__ == "__main__":
    main()
