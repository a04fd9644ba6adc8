"""Time products with each value of what the CPU's kernels take from this machine; all values of a product in turns.

    python bench/cpu_tiles.py [--threads 2] [--rounds 15]

`ahead` is the prefetch distance of products of a few rows, in bytes, with weights from a pool larger than the caches.
`parts` is the number of parts of the rows of a larger product, each multiplied with all weights; the chosen one comes
from the L2 cache. Times are medians relative to the chosen value's in the same round. A table, then one JSON document
as the last line.
"""

from __future__ import annotations

import harness
import numpy as np
from cpu_kernels import Weights

from qvl_kernels.cpu import CpuOps, batched, cache_sizes
from qvl_kernels.cpu.choices import AHEAD, Choices

FEW = ((4, 4096, 11008, 1), (4, 4096, 4096, 1), (4, 2560, 9728, 1), (8, 4304, 1152, 1), (4, 4096, 4096, 4))
MANY = (
    (4, 4096, 4096, 64), (4, 4096, 4096, 256), (4, 4096, 4096, 1024), (4, 4096, 11008, 256), (4, 2560, 9728, 1024),
    (8, 4304, 1152, 1024), (8, 1152, 4304, 1024),
)  # fmt: skip
"""Bits, N, K and rows."""
POOL = 96 << 20


def recorded(ops: CpuOps, matrices: list, k: int, n: int, rows: int):
    """A call that multiplies the same rows with all matrices."""
    x, out = np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32), ops.empty((rows, n))

    def products() -> None:
        for w in matrices:
            ops.linear(x, w, out=out)

    return ops.capture(products)


def in_turns(calls: dict, chosen: int, rounds: int) -> dict[str, float]:
    """Median time of each call relative to that of `chosen`."""
    times = {value: [] for value in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for value, call in calls.items():
            times[value].append(harness.seconds(call))
    usual = np.array(times[chosen])
    return {str(value): float(np.median(np.array(found) / usual)) for value, found in times.items()}


def few(ops: CpuOps, bits: int, n: int, k: int, rows: int, rounds: int) -> dict:
    size = n * k * bits // 8 + n * k // 32 + 8192
    pool, calls, before = Weights(POOL + size), {}, ops.choices
    matrices = [ops.weight(pool.matrix(n, k, bits)) for _ in range(POOL // size)]
    for ahead in AHEAD:
        ops.choices = Choices(ahead)
        calls[ahead] = recorded(ops, matrices, k, n, rows)
    ops.choices = before
    times = in_turns(calls, before.ahead, rounds)
    return {"bits": bits, "n": n, "k": k, "rows": rows, "what": "ahead", "chosen": before.ahead, **times}


def many(ops: CpuOps, bits: int, n: int, k: int, rows: int, rounds: int) -> dict:
    w = ops.weight(Weights(n * k * bits // 8 + n * k // 32 + (1 << 20)).matrix(n, k, bits))
    choose, calls = batched.row_parts, {}
    chosen = choose(rows, n, k, bits, ops.threads)
    fewest = -(-rows // (batched.tiles.HELD_TILES * batched.tiles.TOKENS))  # as many as the scratch memory holds
    for parts in sorted({max(fewest, int(chosen * share)) for share in (0.25, 0.5, 1, 2, 4)}):
        batched.row_parts = lambda *_, parts=parts: parts
        calls[parts] = recorded(ops, [w], k, n, rows)
    batched.row_parts = choose
    times = in_turns(calls, chosen, rounds)
    return {"bits": bits, "n": n, "k": k, "rows": rows, "what": "parts", "chosen": chosen, **times}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--threads", type=int, default=CpuOps().threads)
    harness.add_timing(parser, rounds=15)
    options = parser.parse_args()
    if options.realtime:
        harness.take_processors()
    ops, rows = CpuOps(threads=options.threads, activations="int8"), []
    for bench, shapes in ((few, FEW), (many, MANY)):
        for shape in shapes:
            rows.append(bench(ops, *shape, options.rounds))
            harness.print_row(rows[-1])
    harness.print_document(threads=options.threads, level2=cache_sizes.level2(), results=rows)


if __name__ == "__main__":
    main()
