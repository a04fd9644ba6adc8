"""Export of a `.qvl` file as a Hugging Face folder: the decoder in AutoGPTQ's layout (version 1), the rest as fp16.

The inverse of `autogptq`: weights imported from an AutoGPTQ model are exported bit for bit. A 16-bit decoder becomes a
plain fp16 model. The model's Python files are not part of a `.qvl` file; tools that need them take them from the
original repository.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from qvl_convert.published import published_shapes, rows_by_head
from qvl_kernels.packing import SYMMETRIC_ZERO, Matrix, unpack_groups
from qvl_runtime.blob import Blob
from qvl_runtime.errors import QvlError
from qvl_runtime.families.specs import MatrixSpec, VectorSpec
from qvl_runtime.file.opening import as_path
from qvl_runtime.file.writing import unwritable

SHARD = 2 << 30
"""Bytes after which the next file begins."""

INDEX, SETTINGS = "model.safetensors.index.json", "quantize_config.json"
REMEDY = "export a file of 16 bits"
WEIGHTS = re.compile(r"(model-\d+-of-)?\d{5,}\.safetensors")
"""Weights, also under the names they have until their number is known."""


def export(blob: Blob, folder: str | os.PathLike, *, force: bool = False) -> None:
    """Write a model as a Hugging Face folder.

    Parameters
    ----------
    blob : Blob
    folder : path
        The folder to create, in one that exists; its temporary name is ``FOLDER.partial``.
    force : bool
        Replace `folder` and ``FOLDER.partial`` if they hold nothing but the files of an export.

    Raises
    ------
    QvlError
        If one of the two exists or may not be replaced, or AutoGPTQ's layout cannot hold the decoder: 3 bits, different
        bits or group sizes, or a matrix whose sides are not multiples of the values per 32-bit word. Also if the folder
        cannot be written, such as on a full disk; nothing is left then.
    """
    folder = as_path(folder)
    settings = _settings(blob)
    texts = _texts(blob, settings)
    if not os.path.isdir(folder.parent):  # also in "typo/../folder", which resolves to a folder that may exist
        raise QvlError(f"{folder}: its folder does not exist; create it first")
    _check_target(folder, blob, texts, force)
    target = Path(os.path.realpath(folder))
    partial = target.with_name(target.name + ".partial")
    _check_target(partial, blob, texts, force)
    try:
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        partial.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        _write_weights(_tensors(blob, settings is not None), partial)
        _write_texts(texts, partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise _unwritable(folder, error) from None
        raise
    try:
        _check_target(folder, blob, texts, force)
    except QvlError as error:  # another program has made it meanwhile
        raise QvlError(f"{error}; the export is complete in {partial}") from None
    if force and target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)


def _unwritable(folder: Path, error: Exception) -> QvlError:
    return unwritable(folder, error, "make room, or name another folder")


def _check_target(folder: Path, blob: Blob, texts: dict[str, Any], force: bool) -> None:
    """Refuse a folder that exists; with `force`, one that holds anything but the files of an export."""
    target = os.path.realpath(folder)
    if not (os.path.lexists(folder) or os.path.lexists(target)):
        return
    if not force:
        raise QvlError(f"{folder}: exists already; choose another name, or --force to replace it")
    for kept in (blob.path, os.curdir):
        if Path(os.path.realpath(kept)).is_relative_to(target):
            what = f"the file {kept}" if kept is blob.path else "the current folder"
            raise QvlError(f"{folder}: holds {what} and is not replaced; choose another name")
    if os.path.lexists(target) and not os.path.isdir(target):
        raise QvlError(f"{folder}: is a file and is not replaced; choose another name")
    known = {*texts, INDEX, SETTINGS}
    for entry in os.scandir(target) if os.path.isdir(target) else ():
        ours = entry.name in known or WEIGHTS.fullmatch(entry.name)
        if not (ours and entry.is_file(follow_symlinks=False)):
            why = "which is no regular file" if ours else "which no export writes"
            raise QvlError(f"{folder}: holds {entry.name!r:.100}, {why}, and is not replaced; choose another name")


def autogptq_arrays(matrix: Matrix, name: str) -> dict[str, np.ndarray]:
    """Convert a matrix to AutoGPTQ's layout.

    Parameters
    ----------
    matrix : Matrix
        A matrix of 4 or 8 bits.
    name : str
        Name for errors.

    Returns
    -------
    dict
        `qweight` int32 ``[k * bits / 32, n]``, `qzeros` int32 ``[groups, n * bits / 32]``, `scales` fp16
        ``[groups, n]``, `g_idx` int32 ``[k]`` and, if present, `bias` fp16 ``[n]``.
    """
    bits, group_size = matrix.bits, matrix.group_size
    if matrix.n % (32 // bits) or matrix.k % (32 // bits):
        raise QvlError(
            f"{name}: is {matrix.n} x {matrix.k}, no multiples of {32 // bits}, as AutoGPTQ's layout asks; {REMEDY}"
        )
    codes, g_idx = matrix.codes(), (np.arange(matrix.k) // group_size).astype(np.int32)
    if matrix.perm is not None:
        inverse = np.argsort(matrix.perm)
        codes, g_idx = codes[:, inverse], g_idx[inverse]
    assert matrix.scales is not None, "a quantized matrix has scales"
    scales = unpack_groups(matrix.scales, matrix.n, matrix.k, group_size)
    zeros = np.full(scales.shape, SYMMETRIC_ZERO[bits], np.uint8)
    if matrix.zeros is not None:
        zeros = unpack_groups(matrix.zeros, matrix.n, matrix.k, group_size)
        if not zeros.all():
            raise QvlError(f"{name}: has a zero point of 0, which AutoGPTQ's layout cannot represent; {REMEDY}")
    arrays = {
        "qweight": _words(codes, bits).T,
        "qzeros": _words((zeros - 1).T, bits),
        "scales": scales.T,
        "g_idx": g_idx,
    }
    if matrix.bias is not None:
        arrays["bias"] = matrix.bias.astype(np.float16)
    return {suffix: np.ascontiguousarray(array) for suffix, array in arrays.items()}


def _words(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 values ``[..., m]`` into int32 ``[..., m * bits / 32]``, lowest bits first."""
    if bits == 4:
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return np.ascontiguousarray(values).view("<i4").astype(np.int32, copy=False)


