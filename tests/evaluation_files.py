"""Hand-made files of published tasks, for the tests."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from qvl_runtime.evaluation.tasks import COGNITION, PERCEPTION


def make(path: Path) -> Path:
    """A folder of tasks with two pictures and no task yet."""
    (path / "pictures").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 6)).save(path / "pictures" / name)
    return path


def put(folder: Path, name: str, *lines: object) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def qa(image: str = "a.png", **more) -> dict:
    return {"image": f"data/pictures/{image}", "question": "What?", "question_id": 7, **more}


def choice(**more) -> dict:
    line = {"image": "data/pictures/a.png", "hint": "", "question": "Which?", "choices": ["x", "y"], "answer": 1}
    return line | more


def mme(folder: Path) -> None:
    for subtask in PERCEPTION + COGNITION:
        lines = [
            f"{image}\tIs it {kind}? Please answer yes or no.\t{kind}" for image in ("a.png",) for kind in ("Yes", "No")
        ]
        put(folder, f"mme/Your_Results/{subtask}.txt", *lines)
        (folder / "mme/images" / subtask).mkdir(parents=True, exist_ok=True)
        (folder / "mme/images" / subtask / "a.png").write_bytes((folder / "pictures/a.png").read_bytes())
