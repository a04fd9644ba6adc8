"""Compare answers to 1 to 16 random requests at once with the answers to the same requests alone.

    python bench/batch_equal.py MODEL.qvl [MODEL.qvl …] [--count 1000] [--seed 0] [--kv-cache fp16 int8] [--device cpu]

Prompts with shared beginnings, chats, pictures, constraints, seeds, stop strings, log probabilities, several answers to
one prompt, drafts, salts, and answers that are cancelled. Exit status 1 if an answer differs.
"""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import harness
import numpy as np

import qvl_runtime as qvl

WORDS = ["Where", "is", "the", "dog,", "and", "what", "colour", "has", "it?", "图中有什么", "框出", "42", "(1,2)", "\n"]
BEGINNINGS = ["", "", " ".join(WORDS * 3), " ".join(WORDS * 12), "Answer in one word. " * 6]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


def pictures(count: int = 6) -> list[np.ndarray]:
    """Small pictures of several shapes."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, (28 * (2 + i % 3), 28 * (2 + i % 2), 3), np.uint8) for i in range(count)]


def request(rng: random.Random, model: qvl.Model, images: list[np.ndarray]) -> dict[str, Any]:
    """A random request: options of `generate` or `chat`, and ``cancel``, the pieces before it is cancelled."""
    text = rng.choice(BEGINNINGS) + " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
    made: dict[str, Any] = {"max_new_tokens": rng.choice([0, 1, 4, 12, 24]), "speculate": rng.random() < 0.7}
    shown = rng.choices(images, k=rng.choice([0, 0, 0, 1, 2])) if model.pictures is not None else []
    if model.is_chat and rng.random() < 0.4:
        turns = [(f"{rng.choice(BEGINNINGS)} {i}?", "An answer.") for i in range(rng.randint(0, 3))]
        made |= {"query": text, "history": turns, "images": shown or None}
    else:
        made |= {"prompt": text, "images": shown or None}
    if rng.random() < 0.5:
        made |= {"temperature": rng.choice([0.7, 1.5]), "seed": rng.randrange(100), "top_k": rng.choice([0, 5])}
        made["repetition_penalty"] = rng.choice([1.0, 1.2])
    else:
        made["temperature"] = 0
    if rng.random() < 0.2 and "prompt" in made:
        made["n"] = rng.randint(1, 3)
        made.setdefault("seed", 3)
    made["logprobs"] = rng.choice([None, None, 0, 3])
    made["stop"] = rng.choice([None, None, ["e"], ["a", "的"]])
    made["constraint"] = rng.choice([None] * 5 + [qvl.Regex("[a-z ]{3,9}"), qvl.JsonSchema(SCHEMA), qvl.Grounding()])
    made["cache_salt"] = rng.choice([None, None, "one", "two"])
    made["cancel"] = rng.choice([0, 1, 3]) if rng.random() < 0.1 else None
    return made


def answer(model: qvl.Model, asked: dict[str, Any]) -> Any:
    """The results of a request as values that can be compared; None if it was cancelled."""
    options = {name: value for name, value in asked.items() if name != "cancel"}
    chat = "query" in options
    try:
        if asked["cancel"] is not None:
            options.pop("n", None)
            stream = model.stream_chat(**options) if chat else model.stream(**options)
            for _ in zip(range(asked["cancel"]), stream):
                pass
            stream.cancel()
            return None
        found = model.chat(**options) if chat else model.generate(**options)
    except qvl.QvlError as error:
        return str(error)
    results = found if isinstance(found, list) else [found]
    return [(r.token_ids, r.text, r.finish_reason, r.logprobs, [vars(box) for box in r.boxes]) for r in results]


def differing(together: qvl.Model, alone: qvl.Model, asked: list[dict[str, Any]], width: int) -> list[dict[str, Any]]:
    """The requests whose answers with `width` at once differ from those alone."""
    with ThreadPoolExecutor(width) as pool:
        got = list(pool.map(lambda one: answer(together, one), asked))
    return [one for one, found in zip(asked, got) if found is not None and found != answer(alone, one)]


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache", nargs="+", default=["fp16", "int8"])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    cases = [(model, kind) for model in options.models for kind in options.kv_cache]
    rng, images, rows = random.Random(options.seed), pictures(), []
    for case, (path, kind) in enumerate(cases):
        count = options.count * (case + 1) // len(cases) - options.count * case // len(cases)
        together = qvl.load(path, device=options.device, kv_cache=kind, conversations=3)
        alone = qvl.load(path, device=options.device, kv_cache=kind, conversations=0)
        begin, different, done = time.perf_counter(), 0, 0
        while done < count:
            width = rng.randint(1, 16)
            asked = [request(rng, together, images) for _ in range(min(2 * width, count - done))]
            different += len(differing(together, alone, asked, width))
            done += len(asked)
        engine = together._scheduler
        rows.append({"model": path, "kv_cache": kind, "requests": count, "different": different})
        rows[-1] |= {"steps": engine.steps, "slices": engine.slices, "seconds": time.perf_counter() - begin}
        harness.print_row(rows[-1])
    different = sum(row["different"] for row in rows)
    harness.print_document(device=options.device, requests=options.count, different=different, rows=rows)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
