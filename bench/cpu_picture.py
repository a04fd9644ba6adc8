"""Compare a picture through our ViT and adapter with the same network in PyTorch, in turns in one process.

    pip install torch
    python bench/cpu_picture.py MODEL.qvl [--dtype bfloat16] [--threads 2] [--rounds 3] [--realtime]

PyTorch's network is `training/model.py` with the published shapes and random weights. A processor without products of
bf16 emulates them, some 25 times slower than float32: compare with float32 there.
A table, then one JSON document as the last line; the ratio is the median over the rounds.
"""

from __future__ import annotations

import os
import time

import harness
import numpy as np
import torch
from synthetic import published_config

from qvl_runtime import load
from training import model as network


def their_tower(visual: dict, dtype: torch.dtype) -> network.VisionTower:
    """With random weights."""
    resample, before = network.resample_grid, torch.get_default_dtype()
    # Positions are resampled in float32; without autocast they must be cast back.
    network.resample_grid = lambda table, cells: resample(table, cells).to(table.dtype)
    torch.set_default_dtype(dtype)
    try:
        return network.VisionTower(**visual).to(dtype).eval()
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of PyTorch's network")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    harness.add_timing(parser, rounds=3)
    arguments = parser.parse_args()
    os.environ["QVL_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    dtype, name = getattr(torch, arguments.dtype), f"torch {arguments.dtype}"
    ours, theirs = load(arguments.model, device="cpu"), their_tower(published_config()["visual"], dtype)
    side, random = ours.config.visual.image_size, np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"ours": [], name: []}
    for turn in range(arguments.rounds + 1):
        if arguments.realtime and turn == 1:
            harness.take_processors()
        picture = random.integers(0, 256, (side, side, 3), np.uint8)
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].to(dtype) / 128 - 1
        begin = time.perf_counter()
        ours.encode_image(picture)
        middle = time.perf_counter()
        with torch.inference_mode():
            theirs(pixels)
        for who, taken in zip(seconds, (middle - begin, time.perf_counter() - middle)):
            seconds[who].append(taken)
    # The first round fills the caches and maps the pages of the file.
    kept = {who: np.array(values[1:]) for who, values in seconds.items()}
    row = {who: float(np.median(values)) for who, values in kept.items()}
    row["ours / torch"] = float(np.median(kept["ours"] / kept[name]))
    harness.print_row(row)
    conditions = {"torch": torch.__version__, "threads": arguments.threads, "rounds": arguments.rounds}
    harness.print_document(**conditions, results=row)


if __name__ == "__main__":
    main()