def _settings(blob: Blob) -> dict[str, Any] | None:
    """Return the content of `SETTINGS`; None for a 16-bit decoder."""
    specs = [s for s in blob.family.tensors(blob.config) if isinstance(s, MatrixSpec) and s.part == "decoder"]
    matrices = [blob.matrix(spec.name) for spec in specs]
    kinds = {(m.bits, m.group_size) for m in matrices}
    if len(kinds) > 1:
        shown = ", ".join(f"{bits} bits in groups of {size}" for bits, size in sorted(kinds))
        raise QvlError(
            f"{blob.path}: its decoder mixes {shown}; AutoGPTQ knows one kind: convert without --target-size"
        )
    ((bits, group_size),) = kinds
    if bits == 16:
        return None
    if bits == 3:  # AutoGPTQ packs 32 values in three words, which few programs read
        raise QvlError(f"{blob.path}: its decoder has 3 bits, which are not exported; convert with --bits 4, 8 or 16")
    return {
        "bits": bits,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": any(m.perm is not None for m in matrices),
        "static_groups": False,
        "sym": all(m.zeros is None for m in matrices),
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
    }


def _tensors(blob: Blob, quantized: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of the folder with its published name."""
    every = list(blob.family.tensors(blob.config))
    shapes = published_shapes(every)
    for _, group in itertools.groupby(every, lambda s: getattr(s, "source", s.name)):
        specs = list(group)
        spec = specs[0]
        if isinstance(spec, VectorSpec):
            yield spec.name, blob.vector(spec.name).astype(np.float16)
            continue
        matrices = [blob.matrix(part.name) for part in specs]
        if quantized and spec.part == "decoder":
            yield from _quantized(matrices[0], spec)
            continue
        weight = np.concatenate([m.weight if m.bits == 16 else m.dequantize().astype(np.float16) for m in matrices])
        biases = [m.bias for m in matrices if m.bias is not None]
        bias = np.concatenate(biases).astype(np.float16) if biases else None
        if spec.heads:
            order = np.argsort(rows_by_head(spec))
            weight, bias = weight[order], None if bias is None else bias[order]
        if bias is not None and not spec.bias and bias.any():
            raise QvlError(f"{spec.name}: has a bias, for which an unquantized model has no place; export it at 4 bits")
        for (source, rows), name in zip(_rows(spec, len(weight)), spec.biases or itertools.repeat("")):
            part = weight[rows].T if spec.transposed else weight[rows]
            yield source, np.ascontiguousarray(part).reshape(shapes[source])
            if bias is not None and spec.bias:
                yield name, bias[rows]


def _rows(spec: MatrixSpec, count: int) -> Iterator[tuple[str, slice]]:
    """Yield the published tensors of a matrix or stacked matrix, and the rows of each among `count`."""
    if len(spec.sources) == 1:
        yield spec.source, slice(0, count)
        return
    first = 0
    for source, rows in spec.sources.items():
        yield source, slice(first, first + rows)
        first += rows


def _quantized(matrix: Matrix, spec: MatrixSpec) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a matrix in AutoGPTQ's layout, one linear layer for each of its sources."""
    arrays = autogptq_arrays(matrix, spec.name)
    per_word = 32 // matrix.bits
    for source, rows in _rows(spec, matrix.n):
        base = source.removesuffix(".weight")
        for suffix, array in arrays.items():
            if suffix == "qzeros":
                array = array[:, rows.start // per_word : rows.stop // per_word]
            elif suffix != "g_idx":
                array = array[..., rows]
            yield f"{base}.{suffix}", np.ascontiguousarray(array)


def _write_weights(arrays: Iterator[tuple[str, np.ndarray]], folder: Path) -> None:
    """Write files of about `SHARD` bytes, and their index."""
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        path = folder / f"{len(shards):05}.safetensors"
        path.touch()
        mode = path.stat().st_mode
        save_file(held, path, {"format": "pt"})
        path.chmod(mode)  # safetensors creates a private file
        shards.append(list(held))
        held.clear()

    total = 0
    for name, array in arrays:
        held[name] = array
        total += array.nbytes
        if sum(a.nbytes for a in held.values()) >= SHARD:
            flush()
    if held:
        flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"{i:05}.safetensors").rename(folder / name)
    index = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def _texts(blob: Blob, settings: dict[str, Any] | None) -> dict[str, Any]:
    """Return config, generation config, tokenizer, and further files of the family, by name."""
    preprocessing = blob.metadata["preprocessing"]
    found = blob.family.published_files(blob.config, blob.generation_config, preprocessing, blob.ranks)
    if settings is not None:
        found["config.json"]["quantization_config"] = settings
        found[SETTINGS] = settings
    return found


def _write_texts(texts: dict[str, Any], folder: Path) -> None:
    for name, content in texts.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            _write_json(folder / name, content)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
