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
wide, {layers} layers; vocabulary {vocabulary}). It was trained only on pictures that `qvl_runtime/demo/scenes.py`
draws: eight shapes in eight colors on textured, cluttered and noisy backgrounds, and printed digits, capital letters
and 48 Chinese characters. Its purpose is to demonstrate and test this runtime; it has no other use.

Its prompts are those of Qwen-VL-Chat; `Picture 1: <img></img>` and a question without chat turns work too. Box
coordinates are multiples of 10 thousandths.

## How it was made

Trained from random weights on two CPU cores in four and a half hours, of which other programs used about a third;
`training.log` is the complete log. There are no external data: the generator makes all pictures and sentences. Fonts:
the one built into Pillow, DejaVu, and WenQuanYi Micro Hei.

    python training/vocabulary.py RUN/qwen.tiktoken
    python training/pretrain_vision.py --out RUN --minutes 60 --seed 11
    python training/train.py --out RUN --minutes 210 --seed 22
    python training/export.py RUN qvl_runtime/demo

These commands are a simplified form of what was done. The log shows three vision runs (seeds 11 to 13) and many joint
runs (seeds 21 to 38), each continuing the one before. The last ones, 142 minutes from step 5305 on, supervised the
attention of one decoder layer (`gaze.py`), which raised boxes from 11% to the value below, and asked more of the
questions that were still answered wrong. The later ones trained the vision tower with Muon 0.006 and AdamW 1.2e-3, more
than in `train.py`. Two training processes update the weights in an order that no seed determines, so another run gives
a different model of the same kind.

## What it can do

Share of right answers in percent on newly drawn pictures (`bench/skills.py --level "{level}" --seed {seed}`,
{count} questions a skill and language). Exact match; `find` and `ground`: every box with an IoU of at least 0.5 and
the right name. GPTQ was calibrated on conversations about such pictures.

{table}

## Limits

{limits}
It answers questions about any other picture, too, but wrongly.

License: Apache-2.0, like the rest of the package.
"""


TARGETS = {
    "boxes, each by itself": 92,
    "mean IoU": 80,
    "attributes and counting": 95,
    "reading, up to 8 characters": 90,
    "comparison": 90,
    "absent": 90,
}


def limits(scores: dict) -> str:
    """The target scores and the reached ones."""
    parts = [f"{name} {target} / {scores[name]:.1f}" for name, target in TARGETS.items()]
    return textwrap.fill(f"Target / reached score in fp16: {', '.join(parts)}.", 120)


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
