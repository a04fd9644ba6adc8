"""Write tasks about the demo model's pictures in the published file formats that `qvl eval` reads.

    python bench/demo_tasks.py DIR --count 100 --seed 60000

Captions in the format of NoCaps, questions of VQAv2, reading of DocVQA and phrases of RefCOCO, `--count` of each, in
English. The demo model was not trained on Qwen-VL's prompts: `DIR/prompts.json` has its own, for `qvl eval --prompts`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

from qvl_runtime.demo.conversations import SINGLE, Exchange, refer
from qvl_runtime.demo.scenes import Scene, draw, random_scene
from training.lexicon import LEVELS, check_hanzi_font, scene_options

SIDE = 336
TASKS = ("nocaps", "vqav2", "docvqa", "refcoco_val")
"""One of each kind."""
QUESTIONS = ("color", "shape", "size", "count", "position", "present")
ANNOTATORS = 10
SLOT = "Picture 1: <img></img>\n"
PROMPTS = {
    "turns": True,
    "caption": f"{SLOT}Describe the picture.",
    "question": f"{SLOT}{{question}}",
    "phrase": f"{SLOT}Find {{phrase}}.",
}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Generator:
    """Draws scenes that allow a question, and writes their pictures below a folder."""

    def __init__(self, folder: Path, seed: int, level: str):
        self.folder, self.seed, self.level = folder, seed, level

    def ask(self, task: str, count: int, make: Callable[[np.random.Generator, Scene], Any]) -> list[tuple[str, Any]]:
        """`count` pictures, each with what `make` returns for its scene; scenes with None are skipped."""
        random = np.random.default_rng([self.seed, TASKS.index(task)])
        share = 1.0 if task == "docvqa" else 0.25
        found: list[tuple[str, Any]] = []
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        while len(found) < count:
            scene = random_scene(random, text_share=share, **scene_options(self.level))
            if (made := make(random, scene)) is not None:
                name = f"pictures/{task}-{len(found)}.png"
                draw(scene, SIDE).save(self.folder / name)
                # In the published files, names are relative to the folder above.
                found.append((f"data/{name}", made))
        return found


def one_of(*skills: str) -> Callable[[np.random.Generator, Scene], Exchange | None]:
    def make(random: np.random.Generator, scene: Scene) -> Exchange | None:
        return SINGLE[skills[int(random.integers(len(skills)))]][0](random, "en", scene)

    return make


def write(folder: Path, count: int, seed: int, level: str) -> None:
    """Write all tasks, with their pictures and the demo model's prompts."""
    generator = Generator(folder, seed, level)
    described = generator.ask("nocaps", count, one_of("describe"))
    write_json(
        folder / "nocaps/nocaps_val.json",
        {
            "images": [{"id": i, "image": name} for i, (name, _) in enumerate(described)],
            "annotations": [
                {"image_id": i, "id": i, "caption": made.turns[0][1]} for i, (_, made) in enumerate(described)
            ],
        },
    )
    asked = generator.ask("vqav2", count, one_of(*QUESTIONS))
    write_lines(
        folder / "vqav2/vqav2_val.jsonl",
        [
            {"image": name, "question": made.turns[0][0], "question_id": i, "answer": made.turns[0][1]}
            for i, (name, made) in enumerate(asked)
        ],
    )
    write_json(
        folder / "vqav2/v2_mscoco_val2014_annotations.json",
        {
            "annotations": [
                {
                    "question_id": i,
                    "question_type": made.skill,
                    "answer_type": "other",
                    "answers": [{"answer": made.turns[0][1], "answer_id": k + 1} for k in range(ANNOTATORS)],
                }
                for i, (_, made) in enumerate(asked)
            ]
        },
    )
    printed = generator.ask("docvqa", count, one_of("read"))
    write_lines(
        folder / "docvqa/val.jsonl",
        [
            {"image": name, "question": made.turns[0][0], "question_id": i, "answer": [made.turns[0][1]]}
            for i, (name, made) in enumerate(printed)
        ],
    )
    write_json(
        folder / "docvqa/val/val_v1.0.json",
        {
            "dataset_name": "demo",
            "data": [
                {"questionId": i, "question": made.turns[0][0], "answers": [made.turns[0][1]]}
                for i, (_, made) in enumerate(printed)
            ],
        },
    )
    named = generator.ask("refcoco_val", count, lambda random, scene: refer(random, scene, "en"))
    write_lines(
        folder / "refcoco/refcoco_val.jsonl",
        [
            {"image": name, "sent": phrase, "bbox": [SIDE * v for v in thing.box], "width": SIDE, "height": SIDE}
            for name, (thing, phrase) in named
        ],
    )
    write_json(folder / "prompts.json", PROMPTS)


def check_level(parser: argparse.ArgumentParser, level: str, hanzi: str = "") -> None:
    """End the script with one line if the font of a level, or of what prints Chinese at any level, is not installed."""
    try:
        scene_options(level)
        if hanzi:
            check_hanzi_font(hanzi)
    except FileNotFoundError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=60_000)
    parser.add_argument("--level", choices=LEVELS, default="all", help="how hard the pictures are")
    args = parser.parse_args()
    check_level(parser, args.level)
    write(args.folder, args.count, args.seed, args.level)


if __name__ == "__main__":
    main()
