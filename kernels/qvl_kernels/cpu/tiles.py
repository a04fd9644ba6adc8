"""Tile sizes of the matrix-matrix and prefill kernels, and their scratch memory (without Numba).

The constants are those of every level: kernels may be compiled for another one than this processor's.
"""

from __future__ import annotations

from qvl_kernels.cpu import features
from qvl_kernels.packing import round_up

TOKENS = 4
"""Rows of quantized activations per tile."""
PIECE = 2048
"""Columns of packed weights that are multiplied with a sequence of tiles."""
INT4_BYTES = 16 * PIECE
"""Bytes of a piece of 32 rows as int4."""
HELD_TILES = 128
"""Largest number of these tiles."""
FEW_BYTES = 1024
"""Scratch bytes per thread of the products of a few vectors with fp16 weights."""
FACTORS = 1024
"""Most bytes of the scales and zero points of a block of 32 rows and 128 columns, as float32 and int32."""
FLOAT_TOKENS = 6
"""Queries per tile of float32 attention."""
PAIR_TOKENS, PAIR_QUERIES = 6, 1056
"""Queries per tile, and per task, of 16-bit integer attention."""
LINES = 4
"""Heads of a group that share each key and value in `attention_group`."""
QUERIES = 192
"""Queries per attention task."""
PART, PARTS = 512, 16
"""Positions per part of the attention of a few queries, and the most parts: of longer pasts they are twice as long, and
so on. A part depends on its query's position alone, not on the threads."""
KEYS = 256
"""Keys and values per conversion, and the largest head size."""


def value_bytes(bits: int) -> int:
    """Return the bytes of a packed activation that is multiplied with int4 or int8 weights."""
    return 2 if bits == 8 and features.selected().words else 1


def unpacked_bytes(bits: int) -> int:
    """Return the scratch bytes per thread in which a piece of weights of `bits` is unpacked."""
    widened = INT4_BYTES if bits == 3 else 0
    return widened + (32 * value_bytes(bits) * PIECE if features.selected().unpacks else 0)


def int8_bytes(rows: int, k: int, bits: int, group: int, span: int) -> tuple[int, int, int]:
    """Return the bytes of `packed`, `scales` and `sums` of ``gemm_pack.pack_int8``."""
    values = round_up(rows, TOKENS) * round_up(k, 128)
    return values * value_bytes(bits), values // span * 4, values // group * 4


def gemm_scratch_bytes(k: int) -> int:
    """Return the scratch bytes per thread of the pack and gemm kernels."""
    return max(4 * round_up(k, 128) * (TOKENS + 1) + 64, 128 * HELD_TILES * TOKENS)


def gemv_scratch_bytes(rows: int) -> int:
    """Return the scratch bytes per thread of the products of `rows` vectors with 16-bit activations.

    The processor fetches lines behind those that are read in order: it took a fifth longer where the next thread's
    results were there.
    """
    return 128 * rows + (FACTORS + 32 * 128 * 2 if features.selected().words else 0) + 2048


def attention_scratch_bytes(head_dim: int) -> int:
    """Return the scratch bytes per thread of the prefill attention kernels."""
    padded = round_up(head_dim, 16)
    return 4 * (QUERIES * (KEYS + padded + 2) + KEYS * (head_dim + padded + FLOAT_TOKENS) + 16 * padded)


def group_attention_scratch_bytes(head_dim: int, group: int) -> int:
    """Return the scratch bytes per thread of ``attention_group``."""
    return 4 * round_up(group, LINES) * (2 * KEYS + round_up(head_dim, 16) + 2) + 64


def int16_attention_scratch_bytes(head_dim: int) -> int:
    """Return the scratch bytes per thread of ``attention_int16.block_attention_int16``."""
    padded, pairs = round_up(head_dim, 16), round_up(head_dim, 32) // 2
    a_key = pairs + padded // 2 + 1 + PAIR_TOKENS * 3 // 2
    held = PAIR_QUERIES * (pairs + padded + 3) + KEYS * a_key
    return 4 * (held + 3 * padded + 16 + 16 * pairs + 64)
