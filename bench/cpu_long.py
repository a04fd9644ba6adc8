"""Time a long prompt: slices of 512 tokens at several positions, the share of attention, and decoding after it.

    python bench/cpu_long.py MODEL.qvl [--threads 2] [--tokens 8000] [--realtime]

A slice's time does not depend on the values before it, so the slices between those timed are skipped and their part of
the cache is filled with constants. `rest` is a slice without its attention, which is timed alone over the same cache,
right after it. `all` is the time of a prompt, interpolated linearly between the timed slices. A table, then one JSON
document as the last line.
"""

from __future__ import annotations

import os
import time
from functools import partial

import harness
import numpy as np
from harness import seconds

from qvl_kernels.cpu.measure import bandwidth
from qvl_kernels.cpu.runner import aligned
from qvl_runtime import load
from qvl_runtime.benchmark import bytes_per_token
from qvl_runtime.engine.decoder import DecodeStep, Span
from qvl_runtime.engine.session import PREFILL_ROWS, Session, step


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--kv-cache", default="int8")
    harness.add_timing(parser)
    arguments = parser.parse_args()
    os.environ["QVL_THREADS"] = str(arguments.threads)
    model, rows, room, answer = load(arguments.model, device="cpu"), PREFILL_ROWS, arguments.tokens + 32, 16
    decoder, ops, config = model.decoder, model.ops, model.config
    session = Session(decoder, arguments.kv_cache, room)
    run = DecodeStep(decoder)
    context = session.state
    context.begin(arguments.tokens)
    context.reserve(room)
    store = context.store
    store.keys[:], store.values[:], store.scales[:] = 1, 1, 0.01
    ids = ops.upload(np.random.default_rng(0).integers(0, 150000, rows).astype(np.int32))
    work = decoder.workspace(rows)

    def compute_slice(start: int) -> None:
        context.truncate(0)
        context.advance(start)
        decoder.embed(ids, work.x)
        decoder.forward(work, [Span(context, rows)])

    def attention(start: int) -> None:
        where = np.array([start], np.int32)
        for layer in range(config.num_hidden_layers):
            ops.cached_attention(work.qkv, store, layer, where, out=work.attended)

    compute_slice(0)
    if arguments.realtime:
        harness.take_processors()
    last = arguments.tokens - rows
    starts = [*(start for start in (0, rows, 3 * rows, 7 * rows, 11 * rows) if start < last), last]
    found = []
    for start in starts:
        whole, alone = seconds(partial(compute_slice, start)), seconds(partial(attention, start))
        found.append({"start": start, "seconds": whole, "attention": alone, "rest": whole - alone})
        harness.print_row(found[-1])
    prompts = []
    for length in (*(length for length in (rows, 4 * rows) if length < arguments.tokens), arguments.tokens):
        begins = np.arange(0, length, rows)
        part = np.minimum(rows, length - begins) / rows
        taken = {
            name: float((part * np.interp(begins, starts, [row[name] for row in found])).sum() / length * 1e3)
            for name in ("seconds", "attention", "rest")
        }
        prompts.append({"tokens": length, "all, ms a token": taken["seconds"], "attention": taken["attention"]})
        prompts[-1] |= {"rest": taken["rest"], "tokens/s": 1e3 / taken["seconds"]}
        harness.print_row(prompts[-1])
    context.truncate(0)
    context.advance(arguments.tokens)
    memory = aligned(1 << 30)
    memory[:] = 1
    speeds, bandwidths = [], []
    session.feed(1)
    step(run, [session])
    for _ in range(3):
        bandwidths.append(bandwidth(ops, memory))
        begin = time.perf_counter()
        for _ in range(answer // 3):
            session.feed(session.best(0))
            step(run, [session])
        speeds.append(answer // 3 / (time.perf_counter() - begin))
    needed = bytes_per_token(model, arguments.kv_cache, arguments.tokens)
    share = float(np.median(np.array(speeds) * needed / np.array(bandwidths)))
    decode = {"tokens/s": float(np.median(speeds)), "GB a token": needed / 1e9, "share of bandwidth": share}
    decode["read GB/s"] = float(np.median(bandwidths)) / 1e9
    harness.print_row(decode)
    conditions = {"threads": arguments.threads, "kv_cache": arguments.kv_cache}
    harness.print_document(**conditions, slices=found, prompts=prompts, decode=decode)


if __name__ == "__main__":
    main()
