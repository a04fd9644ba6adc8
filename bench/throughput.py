"""Tokens a second of the engine with 1, 4, 8 and 16 answers at once, compared with its bare steps.

    python bench/throughput.py MODEL.qvl [--answers 1 4 8 16] [--prompt 64] [--tokens 32] [--rounds 3] [--device cpu]
    python bench/throughput.py MODEL.qvl --gap 2000

Bare steps: the decoder alone computes the prompts in the largest slices and the same number of steps of as many rows,
without scheduler, sampler and text. Both are timed in turns; the ratio is the median of the rounds. The seconds in
slices, in steps and outside of them are printed for each round, which shows changes of the machine's speed. On a GPU
slices and steps are only launched: waiting for them counts as outside.

`--gap` starts an answer and, while it runs, a prompt of that many tokens and a picture. It prints the longest time
between two tokens of the answer and the number of slices computed in that time.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import harness
import numpy as np

import qvl_runtime as qvl
from qvl_runtime.engine import scheduler
from qvl_runtime.engine.decoder import DecodeStep
from qvl_runtime.engine.prefill import compute_slices
from qvl_runtime.engine.session import PREFILL_ROWS, Session, step
from qvl_runtime.inputs.prompt import Prompt
from qvl_runtime.trace import no_trace


@contextlib.contextmanager
def timed(*places: tuple[Any, str]) -> Iterator[dict[str, float]]:
    """Time functions, given as module and attribute name: total seconds by name."""
    seconds: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, _timed(getattr(module, name), name, seconds)))
        yield seconds


def _timed(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timing(*arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin

    return timing


def whole(model: qvl.Model, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of the answers, submitted together."""
    options = {"max_new_tokens": tokens, "speculate": False}
    with model._scheduler.gate, model._scheduler.device:
        streams = [model.stream(ids, **options) for ids in prompts]
        begin = time.perf_counter()
    for stream in streams:
        assert len(stream.result().token_ids) == tokens, "an answer ended early"
    return time.perf_counter() - begin


def bare(run: DecodeStep, sessions: list[Session], prompts: list[list[int]], tokens: int) -> float:
    """Seconds of the same products alone: prompts, as many in a slice as fit, then steps of all rows."""
    begin, at_once = time.perf_counter(), max(PREFILL_ROWS // len(prompts[0]), 1)
    for first in range(0, len(sessions), at_once):
        group, unread = sessions[first : first + at_once], []
        for session, ids in zip(group, prompts[first:]):
            session.truncate(0)
            prompt = Prompt(ids, [])
            session.keep(prompt)
            unread.append(session.prefill(prompt, [], len(ids) + tokens))
            next(unread[-1])
        compute_slices(group, PREFILL_ROWS, no_trace)
        assert all(next(rest, None) is None for rest in unread), "a prompt is longer than a slice"
    for _ in range(tokens - 1):
        for session in sessions:
            session.feed(session.best(0))
        step(run, sessions)
    for session in sessions:
        session.best(0)
    return time.perf_counter() - begin


def gap(model: qvl.Model, length: int) -> dict[str, float]:
    """The longest gap between two tokens of an answer while a long prompt and a picture arrive."""
    engine, rng, slices = model._scheduler, np.random.default_rng(0), list[int]()
    compute = engine._compute_slice

    def computing(*arguments: Any) -> None:
        slices.append(engine.steps)  # the step it follows
        compute(*arguments)

    def tokens(count: int) -> list[int]:
        return rng.integers(300, 900, count).tolist()

    stream, times = model.stream(tokens(64), max_new_tokens=4000, speculate=False), []
    alone = 4
    for _ in range(alone):
        next(stream)
        times.append(time.perf_counter())
    engine._compute_slice = computing
    others = [model.stream(tokens(length), max_new_tokens=1)]
    if model.pictures is not None:
        image = rng.integers(0, 256, (448, 448, 3), np.uint8)
        others.append(model.stream("What is this?", [image], max_new_tokens=1))
    left = [len(others)]
    for other in others:
        other.when_ended(lambda: left.append(left[-1] - 1))
    while left[-1]:
        next(stream)
        times.append(time.perf_counter())
    stream.cancel()
    engine._compute_slice = compute
    gaps = np.diff(times)
    return {
        "prompt": length,
        "slices": len(slices),
        "slices_in_a_gap": max(slices.count(step) for step in slices),
        "longest_gap": float(gaps[alone - 1 :].max()),
        "median_gap": float(np.median(gaps[alone - 1 :])),
        "gap_alone": float(np.median(gaps[: alone - 1])),
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gap", type=int, metavar="TOKENS")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    most = max(options.answers)
    # Sessions are reused, like those of the bare steps: prompts share no prefix, but memory is allocated.
    model = qvl.load(options.model, device=options.device, conversations=most, kv_cache_bytes=1 << 40)
    told = {"device": options.device, "threads": getattr(model.ops, "threads", None)}
    model._engine._stop_ids = frozenset()  # so that all answers have the same length
    if options.gap:
        found = gap(model, options.gap)
        harness.print_row(found)
        harness.print_document(**told, **found)
        return
    run, rng, rows = DecodeStep(model.decoder), np.random.default_rng(0), []
    sessions = [Session(model.decoder, "fp16", options.prompt + options.tokens) for _ in range(most)]
    warm = rng.integers(300, 900, (2, options.prompt)).tolist()
    whole(model, warm, 2)
    bare(run, sessions[:2], warm, 2)
    for count in options.answers:
        found = []
        for turn in range(options.rounds):
            prompts = rng.integers(300, 900, (count, options.prompt)).tolist()
            seconds = {}
            for which in ("bare", "whole") if turn % 2 else ("whole", "bare"):
                module = sys.modules[__name__] if which == "bare" else scheduler
                with timed((module, "compute_slices"), (module, "step")) as parts:
                    if which == "bare":
                        seconds[which] = bare(run, sessions[:count], prompts, options.tokens)
                    else:
                        seconds[which] = whole(model, prompts, options.tokens)
                beside = seconds[which] - sum(parts.values())
                told_parts = "  ".join(f"{name} {value:.2f} s" for name, value in (*parts.items(), ("beside", beside)))
                print(f"  {which}: {told_parts}", flush=True)
            found.append((seconds["bare"], seconds["whole"]))
        done = count * options.tokens
        medians = np.median(np.array(found), axis=0)
        ratio = float(np.median([b / w for b, w in found]))
        rows.append({"answers": count, "tokens/s": done / medians[1], "bare": done / medians[0], "ratio": ratio})
        harness.print_row(rows[-1])
    harness.print_document(**told, prompt=options.prompt, tokens=options.tokens, rows=rows)


if __name__ == "__main__":
    main()
