"""LoRA adapters of PEFT: low-rank updates that are added to a checkpoint's weights while reading.

``W + (alpha / r) B A`` for every pair ``MODULE.lora_A.weight [r, k]``, ``MODULE.lora_B.weight [n, r]``
(alpha / sqrt(r) with `use_rslora`), and whole tensors for `modules_to_save`. Hu et al. 2021.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from qvl_convert.checkpoint import Checkpoint, open_weights, read_json, read_tensor
from qvl_runtime.errors import QvlError
from qvl_runtime.file.opening import as_path, open_regular

FILES = ("adapter_model.safetensors", "adapter_model.bin")
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save(\.default)?)?\.(?P<kind>weight|bias)")
PREFIX = "base_model.model."
LARGEST = 1e6
"""Limit of `lora_alpha`, far beyond that of any adapter; merging does not overflow by it."""
UNKNOWN = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}


class Merged(Checkpoint):
    """A checkpoint with a LoRA adapter added to its weights.

    Parameters
    ----------
    folder : path
        The unquantized base model.
    adapter : path
        Folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

    Raises
    ------
    QvlError
        If the adapter is damaged, of another type, or does not match the base model.
    """

    def __init__(self, folder: str | os.PathLike, adapter: str | os.PathLike):
        super().__init__(folder)
        self._adapter = as_path(adapter)
        self._where = self._adapter / "adapter_config.json"
        self._factor = _factor(read_json(self._where, "a PEFT adapter"), str(self._where))
        path = next((self._adapter / name for name in FILES if os.path.lexists(self._adapter / name)), None)
        if path is None:
            raise QvlError(f"{self._adapter}: holds no {FILES[0]}; finish the download")
        self._path = path
        shard = open_weights(self._path)
        self._low_rank: dict[str, dict[str, np.ndarray]] = {}
        self._saved: dict[str, np.ndarray] = {}
        for key in shard.entries:
            self._take(key.removeprefix(PREFIX), read_tensor(shard, key))
        for name, pair in self._low_rank.items():
            self._check_pair(name, pair)

    def origin(self, name: str) -> str:
        """Return file and name of a tensor as `Checkpoint.origin` does; with the adapter's file if that changes it."""
        if name in self._saved:
            return f"{self._path}: {name!r}"
        return super().origin(name) + (f" with the adapter {self._path}" if name in self._low_rank else "")

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor as `Checkpoint.tensor` does; float32 if the adapter changes it."""
        if name in self._saved:
            return self._saved[name]
        weight = super().tensor(name)
        if name not in self._low_rank:
            return weight
        a, b = (self._low_rank[name][side].astype(np.float32) for side in "AB")
        merged = weight.astype(np.float32)
        merged += (b * np.float32(self._factor(len(a)))) @ a
        return merged

    def fingerprint(self) -> dict[str, str]:
        """Return `Checkpoint.fingerprint` with the adapter's file and scaling."""
        digest = hashlib.sha256()
        with open_regular(self._path) as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        # The scaling at two ranks determines alpha and `use_rslora`.
        digest.update(f"{self._factor(1)} {self._factor(4)}".encode())
        return super().fingerprint() | {f"{self._adapter.name}/{self._path.name}": digest.hexdigest()[:32]}

    def _take(self, key: str, array: np.ndarray) -> None:
        low_rank, saved = LOW_RANK.fullmatch(key), SAVED.fullmatch(key)
        if low_rank:
            name = self._known_as(f"{low_rank['module']}.weight")
            self._low_rank.setdefault(name, {})[low_rank["side"]] = array
        elif saved and ".lora_" not in key:
            name = self._known_as(f"{saved['module']}.{saved['kind']}")
            self._saved[name] = array
        else:
            raise QvlError(f"{self._path}: {key!r:.100} is no part of a LoRA adapter that this program knows")
        if f"{name.rpartition('.')[0]}.qweight" in self:
            raise QvlError(f"{self.folder}: is quantized, so no adapter can be merged; take the unquantized base model")
        if name not in self:
            raise QvlError(
                f"{self._path}: changes {name!r:.100}, which {self.folder} has not; do they belong together?"
            )
        if not np.isfinite(array).all():
            raise QvlError(f"{self._path}: {key!r} holds a value that is not finite; download the adapter again")
        if name in self._saved and array.shape != self.entry(name).shape:
            raise QvlError(
                f"{self._path}: {name!r} has the shape {list(array.shape)}, the base model's is "
                f"{list(self.entry(name).shape)}; do they belong together?"
            )

    def _known_as(self, name: str) -> str:
        """Return the base model's name of a tensor, for either naming of the adapter."""
        return self._name(name) or name

    def _check_pair(self, name: str, pair: dict[str, np.ndarray]) -> None:
        shape = self.entry(name).shape
        if set(pair) != {"A", "B"}:
            raise QvlError(f"{self._path}: {name!r} has lora_{next(iter(pair))} alone; finish the download")
        a, b = pair["A"], pair["B"]
        if (
            a.ndim != 2
            or b.ndim != 2
            or not len(a)
            or len(a) != b.shape[1]
            or len(shape) != 2
            or (len(b), a.shape[1]) != shape
        ):
            raise QvlError(
                f"{self._path}: {name!r} has factors of {list(b.shape)} and {list(a.shape)} for the base model's "
                f"{list(shape)}; do they belong together?"
            )


def _factor(config: dict[str, Any], where: str) -> Callable[[int], float]:
    """Return the scaling of an adapter as a function of its rank."""
    if config.get("peft_type", "LORA") != "LORA":
        raise QvlError(f"{where}: 'peft_type' is {str(config['peft_type'])[:40]!r}; only 'LORA' is merged")
    for key, known in UNKNOWN.items():
        if config.get(key) not in (None, known):
            raise QvlError(
                f"{where}: '{key}' is {str(config[key])[:60]!r}, only {known!r} is merged; merge it with PEFT"
            )
    alpha, rslora = config.get("lora_alpha"), bool(config.get("use_rslora"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -LARGEST <= alpha <= LARGEST:
        raise QvlError(f"{where}: 'lora_alpha' is {str(alpha)[:40]!r}, expected a number up to {LARGEST:g}")
    return lambda rank: alpha / (math.sqrt(rank) if rslora else rank)
