"""What the tests of the newer families share: their golden data, by checkpoint."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from qvl_runtime.families.qwen2_5_vl.config import Qwen25Config
from qvl_runtime.families.qwen2_vl.config import ModelConfig
from qvl_runtime.families.qwen3_vl.config import Qwen3Config

GOLDEN = Path(__file__).parent / "golden" / "families"
CHECKPOINTS = ("q2-tied", "q2-untied", "q25-tied", "q25-untied", "q3-tied", "q3-untied")
CONFIGS = {"q2": ModelConfig, "q25": Qwen25Config, "q3": Qwen3Config}


@functools.cache
def read(name: str) -> Any:
    """A JSON file of the golden data."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def config_class(name: str) -> type[ModelConfig]:
    """The class of a checkpoint's config, by the family its name begins with."""
    return CONFIGS[name.partition("-")[0]]


def config(name: str) -> ModelConfig:
    """A checkpoint's config."""
    return config_class(name).from_dict(read(f"ckpt/{name}/config.json"))
