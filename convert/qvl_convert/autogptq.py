"""Importing the published AutoGPTQ Int4 layout (version 1) without loss.

Per quantised linear: qweight int32 ``[k/8, n]`` (row r, bits 4i..4i+3 hold column ``8 r + i``), qzeros int32
``[groups, n/8]`` (the stored zero is one too small), scales fp16 ``[groups, n]``, g_idx int32 ``[k]``, bias fp16
``[n]``; ``w[n, k] = scales[g_idx[k], n] * (q - zero)``.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from qvl_convert.checkpoint import FLOATS, Checkpoint, read_json
from qvl_kernels.packing import BLOCK, SYMMETRIC_ZERO, Matrix, pack
from qvl_runtime.errors import QvlError
from qvl_runtime.families.specs import MatrixSpec

WORDS = (np.dtype(np.int32),)
REMEDY = "take the unquantised model, or its 4-bit AutoGPTQ files"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `quantize_config.json` says about the weights; a group size of -1 is one group a row."""

    group_size: int
    path: str


def settings(checkpoint: Checkpoint) -> Settings | None:
    """Read how a checkpoint was quantised; None when it was not.

    Raises
    ------
    QvlError
        For another method, layout or number of bits than AutoGPTQ's 4 bits, version 1.
    """
    path = checkpoint.folder / "quantize_config.json"
    if os.path.lexists(path):
        config: Any = read_json(path)
    else:
        path = checkpoint.folder / "config.json"
        config = checkpoint.raw_config.get("quantization_config")
        if config is None:
            return None
        if not isinstance(config, dict):
            raise QvlError(f"{path}: 'quantization_config' is {str(config)[:60]!r}, expected a section; {REMEDY}")
    for key, known in (
        ("quant_method", ("gptq",)),
        ("bits", (4,)),
        ("checkpoint_format", ("gptq",)),
        ("format", ("gptq",)),
        ("is_marlin_format", (False,)),
    ):
        if config.get(key, known[0]) not in known:
            raise QvlError(f"{path}: '{key}' is {str(config[key])[:60]!r}, only {known[0]!r} is read; {REMEDY}")
    group_size = config.get("group_size", -1)
    if type(group_size) is not int or (group_size != -1 and (group_size <= 0 or group_size % 32)):
        raise QvlError(f"{path}: 'group_size' is {str(group_size)[:60]!r}, expected -1 or a multiple of 32; {REMEDY}")
    return Settings(group_size, str(path))


def stored_group_size(group_size: int) -> int:
    """The group size in the blob: larger groups become several of the same scale."""
    if group_size == -1:
        return BLOCK
    return next(size for size in (128, 64, 32) if group_size % size == 0)


def layout(
    checkpoint: Checkpoint, quantized: Settings
) -> dict[str, dict[str, tuple[tuple[int, ...], tuple[np.dtype, ...]]]]:
    """The AutoGPTQ tensors of every quantised matrix: ``{matrix name: {tensor name: (shape, dtypes)}}``."""
    result = {}
    for spec in checkpoint.family.tensors(checkpoint.config):
        if not isinstance(spec, MatrixSpec) or spec.part != "decoder" or f"{spec.name}.qweight" not in checkpoint:
            continue
        if spec.k % 8 or spec.n % 8:
            raise QvlError(f"{checkpoint.folder}: {spec.name!r} is {spec.n} x {spec.k}, no multiples of 8; {REMEDY}")
        groups = 1 if quantized.group_size == -1 else -(-spec.k // quantized.group_size)
        wanted = {
            "qweight": ((spec.k // 8, spec.n), WORDS),
            "qzeros": ((groups, spec.n // 8), WORDS),
            "scales": ((groups, spec.n), (np.dtype(np.float16),)),
            "g_idx": ((spec.k,), WORDS),
            "bias": ((spec.n,), FLOATS),
        }
        if f"{spec.name}.bias" not in checkpoint and spec.bias is None:
            del wanted["bias"]
        result[spec.name] = {f"{spec.name}.{suffix}": value for suffix, value in wanted.items()}
    return result


def zeros(checkpoint: Checkpoint, spec: MatrixSpec) -> np.ndarray | None:
    """Zero points uint8 ``[n, groups]``, up to 16; None when all are the symmetric 8."""
    stored = _nibbles(np.ascontiguousarray(checkpoint.tensor(f"{spec.name}.qzeros")), axis=1) + 1
    return None if np.all(stored == SYMMETRIC_ZERO[4]) else np.ascontiguousarray(stored.T)


def perm(checkpoint: Checkpoint, spec: MatrixSpec, group_size: int) -> np.ndarray | None:
    """The order of the columns in which groups are contiguous, int32 ``[k]``; None when they are already."""
    groups = checkpoint.tensor(f"{spec.name}.g_idx")
    order = np.argsort(groups, kind="stable").astype(np.int32)
    wanted = np.arange(spec.k) // (spec.k if group_size == -1 else group_size)
    if not np.array_equal(groups[order], wanted):
        name = f"{spec.name}.g_idx"
        raise QvlError(f"{checkpoint.path(name)}: {name!r} does not fill groups of {group_size}; download it again")
    return None if np.array_equal(order, np.arange(spec.k)) else order


def read(checkpoint: Checkpoint, spec: MatrixSpec, group_size: int) -> Matrix:
    """Import one matrix.

    Raises
    ------
    QvlError
        When a scale is not finite, or `g_idx` describes no groups of `group_size`.
    """
    name = f"{spec.name}.scales"
    scales = np.ascontiguousarray(checkpoint.tensor(name).T)
    if not np.isfinite(scales).all():
        raise QvlError(f"{checkpoint.path(name)}: {name!r} holds a value that is not finite; download it again")
    codes = np.ascontiguousarray(_nibbles(checkpoint.tensor(f"{spec.name}.qweight"), axis=0).T)
    order, zero_points = perm(checkpoint, spec, group_size), zeros(checkpoint, spec)
    if order is not None:
        codes = codes[:, order]
    stored = stored_group_size(group_size)
    if group_size != stored:
        group_of = np.arange(0, spec.k, stored) // (spec.k if group_size == -1 else group_size)
        scales = scales[:, group_of]
        zero_points = None if zero_points is None else zero_points[:, group_of]
    name = f"{spec.name}.bias"
    bias = checkpoint.vector(name) if name in checkpoint else None
    return pack(codes, scales, 4, stored, zeros=zero_points, perm=order, bias=bias)


def _nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """Unpack int32 words into eight 4-bit values each, along an axis, lowest bits first."""
    octets = np.moveaxis(words, axis, -1)
    octets = np.ascontiguousarray(octets).astype("<i4", copy=False).view(np.uint8)
    values = np.stack([octets & 15, octets >> 4], axis=-1).reshape(*octets.shape[:-1], -1)
    return np.moveaxis(values, -1, axis)
