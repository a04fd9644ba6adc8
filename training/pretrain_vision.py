"""First stage: train the vision tower alone to recognize the contents of every cell of its feature grid.

nice -n 19 python training/pretrain_vision.py --out RUN --minutes 15
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from lexicon import LEVELS, scene_options
from model import QwenVL, Resampler, resample_grid, sincos_grid
from optimizer import build
from parallel import DEVICE, Progress, launch, share
from PIL import Image
from targets import CellHead, cell_targets

from qvl_runtime.demo.scenes import Scene, draw, random_scene

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
DRAWN_AT = (140, 168, 224, 224, 448)


def config() -> dict:
    """The shipped model's config.json, with the vocabulary as laid out by vocabulary.py."""
    return json.loads((Path(__file__).parent / "config.json").read_text())


def pixels_of(scene: Scene, size: int, side: int) -> np.ndarray:
    """The scene drawn at `side` and resized as the runtime does: uint8 [3, size, size]."""
    image = draw(scene, side).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to the model's input."""
    return (pixels.float() / 255 - MEAN.to(pixels.device)) / STD.to(pixels.device)


class Pictures:
    """Endless batches of (pixels, cell targets), from one seed."""

    def __init__(self, seed: int, batch: int, size: int, grid: int, level: str):
        self.seed, self.batch, self.size, self.grid, self.options = seed, batch, size, grid, scene_options(level)

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        while True:
            scenes = [random_scene(rng, text_share=0.4, **self.options) for _ in range(self.batch)]
            sides = rng.choice(DRAWN_AT, self.batch, p=(0.3, 0.3, 0.19, 0.19, 0.02))
            yield (
                torch.from_numpy(np.stack([pixels_of(s, self.size, int(d)) for s, d in zip(scenes, sides)])),
                torch.from_numpy(np.stack([cell_targets(s, self.grid) for s in scenes])),
            )


def localize(pool: Resampler, cells: int) -> None:
    """Initialize the adapter as an identity: query i attends to patch i and returns it.

    The query and key projections are fitted, for a minute at most, so that attention is diagonal for any
    patches; value and output projections are the identity.
    """
    width = pool.query.shape[1]
    with torch.no_grad():
        pool.ln_kv.weight.fill_(0.2)
        pool.attn.in_proj_weight[2 * width :] = torch.eye(width)
        pool.attn.out_proj.weight.copy_(torch.eye(width))
        pool.attn.out_proj.bias.zero_()
    weight = (torch.randn(2 * width, width) * width**-0.5).requires_grad_()
    query = pool.query.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, query], 3e-3)
    place = resample_grid(pool.pos_embed, cells)
    for _ in range(400):
        key = torch.randn(cells, width) * 0.2 + place
        q = torch.nn.functional.layer_norm(query, (width,)) + pool.pos_embed
        q, k = ((x @ w.T).view(cells, pool.heads, -1).transpose(0, 1) for x, w in zip((q, key), weight.chunk(2)))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.arange(cells).repeat(pool.heads))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"adapter starts as an identity: attention loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        pool.attn.in_proj_weight[: 2 * width] = weight
        pool.query.copy_(query)


def whiten(visual: torch.nn.Module, size: int, seed: int) -> None:
    """Initialize the patch embedding as a whitening of drawn patches: equal variance of the principal components."""
    patch, width = visual.conv1.kernel_size[0], visual.conv1.out_channels
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng, text_share=0.5) for _ in range(300)]
    pixels = normalize(torch.from_numpy(np.stack([pixels_of(s, size, 2 * size) for s in scenes])))
    patches = torch.nn.functional.unfold(pixels, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 0.02).sqrt()).T.flip(0)[:width]
    with torch.no_grad():
        visual.conv1.weight.copy_(filters.view_as(visual.conv1.weight))
        visual.positional_embedding.copy_(sincos_grid(16, width) * 0.5)


def new_model(seed: int) -> QwenVL:
    """Initial weights."""
    torch.manual_seed(seed)
    model = QwenVL(config())
    hidden, layers = model.config["hidden_size"], model.config["num_hidden_layers"]
    for name, p in model.named_parameters():
        if p.ndim == 2 and ".h." in name:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.3 / layers**0.5 if "c_proj" in name else 1))
        elif p.ndim == 2 and "resblocks" in name:
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.3 if "out_proj" in name or "c_proj" in name else 1))
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.3)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    visual = model.transformer.visual
    torch.nn.init.zeros_(model.transformer.h[0].attn.c_attn.bias)
    with torch.no_grad():
        visual.proj.copy_(torch.eye(hidden) * 0.5)
    whiten(visual, model.config["visual"]["image_size"], seed)
    localize(visual.attn_pool, visual.attn_pool.query.shape[0])
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--level", choices=LEVELS, default="all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = new_model(args.seed).to(DEVICE)
    visual = model.transformer.visual
    queries = visual.attn_pool.query.shape[0]
    grid = math.isqrt(queries)
    inner, outer = (CellHead(width).to(DEVICE) for width in (visual.conv1.out_channels, model.config["hidden_size"]))
    if (args.out / "vision.pt").exists():
        vision = torch.load(args.out / "vision.pt", map_location=DEVICE)
        visual.load_state_dict({k[19:]: v for k, v in vision["model"].items() if ".visual." in k})
        outer.load_state_dict(vision["head"])
    optimizers = build({"visual": visual, "inner": inner, "outer": outer})
    share([model, inner, outer], optimizers)
    progress = Progress(args.minutes)

    def batches(rank: int) -> Pictures:
        size = model.config["visual"]["image_size"]
        return Pictures(args.seed * 1000 + rank, args.batch, size, grid, args.level)

    def loss_of(batch):
        pixels, target = batch
        with torch.autocast(DEVICE.type, torch.bfloat16):
            patches, features = visual.both(normalize(pixels))
        loss, log = outer.loss(features, target)
        return loss + 0.5 * inner.loss(patches, target)[0], f"cells {loss.item():.2f} {log}"

    def schedule(step: int, done: float) -> float:
        return min(1, (step + 1) / 50, (1 - done) / 0.3 + 0.05)

    def after(step: int) -> None:
        if step % 100 < args.workers:
            save(args.out, model, outer)

    parameters = [p for m in (visual, inner, outer) for p in m.parameters()]
    launch(args.workers, args.out / "trainer.pid", progress, batches, loss_of, parameters, optimizers, schedule, after)
    save(args.out, model, outer)


def save(out: Path, model: QwenVL, head: CellHead) -> None:
    """Write the stage's result under a temporary name, then rename it."""
    torch.save({"model": model.state_dict(), "head": head.state_dict()}, out / "vision.partial")
    (out / "vision.partial").rename(out / "vision.pt")


if __name__ == "__main__":
    main()
