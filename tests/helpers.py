"""Helpers of several test files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qvl_convert.convert import convert
from qvl_runtime.errors import QvlError


def sha256(data: bytes | np.ndarray | Path) -> str:
    """The hash of bytes, of an array's values, or of a file."""
    if isinstance(data, Path):
        data = data.read_bytes()
    return hashlib.sha256(data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()).hexdigest()


def dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | int, group_size: int) -> np.ndarray:
    """``scale * (code - zero)``, float32."""
    group = np.arange(codes.shape[1]) // group_size
    offset = zeros.astype(np.float32)[:, group] if isinstance(zeros, np.ndarray) else zeros
    return (codes.astype(np.float32) - offset) * scales.astype(np.float32)[:, group]


def output_error(weight: np.ndarray, quantized: np.ndarray, hessian: np.ndarray) -> float:
    """``|X (W - Q)^T|^2 / |X W^T|^2`` for inputs with this Hessian."""
    change = weight - quantized
    return float(np.vdot(change @ hessian, change) / np.vdot(weight @ hessian, weight))


def refused(action: Callable[[], object], *parts: str) -> None:
    """An action fails with one line that holds all the parts."""
    with pytest.raises(QvlError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, message


def conversion_refused(source: Path, out: Path, *parts: str, **options: Any) -> None:
    """A conversion fails with one line that holds all the parts, and leaves nothing behind."""
    before = sorted(out.parent.iterdir()) if out.parent.exists() else []
    refused(lambda: convert(source, out, **options), *parts)
    assert (sorted(out.parent.iterdir()) if out.parent.exists() else []) == before


def linked(source: Path, folder: Path, *without: str, **config: Any) -> Path:
    """Make a checkpoint of links to another's files, without some of them, and with other values in its config."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name not in without:
            (folder / file.name).symlink_to(file)
    if config:
        values = json.loads((source / "config.json").read_text()) | config
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(values))
    return folder


class Failing:
    """A constraint that allows every token, and fails at the fourth."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.steps = vocab_size, 0

    def start(self, *asked: object) -> Failing:
        self.steps = 0
        return self

    def allowed(self) -> np.ndarray:
        self.steps += 1
        if self.steps == 4:
            raise RuntimeError("no way on")
        return np.ones(self.vocab_size, bool)

    def advance(self, token: int) -> None:
        pass
