"""Write the shipped model's MODEL_CARD.md from the scores of bench/skills.py.

python bench/skills.py | tee scores.txt && python training/card.py scores.txt qvl_runtime/demo
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

TEXT = """# The demo model

A Qwen-VL of {parameters:.1f} million parameters: the architecture, tensor names and config keys of the real one at toy
size (ViT {width} wide, {vision_layers} layers, {image_size} x {image_size} pixels; {queries} queries; decoder {hidden}
wide, {layers} layers; vocabulary {vocabulary}). It knows one little world, drawn by `qvl_runtime/demo/scenes.py`: eight
shapes in eight colours on textured, cluttered and noisy grounds, and printed digits, capital letters and 48 Chinese
characters. It was made to show and to test this runtime, not to be useful.

Its prompts are those of Qwen-VL-Chat; `Picture 1: <img></img>` and a question without chat turns work too. Boxes are
in steps of 10 thousandths.

## How it was made

Trained from nothing on two CPU cores in four and a half hours, of which other work took about a third; `training.log`
is the whole log. No outside data: all pictures and sentences come from the generator. Fonts: the one built into Pillow,
DejaVu, and WenQuanYi Micro Hei.

    python training/vocabulary.py RUN/qwen.tiktoken
    python training/pretrain_vision.py --out RUN --minutes 60 --seed 11
    python training/train.py --out RUN --minutes 210 --seed 22
    python training/export.py RUN qvl_runtime/demo

These commands are what was done, straightened out: the log shows three vision runs (seeds 11 to 13) and many joint ones
(seeds 21 to 38), each going on from the one before. The last ones, 142 minutes from step 5305 on, told one layer of the
decoder where to look (`gaze.py`), which brought boxes from 11% to what is below, and asked more of what was still
wrong; the later ones had the vision tower at Muon 0.006 and AdamW 1.2e-3, more than `train.py` gives it. Two training
processes also update the weights in an order that no seed decides. So another run gives another model of the same kind.

## What it can do

Share of right answers in percent on freshly drawn pictures (`bench/skills.py --level "{level}" --seed {seed}`,
{count} questions a skill and language). Exact match; `find` and `ground`: every box with an IoU of at least 0.5 and
the right name. GPTQ calibrated on conversations of the same world.

{table}

## Limits

{limits}
Outside its own world it will say something, and it will be wrong.

License: Apache-2.0, like the rest of the package.
"""


BARS = {
    "boxes, each by itself": 92,
    "mean IoU": 80,
    "attributes and counting": 95,
    "reading, up to 8 characters": 90,
    "comparison": 90,
    "absent": 90,
}


def limits(scores: dict) -> str:
    """The bars set for the model beside what it reaches."""
    parts = [f"{name} {bar} / {scores[name]:.1f}" for name, bar in BARS.items()]
    return textwrap.fill(f"The bars set for it / what it reaches in fp16: {', '.join(parts)}.", 120)


def table(scores: dict[str, dict]) -> str:
    """The scores as a Markdown table: skills as rows."""
    rows = ["| | " + " | ".join(scores) + " |", "|---|" + "---:|" * len(scores)]
    for row in next(iter(scores.values())):
        if row != "bytes":
            values = ("-" if s[row] is None else f"{s[row]:.1f}" for s in scores.values())
            rows.append(f"| {row} | " + " | ".join(values) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scores", type=Path, help="what skills.py printed")
    parser.add_argument("folder", type=Path, help="the exported model")
    args = parser.parse_args()
    document = json.loads(args.scores.read_text().strip().splitlines()[-1])
    config = json.loads((args.folder / "config.json").read_text())
    index = json.loads((args.folder / "model.safetensors.index.json").read_text())
    visual = config["visual"]
    card = TEXT.format(
        parameters=index["metadata"]["total_size"] / 2e6,
        width=visual["width"],
        vision_layers=visual["layers"],
        image_size=visual["image_size"],
        queries=visual["n_queries"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        vocabulary=config["vocab_size"],
        level=document["level"],
        seed=document["seed"],
        count=document["count"],
        table=table(document["scores"]),
        limits=limits(document["scores"]["fp16"]),
    )
    (args.folder / "MODEL_CARD.md").write_text(card)


if __name__ == "__main__":
    main()
