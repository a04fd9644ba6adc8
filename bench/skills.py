"""Score a model on newly drawn pictures, by skill and language.

    python bench/skills.py                          the demo model at five precisions
    python bench/skills.py a.qvl FOLDER             these: .qvl files, or Hugging Face folders (at 16 bits)
    python bench/skills.py --seed 7 --count 100     another test set, questions for each skill and language

Exact match, except for boxes (`find`, `ground`, places in `second`): a box is right if its IoU with the true one is at
least 0.5; an answer with several is right if all its boxes are. A table, then one JSON document as the last line.

Printed Chinese needs the font of Debian's fonts-wqy-microhei: at --level all, and at every level for the skill
"read hanzi" and for GPTQ, whose calibration has all skills.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import harness
import numpy as np
from demo_tasks import check_level
from PIL import Image

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.demo import checkpoint_folder
from qvl_runtime.demo.conversations import LANGUAGES, SINGLE, Exchange, compare
from qvl_runtime.demo.scenes import COLORS, SHAPES, Scene, draw, random_scene
from qvl_runtime.demo.scoring import MIN_IOU, is_right, overlaps
from training.lexicon import LEVELS, scene_options

INT4 = {"bits": 4, "vision_bits": 4, "head_bits": 4}
KINDS = {
    "fp16": {"bits": 16},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4 all RTN": INT4,
    "int4 all GPTQ": INT4,
}
"""The conversions compared; "int4" is the default, with ViT, adapter and head at 8 bits. GPTQ is `calibrated`."""
CALIBRATION_SEED, CALIBRATION_COUNT = 40_000, 8
READ_HANZI = "read hanzi"
READING = {"read digits": (1, 0, 0, 0), "read latin": (0, 0.6, 0.4, 0), READ_HANZI: (0, 0, 0, 1)}
SIDE, SHORT = 336, 8
SKILLS = (*(name for name in SINGLE if name != "read"), *READING, "compare 2", "compare 3")
GROUPS = {
    "boxes": ("find", "ground"),
    "attributes and counting": ("color", "shape", "size", "count", "position"),
    "reading": tuple(READING),
    "comparison": ("compare 2", "compare 3"),
    "absent": ("absent",),
}


@dataclass
class Case:
    """A question about pictures, and its true answer."""

    skill: str
    exchange: Exchange
    pictures: list[Image.Image]


@dataclass
class Score:
    """Right answers, those to at most `SHORT` characters, and the IoU of every box asked for (0 where none came)."""

    right: list[float] = field(default_factory=list)
    short: list[float] = field(default_factory=list)
    iou: list[float] = field(default_factory=list)


def scenes_for(rng: np.random.Generator, skill: str, level: str) -> list[Scene]:
    """Pictures for a question of this skill."""
    if skill.startswith("compare"):
        kinds = [(str(s), str(c)) for s in rng.choice(SHAPES, 3) for c in rng.choice(list(COLORS), 3)]
        return [random_scene(rng, 4, 0.0, kinds, **scene_options(level)) for _ in range(int(skill[-1]))]
    options = scene_options(level)
    if skill in READING:
        options |= {"text_share": 1.0, "shares": READING[skill]}
    return [random_scene(rng, **{"text_share": 0.25, **options})]


def cases(seed: int, count: int, skills: Iterable[str] = SKILLS, level: str = "all") -> Iterator[Case]:
    """A test set: `count` questions for every skill and language, each on pictures of its own."""
    for skill in skills:
        rng = np.random.default_rng([seed, SKILLS.index(skill)])
        for language in LANGUAGES:
            made = 0
            while made < count:
                scenes = scenes_for(rng, skill, level)
                ask = compare if skill.startswith("compare") else SINGLE[skill.split()[0]][0]
                exchange = ask(rng, language, *scenes)
                if exchange:
                    made += 1
                    yield Case(skill, exchange, [draw(scene, SIDE) for scene in scenes])


def write_conversations(folder: Path, seed: int, count: int, level: str) -> Path:
    """`count` conversations a skill and language, with their pictures, as Qwen-VL's fine-tuning JSON."""
    folder.mkdir()
    samples = []
    for i, case in enumerate(cases(seed, count, SKILLS, level)):
        slots = ""
        for k, picture in enumerate(case.pictures):
            picture.save(path := folder / f"{i}-{k}.png")
            slots += f"Picture {k + 1}: <img>{path}</img>\n"
        turns = []
        for question, answer in case.exchange.turns:
            turns += [{"from": "user", "value": slots + question}, {"from": "assistant", "value": answer}]
            slots = ""
        samples.append({"id": f"{case.skill} {i}", "conversations": turns})
    path = folder / "conversations.json"
    path.write_text(json.dumps(samples, ensure_ascii=False))
    return path


