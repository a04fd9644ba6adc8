"""Time a conversation: the next question, a known picture, an answer that repeats its prompt.

    python bench/conversation.py MODEL.qvl [turn] [repeat] [long] [--device cpu] [--kv-cache fp16]

turn    one picture and 300 tokens of history, then a question of 20: seconds to the first token for a fresh run, for
        a new session with the picture's features in the cache, and for the next turn.
repeat  an answer that quotes 96 tokens of its prompt, with and without drafts, in turns. A constraint forces the
        answer, so that any weights will do.
long    200 turns with 50 pictures: seconds a turn over time, and the growth of memory compared with what
        `qvl info` announces for a full window plus the limit of the picture cache. For a small model.

A table, then one JSON document as the last line.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import numpy as np
from PIL import Image

import qvl_runtime as qvl
from qvl_runtime.budget import budget

HISTORY, QUESTION, ANSWER = 300, 20, 32
QUOTED = 96


class Dictation:
    """A constraint that forces the answer to be these tokens."""

    def __init__(self, tokens: list[int], vocabulary: int):
        self.tokens, self.vocabulary = tokens, vocabulary

    def start(self, *asked) -> Dictation:
        self._left: Iterator[int] = iter(self.tokens)
        self._next = next(self._left)
        return self

    def allowed(self) -> np.ndarray:
        allowed = np.zeros(self.vocabulary, bool)
        allowed[self._next] = True
        return allowed

    def advance(self, token: int) -> None:
        self._next = next(self._left, token)


def words(rng: np.random.Generator, count: int) -> list[int]:
    """Random token ids of plain text."""
    return [int(i) for i in rng.integers(32, 127, count)]


def first_token(model: qvl.Model, ids: list[int], image: np.ndarray) -> dict:
    """Seconds to the first token, and the parts they consist of."""
    started = time.perf_counter()
    timings = model.generate(ids, [image], max_new_tokens=1).timings
    return {
        "seconds": time.perf_counter() - started,
        "image": timings.image,
        "prefill": timings.prefill,
        "cached_tokens": timings.cached_tokens,
        "prompt_tokens": timings.prompt_tokens,
    }


def bench_turn(path: Path, options: dict, repeats: int) -> dict:
    rng = np.random.default_rng(0)
    fresh = qvl.load(path, conversations=0, image_cache_bytes=0, **options)
    warm = qvl.load(path, conversations=0, **options)
    ongoing = qvl.load(path, **options)
    results: dict[str, list[dict]] = {"fresh": [], "known picture": [], "next turn": []}
    for repeat in range(repeats):
        image = rng.integers(0, 255, (448, 448, 3), np.uint8)
        slot = fresh.tokenizer.encode("Picture 1: <img></img>\n")
        asked = slot + words(rng, HISTORY - ANSWER)
        answer = ongoing.generate(asked, [image], max_new_tokens=ANSWER).token_ids
        ids = asked + answer + words(rng, QUESTION + ANSWER - len(answer))
        if repeat == 0:
            warm.generate(slot, [image], max_new_tokens=1)
        results["next turn"].append(first_token(ongoing, ids, image))
        results["fresh"].append(first_token(fresh, ids, image))
        warm.generate(slot, [image], max_new_tokens=1)
        results["known picture"].append(first_token(warm, ids, image))
    whole = statistics.median(run["seconds"] for run in results["fresh"])
    print(f"{'':16} {'first token':>12} {'of fresh':>9} {'picture':>9} {'prefill':>9} {'computed':>9}")
    summary = {}
    for name, runs in results.items():
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {"runs": runs}
        row["of_fresh"] = row["seconds"] / whole
        summary[name] = row
        computed = row["prompt_tokens"] - row["cached_tokens"]
        print(
            f"{name:16} {row['seconds']:10.2f} s {row['of_fresh']:8.3f}x {row['image']:7.2f} s {row['prefill']:7.2f} s "
            f"{computed:9.0f}"
        )
    return summary


def bench_repeat(path: Path, options: dict, repeats: int) -> dict:
    rng = np.random.default_rng(1)
    model = qvl.load(path, **options)
    quoted = words(rng, QUOTED)
    ids = [*words(rng, 20), *quoted, *words(rng, 20), *quoted[:3]]
    constraint = Dictation(quoted[3:], model.config.vocab_size)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for speculate in [False, True] * repeats:
        result = model.generate(ids, constraint=constraint, max_new_tokens=len(constraint.tokens), speculate=speculate)
        assert result.token_ids == constraint.tokens
        rates[speculate].append(result.timings.decode_tokens_per_second)
    plain, drafted = (statistics.median(rates[speculate]) for speculate in (False, True))
    timings = result.timings
    print(f"{len(quoted) - 3} quoted tokens: {plain:.2f} tokens/s; with drafts {drafted:.2f} ({drafted / plain:.2f}x);")
    print(f"  {timings.accepted_drafts} of {timings.draft_tokens} drafted tokens were right")
    return {
        "plain": plain,
        "drafted": drafted,
        "ratio": drafted / plain,
        "rates": {"plain": rates[False], "drafted": rates[True]},
        "accepted_drafts": timings.accepted_drafts,
        "draft_tokens": timings.draft_tokens,
    }


def bench_long(path: Path, options: dict, folder: Path, turns: int = 200, pictures: int = 50) -> dict:
    rng = np.random.default_rng(2)
    features = 16 << 20
    model = qvl.load(path, image_cache_bytes=features, **options)
    needed = budget(model.blob, model.window, options["kv_cache"])
    announced, loaded = needed.total + features, peak_bytes()
    history, rows = [], []
    for turn in range(turns):
        query = f"Question {turn}: " + " ".join(map(str, rng.integers(0, 999, 12)))
        images = []
        if turn % (turns // pictures) == 0:
            # Files, because a history keeps the pictures that it gets.
            images.append(folder / f"{turn}.png")
            Image.fromarray(rng.integers(0, 255, (448, 448, 3), np.uint8)).save(images[0])
        started = time.perf_counter()
        answer = model.chat(query, history, images, temperature=0, max_new_tokens=16)
        history = answer.history
        rows.append({
            "seconds": time.perf_counter() - started,
            "prompt_tokens": answer.prompt_tokens,
            "computed": answer.prompt_tokens - answer.timings.cached_tokens,
            "left_out": answer.left_out,
            "features_bytes": model.pictures.cache.nbytes,
            "peak_bytes": peak_bytes(),
        })  # fmt: skip
    print(f"{'turns':>10} {'seconds':>8} {'prompt':>7} {'computed':>9} {'left out':>9} {'features':>9} {'peak':>8}")
    for first in range(0, turns, turns // 8):
        part = rows[first : first + turns // 8]
        mean = {key: statistics.mean(row[key] for row in part) for key in part[0]}
        print(
            f"{first:4} - {first + len(part) - 1:3} {mean['seconds']:8.3f} {mean['prompt_tokens']:7.0f} "
            f"{mean['computed']:9.0f} {part[-1]['left_out']:9} {mean['features_bytes'] / 2**20:5.1f} MiB "
            f"{part[-1]['peak_bytes'] / 2**20:4.0f} MiB"
        )
    grown = rows[-1]["peak_bytes"] - loaded
    print(f"memory grew by {grown / 2**20:.0f} MiB; {announced / 2**20:.0f} MiB were announced")
    return {"turns": rows, "grown_bytes": grown, "announced_bytes": announced}


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("what", nargs="*", choices=["turn", "repeat", "long", []], help="turn and repeat by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kv-cache", default="fp16")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    options = {"device": arguments.device, "kv_cache": arguments.kv_cache}
    results = {}
    for what in arguments.what or ("turn", "repeat"):
        if what == "long":
            with tempfile.TemporaryDirectory() as folder:
                results[what] = bench_long(arguments.model, options, Path(folder))
        else:
            bench = {"turn": bench_turn, "repeat": bench_repeat}[what]
            results[what] = bench(arguments.model, options, arguments.repeats)
    harness.print_document(**options, results=results)


if __name__ == "__main__":
    main()
