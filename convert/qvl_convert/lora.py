"""LoRA adapters of PEFT: low-rank updates that are added to a checkpoint's weights while reading.

``W + (alpha / r) B A`` for every pair ``MODULE.lora_A.weight [r, k]``, ``MODULE.lora_B.weight [n, r]``
(alpha / sqrt(r) with `use_rslora`), and whole tensors for `modules_to_save`. Hu et al. 2021.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from typing import Any

import ml_dtypes
import numpy as np

from qvl_convert.checkpoint import Checkpoint, open_weights, read_tensor
from qvl_runtime.errors import QvlError
from qvl_runtime.families.reading import read_json, take
from qvl_runtime.file.opening import as_path, open_regular

BF16 = np.dtype(ml_dtypes.bfloat16)
FILES = ("adapter_model.safetensors", "adapter_model.bin")
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
SAVED = re.compile(r"(?P<module>.+?)(\.modules_to_save(\.default)?)?\.(?P<kind>weight|bias)")
PREFIX = "base_model.model."
LARGEST = 1e6
"""Limit of `lora_alpha`, far beyond that of any adapter; merging does not overflow by it."""
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights")
"""Settings that `_Scaling` reads."""
HARMLESS = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
    *("megatron_config", "megatron_core", "runtime_config", "ensure_weight_tying"),
)
"""Settings of PEFT that do not change the sum: they name files and modules, or apply to the training alone."""
NEUTRAL: tuple[Any, ...] = (None, [], {}, "")
"""What every other setting must be, or False: PEFT writes all of them, and those of its variants are off like this."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Initial factors for which PEFT does not change the base weights, as it does for PiSSA, OLoRA, CorDA and LoftQ."""


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
        If the adapter is damaged, of another type, holds nothing, or does not match the base model.
    """

    def __init__(self, folder: str | os.PathLike, adapter: str | os.PathLike):
        super().__init__(folder)
        self._adapter = as_path(adapter)
        self._where = self._adapter / "adapter_config.json"
        config = read_json(self._where, "a PEFT adapter")
        self._scaling = _Scaling(config, str(self._where))
        path = next((self._adapter / name for name in FILES if os.path.lexists(self._adapter / name)), None)
        if path is None:
            raise QvlError(f"{self._adapter}: holds no {FILES[0]}; finish the download")
        self._path = path
        shard = open_weights(self._path)
        if not shard.entries:
            raise QvlError(f"{self._path}: holds no tensor; save the adapter again")
        self._low_rank: dict[str, dict[str, np.ndarray]] = {}
        self._saved: dict[str, np.ndarray] = {}
        for key in shard.entries:
            self._take(key.removeprefix(PREFIX), read_tensor(shard, key))
        for name, pair in self._low_rank.items():
            self._check_pair(name, pair)
        self._check_saved(config.get("modules_to_save"))

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
        merged += (b * np.float32(self._scaling(len(a)))) @ a
        return merged

    def fingerprint(self) -> dict[str, str]:
        """Return `Checkpoint.fingerprint` with the adapter's file and scaling."""
        digest = hashlib.sha256()
        with open_regular(self._path) as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        # The scaling at two ranks determines alpha and `use_rslora`.
        digest.update(f"{self._scaling(1)} {self._scaling(4)}".encode())
        return super().fingerprint() | {f"{self._adapter.name}/{self._path.name}": digest.hexdigest()[:32]}

    def _take(self, key: str, array: np.ndarray) -> None:
        low_rank, saved = LOW_RANK.fullmatch(key), SAVED.fullmatch(key)
        if low_rank:
            name = self._known_as(f"{low_rank['module']}.weight")
            twice = low_rank["side"] in self._low_rank.get(name, {}) or name in self._saved
            self._low_rank.setdefault(name, {})[low_rank["side"]] = array
        elif saved and ".lora_" not in key:
            name = self._known_as(f"{saved['module']}.{saved['kind']}")
            twice = name in self._saved or name in self._low_rank
            self._saved[name] = array
        else:
            raise QvlError(f"{self._path}: {key!r:.100} is no part of a LoRA adapter that is known; save a plain one")
        if f"{name.rpartition('.')[0]}.qweight" in self:
            raise QvlError(f"{self.folder}: is quantized, so no adapter can be merged; take the unquantized base model")
        if name not in self:
            raise QvlError(
                f"{self._path}: changes {name!r:.100}, which {self.folder} has not; do they belong together?"
            )
        if twice:
            raise QvlError(f"{self._path}: changes {name!r:.100} in two ways; only one can be meant: save it again")
        if array.dtype.kind != "f" and array.dtype != BF16:
            raise QvlError(f"{self._path}: {key!r:.100} is {array.dtype}, expected floating point; save it again")
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
        if self._scaling.rank not in (None, len(a)):
            raise QvlError(
                f"{self._path}: {name!r} has factors of rank {len(a)}, but 'r' is {self._scaling.rank} in "
                f"{self._where.name}; do they belong together?"
            )

    def _check_saved(self, modules: Any) -> None:
        """Refuse an adapter without the modules that it says it holds: the base's would be kept in their place."""
        for module in modules if isinstance(modules, list) else ():
            meant = [name for name in self.names if f".{module}." in f".{name}"]
            if meant and self._saved.keys().isdisjoint(meant):
                raise QvlError(
                    f"{self._path}: holds no {str(module)!r:.60}, which 'modules_to_save' in {self._where.name} names; "
                    "save the adapter again"
                )


class _Scaling:
    """What the product of an adapter's factors is multiplied with, from its ``adapter_config.json``.

    Attributes
    ----------
    rank : int or None
        The rank of all factors, if the file names it.
    """

    def __init__(self, config: dict[str, Any], where: str):
        kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
        if kind != "LORA":
            raise QvlError(f"{where}: 'peft_type' is {str(kind)[:40]!r}; only 'LORA' is merged")
        for key, value in config.items():
            off = value is False or value in NEUTRAL or (key, value) == ("bias", "none")
            if not off and key not in (*READ, *HARMLESS):
                raise QvlError(
                    f"{where}: {key!r:.60} is {str(value)[:60]!r}, which is not merged here; save a plain LoRA adapter"
                )
        if not (start is None or isinstance(start, bool) or str(start).lower() in PLAIN_STARTS):
            raise QvlError(
                f"{where}: 'init_lora_weights' is {str(start)[:40]!r}, with which training may have changed the base "
                "model: save it with PEFT's path_initial_model_for_weight_conversion, or set it to true if the folder "
                "to convert is the changed model"
            )
        self.rank = None if config.get("r") is None else take(config, "r", int, where)
        alpha = config.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not -LARGEST <= alpha <= LARGEST:
            raise QvlError(f"{where}: 'lora_alpha' is {str(alpha)[:40]!r}, expected a number up to {LARGEST:g}")
        self._alpha = alpha
        self._stabilized = config.get("use_rslora") is not None and take(config, "use_rslora", bool, where)

    def __call__(self, rank: int) -> float:
        """Return the scaling of factors of a rank."""
        return self._alpha / (math.sqrt(rank) if self._stabilized else rank)
