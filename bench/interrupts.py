"""Interrupt answers at random moments, and compare the next answer with that of an uninterrupted run.

    python bench/interrupts.py MODEL.qvl [--count 10000] [--seed 0] [--device cpu]

Exit status 1 after the first difference, or if an answer takes longer than ten seconds.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Stuck(BaseException):
    """An answer takes too long."""


def interrupt(call: Callable[[], object], seconds: float) -> bool:
    """Run `call` and raise a KeyboardInterrupt in it after `seconds`; whether that was before its end."""

    def handler(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.signal(signal.SIGALRM, previous)
    return False


def within(seconds: float, call: Callable[[], object]) -> object:
    """The result of `call`, or `Stuck`."""

    def handler(number: int, frame: object) -> None:
        raise Stuck(f"no answer within {seconds} s")

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rounds(answer: Callable[[], object], count: int, rng: random.Random) -> tuple[int, object, object]:
    """Interrupt `answer` `count` times at random moments, each time followed by a whole answer.

    Returns
    -------
    hit : int
        Interrupts that came before the end of an answer.
    got, want : object
        The first answer that differs and what it should be, or None twice.
    """
    want = answer()
    duration, hit = min(_seconds(answer) for _ in range(5)), 0
    for _ in range(count):
        hit += interrupt(answer, rng.uniform(0, 1.2 * duration))
        if (got := within(10, answer)) != want:
            return hit, got, want
    return hit, None, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import qvl_runtime as qvl

    model = qvl.load(options.model, device=options.device)

    def answer() -> list[int]:
        return list(model.generate("A man and a dog", max_new_tokens=6).token_ids)

    begin = time.perf_counter()
    hit, got, want = rounds(answer, options.count, random.Random(options.seed))
    took = f"{options.count} interrupts, {hit} before the end of an answer, {time.perf_counter() - begin:.0f} s"
    if got != want:
        print(f"{took}; then {got} instead of {want}")
        return 1
    print(f"{took}; no difference")
    return 0


if __name__ == "__main__":
    sys.exit(main())
