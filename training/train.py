"""Second stage: pictures and conversations together.

nice -n 19 python training/train.py --out RUN --minutes 80

RUN contains the first stage's vision.pt. The learning rate depends on elapsed time, so that the run ends as planned on
a busy machine, too. A run that was stopped resumes from RUN/state.pt.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import time
from collections import defaultdict
from pathlib import Path

import gaze
import torch
import torch.nn.functional as F
from lexicon import LEVELS
from model import QwenVL
from optimizer import build
from parallel import DEVICE, Progress, launch, share, uploaded
from pretrain_vision import config, normalize
from rows import Rows, Writer, attention_mask
from targets import CellHead
from vocabulary import read

BOX = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")


def iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Intersection over union of two boxes."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, w) * max(0, h)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared + 1e-9)


def forward(model, head, batch):
    """Logits before each weighted token, these tokens, their weights, and the losses of cells and attention."""
    ids, positions, segment, weight, pixels, cells, where, wanted, *counts, _ = batch
    with torch.autocast(DEVICE.type, torch.bfloat16):
        features = model.transformer.visual(normalize(pixels))
        rows, columns = (weight > 0).nonzero(as_tuple=True)
        asked = (ids == model.config["visual"]["image_start_id"]).sum()
        mask = attention_mask(segment)
        hidden = model.hidden(ids, features[:asked], positions, mask, (rows, columns - 1))
        logits = model.lm_head(hidden).float()
    cell_loss, log = head.loss(features, cells)
    q, k = model.transformer.h[gaze.LAYER].attn.seen
    gaze_loss, seen = gaze.loss(q, k, where, wanted)
    count_loss, off = gaze.counting_loss(q, k, mask, *counts)
    extra = 0.5 * cell_loss + 0.3 * gaze_loss + 0.3 * count_loss
    return logits, ids[rows, columns], weight[rows, columns], rows, segment[rows, columns], extra, f"{seen} {off} {log}"


@torch.no_grad()
def evaluate(model, head, batches, encoding) -> str:
    """Exact match by skill and language with the true answer fed back; boxes: the share with IoU >= 0.5."""
    score = defaultdict(list)
    for batch in batches:
        logits, ids, _, rows, segments, _, _ = forward(model, head, batch)
        best = logits.argmax(-1)
        for row, exchanges in enumerate(batch[-1]):
            for i, exchange in enumerate(exchanges):
                chosen = (rows == row) & (segments == i + 1)
                said, true = (
                    encoding.decode([t for t in x[chosen].tolist() if t < encoding.n_vocab]) for x in (best, ids)
                )
                want, got = ([tuple(map(int, m)) for m in BOX.findall(t)] for t in (true, said))
                if exchange.skill in ("find", "ground"):
                    good = len(want) == len(got) and all(iou(a, b) >= 0.5 for a, b in zip(want, got))
                else:
                    good = said == true
                score[exchange.skill].append(good)
                score[exchange.language].append(good)
    return " ".join(f"{k} {100 * sum(v) / len(v):.0f}" for k, v in sorted(score.items()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--level", choices=LEVELS, default="all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    saved = args.out / "state.pt"
    state = torch.load(saved, map_location=DEVICE) if saved.exists() else None
    model = QwenVL(config()).to(DEVICE)
    grid = math.isqrt(model.config["visual"]["n_queries"])
    head = CellHead(model.config["hidden_size"]).to(DEVICE)
    optimizers = build({"model": model, "probe": head}, rate=0.4, vision=0.3)
    if state:
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        for optimizer, old in zip(optimizers, state["optimisers"]):
            optimizer.load_state_dict(old)
        progress = Progress(args.minutes, state["step"], state["begin"])
    else:
        vision = torch.load(args.out / "vision.pt", map_location=DEVICE)
        model.load_state_dict(vision["model"])
        head.load_state_dict(vision["head"])
        progress = Progress(args.minutes)
    share([model, head], optimizers)
    encoding = read(args.out / "qwen.tiktoken")
    size, queries = model.config["visual"]["image_size"], model.config["visual"]["n_queries"]
    writer = Writer(encoding, queries)
    first = progress.counter.value

    def rows(seed: int, batch: int) -> Rows:
        return Rows(writer, seed, batch, args.length, size, grid, args.level)

    held_out = list(itertools.islice(uploaded(rows(10**6, 24)), 4))

    def batches(rank: int) -> Rows:
        return rows(args.seed * 10**6 + first * 10 + rank, args.batch)

    def loss_of(batch):
        logits, ids, weight, _, _, extra, log = forward(model, head, batch)
        loss = (F.cross_entropy(logits, ids, reduction="none") * weight).sum() / weight.sum()
        return loss + extra, f"words {loss.item():.3f} {log}"

    def schedule(step: int, done: float) -> float:
        return min(1, (step + 1) / 100, 1.4 * (1 - done) + 0.02)

    last = {"save": time.time(), "test": first}

    def after(step: int) -> None:
        if time.time() - last["save"] > 180:
            save(saved, model, head, optimizers, progress)
            last["save"] = time.time()
        if step - last["test"] >= 200:
            print(f"step {step} held out: {evaluate(model, head, held_out, encoding)}", flush=True)
            last["test"] = step

    launch(
        args.workers, args.out / "trainer.pid",
        progress, batches, loss_of, list(model.parameters()), optimizers, schedule, after,
    )  # fmt: skip
    save(saved, model, head, optimizers, progress)
    print(f"step {progress.counter.value} held out: {evaluate(model, head, held_out, encoding)}", flush=True)


def save(path: Path, model, head, optimizers, progress: Progress) -> None:
    """Write the state under a temporary name, then rename it."""
    state = {
        "model": model.state_dict(), "head": head.state_dict(), "begin": progress.begin,
        "step": progress.counter.value, "optimisers": [o.state_dict() for o in optimizers],
    }  # fmt: skip
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


if __name__ == "__main__":
    main()