def calibrated(folder: Path, level: str) -> dict:
    """Arguments of `convert` for GPTQ that calibrates on conversations about such pictures, written to `folder`."""
    data = write_conversations(folder, CALIBRATION_SEED, CALIBRATION_COUNT, level)
    samples = 2 * len(SKILLS) * CALIBRATION_COUNT
    return {"method": "gptq", "calibration_data": data, "calibration_samples": samples}


def mark(case: Case, answer: str, score: Score) -> None:
    """Add one answer to a score."""
    truth = case.exchange.turns[-1][1]
    score.right.append(float(is_right(answer, truth)))
    if len(truth.replace("\n", "")) <= SHORT:
        score.short.append(score.right[-1])
    score.iou += overlaps(answer, truth)


def ask(model: qvl.Model, case: Case) -> str:
    """The model's answer to the last turn; earlier turns have their true answers."""
    *before, (question, _) = case.exchange.turns
    messages = []
    for asked, answered in before:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": question})
    slots = "".join(f"Picture {i + 1}: <img></img>\n" for i in range(len(case.pictures)))
    messages[0]["content"] = slots + messages[0]["content"]
    return model.generate(messages, case.pictures, max_new_tokens=160).text


def run(model: qvl.Model, test: Iterable[Case]) -> dict[tuple[str, str], Score]:
    """Scores by (skill, language)."""
    scores: dict[tuple[str, str], Score] = defaultdict(Score)
    for case in test:
        mark(case, ask(model, case), scores[case.skill, case.exchange.language])
    return scores


def percent(values: list[float]) -> float | None:
    return round(100 * float(np.mean(values)), 1) if values else None


def summary(scores: dict[tuple[str, str], Score]) -> dict:
    """Percentages by skill and language, and by group."""
    rows = {f"{skill} {language}": percent(s.right) for (skill, language), s in scores.items()}
    for group, skills in GROUPS.items():
        rows[group] = percent([r for (skill, _), s in scores.items() if skill in skills for r in s.right])
    short = [r for (skill, _), s in scores.items() if skill in READING for r in s.short]
    rows[f"reading, up to {SHORT} characters"] = percent(short)
    rows["boxes, each by itself"] = percent([v >= MIN_IOU for s in scores.values() for v in s.iou])
    rows["mean IoU"] = percent([v for s in scores.values() for v in s.iou])
    return rows


def prints_hanzi(skills: Iterable[str], kinds: Iterable[str]) -> str:
    """What of these skills and conversions prints Chinese at every level; "" if nothing does."""
    if READ_HANZI in skills:
        return f"the skill {READ_HANZI!r}"
    return next((f"the calibration of {kind!r}" for kind in kinds if kind.endswith("GPTQ")), "")


def columns(paths: list[Path], kinds: list[str], level: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every column, converted if needed."""
    for path in paths:
        if path.suffix == ".qvl":
            yield path.name, path
        else:
            convert(path, out := folder / f"{path.name}.qvl", bits=16)
            yield path.name, out
    for kind in [] if paths else kinds:
        if not (out := folder / f"{kind}.qvl").exists():
            recipe = KINDS[kind] | (calibrated(folder / "known", level) if kind.endswith("GPTQ") else {})
            convert(checkpoint_folder(), out, **recipe)
        yield kind, out


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--skills", nargs="+", choices=SKILLS, default=list(SKILLS))
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--level", choices=LEVELS, default="all", help="how hard the pictures are")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    check_level(parser, args.level, prints_hanzi(args.skills, [] if args.models else args.kinds))
    test = list(cases(args.seed, args.count, args.skills, args.level))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, blob in columns(args.models, args.kinds, args.level, Path(folder)):
            results[name] = summary(run(qvl.load(blob, args.device), test)) | {"bytes": blob.stat().st_size}
    print(f"{'right answers, %':30}" + "".join(f"{name:>15}" for name in results))
    for row in next(iter(results.values())):
        values = ("-" if r[row] is None else f"{r[row]:,}" for r in results.values())
        print(f"{row:30}" + "".join(f"{value:>15}" for value in values))
    harness.print_document(seed=args.seed, level=args.level, count=args.count, device=args.device, scores=results)


if __name__ == "__main__":
    main()
