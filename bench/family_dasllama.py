"""Compare a newer model with dasLLAMA on this processor: prompts, answers and a picture, in turns.

    pip install dasllama gguf                      # dasllama-bench on the PATH
    python bench/family_llama.py write qwen3-vl-4b FOLDER
    python bench/family_dasllama.py MODEL.qvl FOLDER [--only text] [--rounds 3]

dasLLAMA reads the same GGUF files, and writes a copy for the processor beside them. Each round runs its own benchmark
in a process of its own: a prompt of 512 tokens, 32 tokens of an answer (from an empty cache, ours after the prompt),
with 2 threads, fp16 caches and the weights as they are in the file; then the encoder with a picture of 1024 tokens and
weights of 8 bits. Ours does its part before it in this process, so that each has the processor alone. Nothing else
should run: `--realtime` of the other scripts would not reach their threads. Medians; ratios are theirs / ours in time,
medians over the rounds. A table, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import harness
import numpy as np
from cpu_llama import ANSWER, PROMPT, Ours
from family_llama import SIDE_TOKENS, THREADS
from harness import seconds
from PIL import Image


def dasllama(folder: Path, *options: str) -> dict[str, dict[str, float]]:
    """Run `dasllama-bench` once and return what it found, by test."""
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "found.json"
        command = ["dasllama-bench", "--model", str(folder / "decoder.gguf"), "--threads", str(THREADS), "--reps", "1"]
        command += ["--output", "json", "--json-path", str(found), *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": scratch})
        if done.returncode or not found.exists():
            raise RuntimeError(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-500:]}")
        return json.loads(found.read_text())[0]["runs"][0]["tests"]


def text_times(ours: Ours, folder: Path, random: np.random.Generator) -> dict[str, float]:
    """Seconds of a prompt, and of a token of the answer, on both sides."""
    tokens = random.integers(0, 150000, PROMPT).tolist()
    taken = {"prompt ours": seconds(lambda: ours.prompt(tokens))}
    taken["answer ours"] = seconds(lambda: ours.answer(ANSWER)) / ANSWER
    found = dasllama(folder, "--plen", str(PROMPT), "--ngen", str(ANSWER))
    taken["prompt theirs"] = PROMPT / found[f"pp{PROMPT}"]["tok_s"]
    taken["answer theirs"] = 1 / found[f"tg{ANSWER}"]["tok_s"]
    return taken


def picture_times(ours: Ours, folder: Path, random: np.random.Generator) -> dict[str, float]:
    """Seconds of a picture on both sides."""
    side = SIDE_TOKENS * ours.model.config.visual.factor
    pixels = random.integers(0, 256, (side, side, 3), np.uint8)
    taken = {"picture ours": seconds(lambda: ours.model.encode_image(pixels))}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "picture.png"
        Image.fromarray(pixels).save(path)
        options = ["--image", str(path), "--image-mmproj", str(folder / "vision.gguf"), "--ngen", "1"]
        taken["picture theirs"] = dasllama(folder, *options)["img:enc"]["ms"] / 1e3
    return taken


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the row of the table."""
    ours, random = Ours(arguments.model, THREADS), np.random.default_rng(1)
    measures = [{"text": text_times, "picture": picture_times}[name] for name in arguments.only]
    if "text" in arguments.only:
        ours.prompt(random.integers(0, 150000, PROMPT).tolist())
        ours.answer(4)
    if "picture" in arguments.only:
        ours.model.encode_image(np.zeros((512, 512, 3), np.uint8))
    taken: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for measure in measures:
            for name, value in measure(ours, arguments.folder, random).items():
                taken.setdefault(name, []).append(value)
    row: dict[str, Any] = {"threads": THREADS, "rounds": arguments.rounds}
    row |= {f"{name} s": float(np.median(values)) for name, values in taken.items()}
    for what in dict.fromkeys(name.split()[0] for name in taken):
        row[f"{what} ratio"] = float(np.median(np.array(taken[f"{what} theirs"]) / taken[f"{what} ours"]))
    return row


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=["text", "picture"], default=["text", "picture"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    row = run(arguments)
    harness.print_row(row)
    version = importlib.metadata.version("dasllama")
    harness.print_document(dasllama=version, model=os.path.basename(arguments.model), results=[row])


if __name__ == "__main__":
    main()
