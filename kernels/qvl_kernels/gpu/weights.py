"""Packed matrices on the device: the blob's bytes, reordered on the device for the tensor cores; int3 becomes int4.

`signatures` describes the layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from qvl_kernels.gpu.arrays import DeviceArray
from qvl_kernels.gpu.driver import Driver
from qvl_kernels.gpu.graph import Queue
from qvl_kernels.gpu.launcher import Launcher
from qvl_kernels.gpu.memory import Memory, Uploader
from qvl_kernels.gpu.signatures import ELEMENTS, HAS_ZEROS, ROW_PADDING
from qvl_kernels.packing import BLOCK, ROWS, SYMMETRIC_ZERO, Matrix, product_bits, round_up, widen

STAGE = 32 << 20
"""Size of the device's buffer for bytes before reordering."""

_MAX_GRID = 65535
"""Largest second dimension of a grid (CUDA C programming guide, compute capabilities)."""


class Device(Protocol):
    """The part of a backend that uploads need."""

    driver: Driver
    memory: Memory
    queue: Queue
    launch: Launcher
    uploader: Uploader


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceMatrix:
    """A weight ``[n, k]`` on the device.

    Attributes
    ----------
    kind : str
        Variant of the kernels: "int4", "int8", "fp16", with "_fine" for groups under 128.
    rows, blocks : int
        Padded sizes: rows, and number of blocks of 128 columns.
    group_shift : int
        log2(group_size / 32).
    codes : DeviceArray
    scales, perm, bias : DeviceArray or None
    order : bytes
        Identifies `perm`: equal for weights with the same column order.
    """

    n: int
    k: int
    kind: str
    rows: int
    blocks: int
    group_shift: int
    codes: DeviceArray
    scales: DeviceArray | None
    perm: DeviceArray | None
    bias: DeviceArray | None
    order: bytes

    @property
    def padded(self) -> int:
        """Number of columns of padded activations."""
        return self.blocks * BLOCK


def device_bytes(n: int, k: int, bits: int, group_size: int) -> int:
    """Return the bytes of an ``[n, k]`` matrix on the device, without bias and column order."""
    rows, columns = round_up(n, ROW_PADDING), round_up(k, BLOCK)
    return rows * columns * product_bits(bits) // 8 + (0 if bits == 16 else rows * (columns // group_size) * 4)


def to_device(device: Device, matrix: Matrix) -> DeviceMatrix:
    """Upload a matrix in pieces, which the device reorders."""
    device.queue.host_access("a weight")
    m, rows, blocks = matrix, round_up(matrix.n, ROW_PADDING), round_up(matrix.k, BLOCK) // BLOCK
    fine = m.bits != 16 and m.group_size < BLOCK
    if m.bits == 16:
        codes, scales = _pad_rows(device, m, rows, blocks), None
    else:
        codes, scales = _reorder(device, m, rows, blocks), _pack_scales(device, m, rows, blocks)
    return DeviceMatrix(
        n=m.n,
        k=m.k,
        kind=("fp16" if m.bits == 16 else f"int{product_bits(m.bits)}") + ("_fine" if fine else ""),
        rows=rows,
        blocks=blocks,
        group_shift=(m.group_size // 32).bit_length() - 1,
        codes=codes,
        scales=scales,
        perm=None if m.perm is None else _keep(device, np.asarray(m.perm, np.int32)),
        bias=None if m.bias is None else _keep(device, np.asarray(m.bias, np.float32)),
        order=b"" if m.perm is None else np.ascontiguousarray(m.perm, np.int32).tobytes(),
    )


def _keep(device: Device, values: np.ndarray) -> DeviceArray:
    array = device.memory.weight(values.shape, values.dtype)
    device.uploader(values, array)
    return array


def _copy(device: Device, values: np.ndarray) -> DeviceArray:
    array = device.memory.array(values.shape, values.dtype)
    device.uploader(values, array)
    return array


def _pieces(values: np.ndarray, most: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield slices of `values` of at most `most` bytes, with their first row."""
    step = min(max(most // values[:1].nbytes, 1), _MAX_GRID)
    for first in range(0, len(values), step):
        yield first, values[first : first + step]


def _reorder(device: Device, m: Matrix, rows: int, blocks: int) -> DeviceArray:
    bits = product_bits(m.bits)
    codes = device.memory.weight((blocks, rows, 4 * bits), np.int32)
    _clear(device, codes, round_up(m.n, ROWS) < rows)
    for first, piece in _pieces(m.weight, STAGE * m.bits // bits):
        source = _copy(device, widen(piece) if m.bits == 3 else piece)
        device.launch(f"reorder.int{bits}", (blocks, len(piece)), source, codes, first, rows, blocks)
    return codes


def _pack_scales(device: Device, m: Matrix, rows: int, blocks: int) -> DeviceArray:
    groups = blocks * (BLOCK // m.group_size)
    scales = device.memory.weight((groups, rows), np.int32)
    _clear(device, scales, round_up(m.n, ROWS) < rows)
    assert m.scales is not None, "a quantized matrix has scales"
    source, zeros = _copy(device, m.scales), None if m.zeros is None else _copy(device, m.zeros)
    flags = 0 if zeros is None else HAS_ZEROS
    zero = SYMMETRIC_ZERO[m.bits]
    grid = (groups, len(m.scales))
    device.launch("pack_scales.any", grid, source, zeros, scales, 0, rows, groups, zero, flags)
    return scales


def _pad_rows(device: Device, m: Matrix, rows: int, blocks: int) -> DeviceArray:
    padded = blocks * BLOCK
    codes = device.memory.weight((rows, padded), np.float16)
    _clear(device, codes, m.n < rows)
    for first, piece in _pieces(m.weight, STAGE):
        grid = (-(-padded // ELEMENTS), len(piece))
        device.launch("pad_rows.any", grid, _copy(device, piece), codes, first, m.k, padded)
    return codes


def _clear(device: Device, array: DeviceArray, padded: bool) -> None:
    """Zero rows that the upload does not write."""
    if padded:
        device.queue(device.driver.fill, array.address, 0, array.nbytes, keep=(array,))
