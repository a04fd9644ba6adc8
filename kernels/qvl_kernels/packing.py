"""Packed matrices: the layout of a weight in the file and in memory.

A matrix ``W [N, K]`` computes ``y [N] = W @ x`` of activations ``x [K]``. Quantized, its rows are padded to a
multiple of `ROWS` and its columns to a multiple of `BLOCK`, and one step of a kernel reads `ROWS` rows of four
consecutive columns::

    int3  uint8 [N/32, K/128, 12, 32, 4]   three lines for four steps of int4, as `widen` takes them apart
    int4  uint8 [N/32, K/128, 16, 32, 4]   low nibble: column 128 g + 4 j + b, high nibble: the same + 64
    int8  uint8 [N/32, K/128, 32, 32, 4]   column 128 g + 4 j + b, stored as q + 128

so that every 32-bit lane belongs to one row: no horizontal sums, one contiguous stream, and the same bytes for
AVX-512 VNNI, AVX2 and NEON. Scales are fp16 ``[N/32, K/group, 32]`` and zero points, if any, uint8 of that shape:
``w = scale * (q - zero)``, with zero = 4 (int3), 8 (int4) or 128 (int8, on the stored byte) if there are none. At
16 bits the weight is plain fp16 ``[N, K]``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

ROWS = 32
BLOCK = 128
GROUP_SIZES = (32, 64, 128)
SYMMETRIC_ZERO = {3: 4, 4: 8, 8: 128}


def group_sizes(bits: int) -> tuple[int, ...]:
    """Return the group sizes of quantized matrices of this many bits."""
    return GROUP_SIZES[1:] if bits == 3 else GROUP_SIZES


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def product_bits(bits: int) -> int:
    """Return the bits of the codes that the kernels of products read: int3 is widened to int4 before (`widen`)."""
    return max(4, bits)


def packed_shapes(n: int, k: int, bits: int, group_size: int = BLOCK, *, zeros: bool = False) -> dict:
    """Return shapes and dtypes of the arrays of an ``[n, k]`` matrix.

    Returns
    -------
    dict
        ``{suffix: (shape, numpy dtype)}`` with suffixes `weight` (16 bits), or `qweight`, `scales` and, if
        `zeros`, `zeros`.
    """
    if bits == 16:
        return {"weight": ((n, k), np.dtype(np.float16))}
    if bits not in SYMMETRIC_ZERO or group_size not in group_sizes(bits):
        raise ValueError(
            f"bits {bits} with groups of {group_size}: expected 3, 4, 8 or 16 bits and groups of {group_sizes(bits)}"
        )
    row_blocks, blocks = round_up(n, ROWS) // ROWS, round_up(k, BLOCK) // BLOCK
    groups = (row_blocks, blocks * (BLOCK // group_size), ROWS)
    shapes = {
        "qweight": ((row_blocks, blocks, 4 * bits, ROWS, 4), np.dtype(np.uint8)),
        "scales": (groups, np.dtype(np.float16)),
    }
    if zeros:
        shapes["zeros"] = (groups, np.dtype(np.uint8))
    return shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A weight ``[n, k]`` in the layout of a blob, with its bias.

    Attributes
    ----------
    bits : int
        3, 4, 8 or 16.
    weight : ndarray
        Packed bytes (3, 4, 8 bits) or fp16 ``[n, k]`` (16 bits).
    scales, zeros : ndarray or None
        As described in the module; `zeros` is None for a symmetric matrix.
    perm : ndarray or None
        int32 ``[k]``: packed column `j` multiplies ``x[perm[j]]`` (activation order).
    bias : ndarray or None
        float32 ``[n]``.
    """

    n: int
    k: int
    bits: int
    group_size: int
    weight: np.ndarray
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None
    perm: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        arrays = (self.weight, self.scales, self.zeros, self.perm, self.bias)
        return sum(a.nbytes for a in arrays if a is not None)

    def codes(self) -> np.ndarray:
        """Return the stored integers, uint8 ``[n, k]``, in packed column order."""
        return unpack_codes(self.weight, self.n, self.k, self.bits)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Return dequantized rows: float32 ``[len(index), k]``."""
        index = np.asarray(index)
        if self.bits == 16:
            return self.weight[index].astype(np.float32)
        block, lane = np.divmod(index, ROWS)
        lanes = np.broadcast_to(lane[:, None], (len(index), 1))
        codes = np.take_along_axis(self.weight[block], lanes[:, :, None, None, None], axis=3)
        codes = _unfold(codes, self.bits)[:, 0]
        zeros = SYMMETRIC_ZERO[self.bits] if self.zeros is None else self._spread(self.zeros, block, lane)
        assert self.scales is not None, "a quantized matrix has scales"
        values = (codes.astype(np.float32) - zeros) * self._spread(self.scales, block, lane)
        return self._unpermute(values[:, : self.k])

    def dequantize(self) -> np.ndarray:
        """Return the matrix as float32 ``[n, k]``, columns in the original order."""
        return self.rows(np.arange(self.n))

    def _spread(self, groups: np.ndarray, block: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """Repeat per-group values of the chosen rows over the columns of the groups."""
        return np.repeat(groups[block, :, lane].astype(np.float32), self.group_size, axis=1)

    def _unpermute(self, values: np.ndarray) -> np.ndarray:
        if self.perm is None:
            return values
        out = np.empty_like(values)
        out[:, self.perm] = values
        return out


def widen(weight: np.ndarray) -> np.ndarray:
    """Return packed int3, uint8 ``[..., 12, R, 4]``, as packed int4 of the same codes, ``[..., 16, R, 4]``.

    Three lines a, b, c of 16-bit words (little-endian) are four steps: ``a ^ c << 1``, ``a >> 1``, ``b ^ c >> 1`` and
    ``b >> 1``, each with a code in the lower three bits of every nibble. So a kernel unpacks them with six operations.
    """
    lines = _words(weight, 3)
    a, b, c = (lines[..., i, :, :] for i in range(3))
    steps = np.stack([a ^ c << 1, a >> 1, b ^ c >> 1, b >> 1], axis=-3) & 0x7777
    return steps.view(np.uint8).reshape(*weight.shape[:-3], 16, *weight.shape[-2:])


def _narrow(steps: np.ndarray) -> np.ndarray:
    """Inverse of `widen`."""
    words = _words(steps, 4)
    first, second, third, fourth = (words[..., i, :, :] for i in range(4))
    c = ((first ^ second << 1) & 0x6666) >> 1 | ((third ^ fourth << 1) & 0x6666) << 1
    a = second << 1 | ((first ^ c << 1) & 0x1111)
    b = fourth << 1 | ((third ^ c >> 1) & 0x1111)
    return np.stack([a, b, c], axis=-3).view(np.uint8).reshape(*steps.shape[:-3], 12, *steps.shape[-2:])


def _words(lines: np.ndarray, count: int) -> np.ndarray:
    """Group lines ``[..., 4 * count, R, 4]`` of bytes: little-endian words ``[..., 4, count, R, 2]``."""
    grouped = lines.reshape(*lines.shape[:-3], 4, count, *lines.shape[-2:])
    return np.ascontiguousarray(grouped).view("<u2")


def _unfold(blocks: np.ndarray, bits: int) -> np.ndarray:
    """``[B, G, steps, R, 4]`` bytes to codes ``[B, R, K]``."""
    if bits == 3:
        blocks = widen(blocks)
    if bits < 8:
        blocks = np.concatenate([blocks & 15, blocks >> 4], axis=2)
    b, g, steps, r, _ = blocks.shape
    return blocks.transpose(0, 3, 1, 2, 4).reshape(b, r, g * steps * 4)


def unpack_codes(weight: np.ndarray, n: int, k: int, bits: int) -> np.ndarray:
    """Inverse of `pack_codes`: uint8 ``[n, k]``."""
    codes = _unfold(weight, bits)
    return np.ascontiguousarray(codes.reshape(-1, codes.shape[2])[:n, :k])


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack stored integers, uint8 ``[n, k]``, to the layout above; padding is the symmetric zero."""
    n, k = codes.shape
    rows, cols = round_up(n, ROWS), round_up(k, BLOCK)
    padded = np.full((rows, cols), SYMMETRIC_ZERO[bits], np.uint8)
    padded[:n, :k] = codes
    # four columns at once: a shift by 4 never moves a nibble into another byte
    blocks: np.ndarray = padded.view(np.uint32).reshape(rows // ROWS, ROWS, cols // BLOCK, 32).transpose(0, 2, 3, 1)
    if bits < 8:
        blocks = blocks[:, :, :16] | (blocks[:, :, 16:] << 4)
    packed = np.ascontiguousarray(blocks).view(np.uint8).reshape(*blocks.shape, 4)
    return _narrow(packed) if bits == 3 else packed


def pack_groups(values: np.ndarray, k: int, group_size: int, dtype: np.typing.DTypeLike) -> np.ndarray:
    """Pack per-group values ``[n, ceil(k / group_size)]`` (scales or zeros); padding is 0."""
    n, groups = values.shape
    padded = np.zeros((round_up(n, ROWS), round_up(k, BLOCK) // group_size), dtype)
    padded[:n, :groups] = values
    return np.ascontiguousarray(padded.reshape(-1, ROWS, padded.shape[1]).transpose(0, 2, 1))


def unpack_groups(packed: np.ndarray, n: int, k: int, group_size: int) -> np.ndarray:
    """Inverse of `pack_groups`: ``[n, ceil(k / group_size)]``."""
    return packed.transpose(0, 2, 1).reshape(-1, packed.shape[1])[:n, : -(-k // group_size)]


def pack(
    codes: np.ndarray,
    scales: np.ndarray,
    bits: int,
    group_size: int,
    *,
    zeros: np.ndarray | None = None,
    perm: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> Matrix:
    """Build a quantized `Matrix`.

    Parameters
    ----------
    codes : ndarray
        Stored integers, uint8 ``[n, k]``: 0..7 (int3), 0..15 (int4) or ``q + 128`` (int8).
    scales, zeros : ndarray
        ``[n, ceil(k / group_size)]``; `zeros` are stored integers, 0..255.
    """
    n, k = codes.shape
    return Matrix(
        n=n,
        k=k,
        bits=bits,
        group_size=group_size,
        weight=pack_codes(codes, bits),
        scales=pack_groups(scales, k, group_size, np.float16),
        zeros=None if zeros is None else pack_groups(zeros, k, group_size, np.uint8),
        perm=None if perm is None else np.ascontiguousarray(perm, np.int32),
        bias=None if bias is None else np.ascontiguousarray(bias, np.float32),
    )
