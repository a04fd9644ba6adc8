"""Writes a small checkpoint of any shape, with random weights, in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.qwen_vl.tensors import tensors
from qvl_runtime.families.specs import VectorSpec

TEMPLATE = Path(__file__).parent / "golden" / "ckpt" / "tiny-vl"


def write_checkpoint(folder: Path, seed: int, *, visual: dict, **overrides) -> Path:
    """A golden checkpoint's config with values replaced, and weights that keep activations near 1."""
    folder.mkdir(parents=True)
    raw = json.loads((TEMPLATE / "config.json").read_text())
    raw |= overrides
    raw["visual"] |= visual | {"output_dim": raw["hidden_size"]}
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("generation_config.json", "qwen.tiktoken"):
        (folder / name).write_bytes((TEMPLATE / name).read_bytes())
    config, rng, weights = ModelConfig.from_dict(raw), np.random.default_rng(seed), {}

    def noise(shape: tuple[int, ...], scale: float, mean: float = 0.0) -> np.ndarray:
        return (mean + scale * rng.standard_normal(shape)).astype(np.float32)

    for spec in tensors(config):
        if isinstance(spec, VectorSpec):
            gain = len(spec.shape) == 1 and spec.name.endswith("weight")
            weights[spec.name] = noise(spec.shape, 0.1, 1.0) if gain else noise(spec.shape, 0.3)
        elif spec.source not in weights:
            stacked = spec.n * (3 if spec.source.endswith("in_proj_weight") else 1)
            weight = noise((stacked, spec.k), spec.k**-0.5)
            if spec.source.endswith("conv1.weight"):
                weight = weight.reshape(stacked, 3, config.visual.patch_size, -1)
            weights[spec.source] = np.ascontiguousarray(weight.T) if spec.transposed else weight
            for bias in spec.biases:
                weights[bias] = noise((stacked,), 0.1)
    save_file(weights, folder / "model.safetensors")
    return folder
