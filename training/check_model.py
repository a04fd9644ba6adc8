"""Compare the training model's arithmetic with recorded outputs of the published code.

python training/check_model.py GOLDEN_FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from model import QwenVL
from PIL import Image
from safetensors.torch import load_file

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def load(folder: Path) -> QwenVL:
    """The checkpoint in `folder`, float32; every tensor must be used and none be missing."""
    model = QwenVL(json.loads((folder / "config.json").read_text()))
    state = {k: v.float() for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}
    model.load_state_dict(state)
    return model.eval()


def pixels(path: Path, size: int) -> torch.Tensor:
    """A picture as the model sees it: float32 [3, size, size]."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - MEAN) / STD


def main() -> None:
    golden = Path(sys.argv[1])
    model = load(golden / "ckpt/tiny-vl")
    for case in json.loads((golden / "vis/index.json").read_text())["cases"]:
        if case["ckpt"] == "tiny-vl":
            stored = np.load(golden / "vis" / case["file"])
            batch = torch.stack([pixels(golden / name, case["image_size"]) for name in case["images"]])
            final = model.transformer.visual(batch).detach().numpy()
            want = stored["final"]
            if want.shape != final.shape:
                final = final[:, stored["qrows"]]
            print(f"vision {case['variant']:8} max error {np.abs(final - want).max():.2e}")
    for case in json.loads((golden / "lm/index.json").read_text())["cases"]:
        if case["ckpt"] == "tiny-vl" and case["batch"] == 1 and case["variant"] == "base":
            stored = np.load(golden / "lm" / case["file"])
            ids = torch.from_numpy(stored["input_ids"].astype(np.int64))
            names = re.findall(r"<img>(.*?)</img>", case["text"] or "")
            batch = torch.stack([pixels(golden / n, 448) for n in names]) if names else None
            got = model(ids, batch)[0].detach().numpy()
            error = np.abs(got[stored["pos"]] - stored["logits"].reshape(-1, got.shape[1])).max()
            print(f"logits {case['case']:12} max error {error:.2e}")


if __name__ == "__main__":
    main()
