"""Every GPU kernel: its source function, its arguments in launch order, its variants, and its grid.

A kernel is compiled once for each variant and architecture under the name ``family.variant``. Tile shapes, warps and
pipeline stages are data (tiles.json); everything else that is fixed at compile time is listed here.

Conventions of every launch
---------------------------
* Arrays are contiguous and every base pointer is a multiple of 16 bytes wherever its row length is a multiple of
  16 elements. A pointer of type ``*fp32`` named in a flag's description may point at fp16: the flag says so.
* Pointers disabled by a flag are never read: pass 0.
* `counters` is int32, zeroed once; every launch resets it to zero. Kernels that may run concurrently need separate
  counters. `partials` is scratch memory without state.
* Padded sizes: ``rows = round_up(n, 128)`` of a weight on the device, ``blocks = ceil(k / 128)``. The `x` of a
  product is fp16 ``[m, 128 * blocks]`` with zeros in the padding columns (`norm` and `gather` write them). Of m = 1 it
  may be a row that each program prepares for itself: float32 ``[k]`` (NORM, the RMSNorm of `norm_weight` and `eps`) or
  fp16 ``[k]`` (GATHER), with columns gathered by `perm` (ORDERED). `prepared` has room for it, fp16
  ``[programs, 128 * ceil(blocks / split)]``.

The weight on the device
------------------------
``int4``: `codes` int32 ``[blocks, rows, 16]``, nibble j of word i holds column ``128 g + 16 j + i``.
``int8``: `codes` int32 ``[blocks, rows, 32]``, byte j of word i holds column ``128 g + 32 j + i``.
``fp16``: `codes` fp16 ``[rows, 128 * blocks]``, zeros in the padding columns.
`scales`: int32 ``[128 * blocks / group_size, rows]``, fp16 scale in the low half and fp16 zero in the high half; unused
for fp16. ``group_shift = log2(group_size / 32)``.

The key/value cache of a layer
------------------------------
`k`, `v`: fp16 or int8 ``[kv_heads, capacity, d]``; int8 has `k_scale`, `v_scale` fp16 ``[kv_heads, capacity]``. d is
even and at most 128. `heads`, of queries, is a multiple of `kv_heads`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

ROW_PADDING = 128
"""Rows of a weight on the device are padded to a multiple of this."""

FEW_ROWS = 16
"""Up to this number of rows of x reading the weights takes most of a product's time. Its programs then share columns,
and gate and up one kernel. The result of a row does not depend on the others among few rows, nor among many."""

# flags of `linear`, `gate_up`
BIAS, GELU, RESIDUAL, OUT_HALF, GELU_TANH, QUICK_GELU, GATE = 1, 2, 4, 8, 16, 32, 64
NORM, GATHER, ORDERED = 128, 256, 512
BIAS_UP = 2
# flags of `norm`, `gather`, `add`, `embed`, `pack_scales` (OUT_HALF as above)
LAYER_NORM, PERMUTED, X_HALF, Y_HALF, ROWS = 1, 2, 4, 16, 32
HAS_ZEROS = 1
# flags of `rope_append`, `decode_attention`
LOGN, Q_NORM, K_NORM, ROPE, LISTED = 1, 2, 4, 8, 16

DECODE_SPLITS = 16
"""Largest number of parts of the positions in `decode_attention`."""

ARGMAX_PARTS = 64
"""Number of programs per row in `argmax`."""

ELEMENTS = 1024
"""Elements per program of the elementwise kernels."""

NORM_CHUNKS = (1024, 2048, 4096)
"""Columns that `norm` computes at a time; rows that fit are read once."""

ROPE_HEADS = 8
"""Heads per program of `rope_append`."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One family of kernels.

    Attributes
    ----------
    source : str
        ``module.function`` in qvl_kernels.gpu.kernels.
    arguments : tuple of (str, str)
        Name and Triton type of every launch argument, in order; "*cache" is fp16 or int8 with the variant. Two null
        pointers (scratch) follow at launch.
    variants : dict
        Variant name -> compile-time constants, without those in tiles.json.
    grid : str
        Documentation of the grid; BM, BN and the like are the variant's constants.
    """

    source: str
    arguments: tuple[tuple[str, str], ...]
    variants: dict[str, dict[str, int | bool]]
    grid: str


def _arguments(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, kind) for name, kind in (item.split(":") for item in text.split()))


_LINEAR = {
    "int4": (4, False, (8, 16, 32, 64, 128, 256)),
    "int4_fine": (4, True, (16, 64)),
    "int8": (8, False, (8, 16, 32, 64, 128, 256)),
    "int8_fine": (8, True, (16, 64)),
    "fp16": (16, False, (16, 64, 128)),
}
"""Kind of weight -> its bits, whether its groups are under 128, and the rows of x in its tiles. tiles.json says null
for a tile that an architecture does not have."""


def _linear_variants() -> dict[str, dict[str, int | bool]]:
    return {
        f"{kind}.rows{rows}": {"BITS": bits, "FINE": fine, "BM": rows}
        for kind, (bits, fine, tiles) in _LINEAR.items()
        for rows in tiles
    }


_CACHE_VARIANTS: dict[str, dict[str, int | bool]] = {
    f"{dtype}.{size}": {"INT8": dtype == "int8", "EXACT": size == "128"}
    for dtype in ("fp16", "int8")
    for size in ("128", "any")
}

_HEADS = {
    "64": (64, 64),
    "72": (72, 64, 16),
    "80": (80, 64, 16),
    "104": (104, 64, 32, 16),
    "128": (128, 128),
    "any": (0, 128),
}
"""Head sizes, and the widths of the pieces for their computation."""


def _head(d: int, w0: int, w1: int = 0, w2: int = 0, *, segments: bool) -> dict[str, int | bool]:
    return {"D": d, "W0": w0, "W1": w1, "W2": w2, "SEGMENTS": segments}


_INPUT = "x:*fp16 norm_weight:*fp32 perm:*i32 prepared:*fp16"
_SIZES = "m:i32 n:i32 rows:i32 blocks:i32 group_shift:i32 k:i32 eps:fp32 flags:i32"
_CACHE = "k:*cache v:*cache k_scale:*fp16 v_scale:*fp16 start:*i32"

KERNELS: dict[str, Kernel] = {
    # products ---------------------------------------------------------------------------------------------------
    # out [m, n] = activation?(x @ w.T + bias?) + residual?; `_fine`: groups of 32 or 64. If programs split the columns,
    # the partial sums meet in `partials`, float32 [tiles, split, BM * BN], and are added in order by the last to
    # arrive: the same bits every time. Tiles of more than FEW_ROWS rows have a split of 1. `counters`: one a tile.
    # flags: BIAS, one of GELU, GELU_TANH and QUICK_GELU, RESIDUAL or GATE (silu(residual) is a factor instead),
    # OUT_HALF (out is fp16), NORM or GATHER, ORDERED.
    "linear": Kernel(
        "matmul.linear",
        _arguments(
            f"{_INPUT} codes:*i32 scales:*i32 bias:*fp32 residual:*fp32 out:*fp32 partials:*fp32 counters:*i32 {_SIZES}"
        ),
        _linear_variants(),
        "(ceil(m / BM) * (rows // BN), split): tiles by split; (split - 1) * ceil(blocks / split) < blocks",
    ),
    # out [m, n] = silu(x @ gate.T + bias?) * (x @ up.T + bias?), fp16 if OUT_HALF, for two int4 weights with groups of
    # 128 and one order of columns, and few rows (others: two `linear`, the second with GATE). Each program of a tile
    # takes one of the weights. partials: float32 [tiles, 2 * split, BM * BN]. flags: BIAS (gate), BIAS_UP,
    # OUT_HALF, NORM or GATHER, ORDERED.
    "gate_up": Kernel(
        "matmul.gate_up",
        _arguments(
            f"{_INPUT} gate_codes:*i32 gate_scales:*i32 gate_bias:*fp32 up_codes:*i32 up_scales:*i32 up_bias:*fp32 "
            f"out:*fp32 partials:*fp32 counters:*i32 {_SIZES}"
        ),
        {f"int4.rows{rows}": {"BITS": 4, "FINE": False, "BM": rows} for rows in (8, 16)},
        "(ceil(m / BM) * (rows // BN), 2 * split), split as above",
    ),
    # out [n_ids, d] float32 = table[ids]; perm as in `packing.Matrix`. flags: PERMUTED.
    "embed": Kernel(
        "embed.embed",
        _arguments(
            "ids:*i32 codes:*i32 scales:*i32 perm:*i32 out:*fp32 d:i32 rows:i32 blocks:i32 group_shift:i32 flags:i32"
        ),
        {"int4": {"BITS": 4}, "int8": {"BITS": 8}, "fp16": {"BITS": 16}},
        "(blocks, n_ids)",
    ),
    # rows -------------------------------------------------------------------------------------------------------
    # out [m, padded] = norm(x [m, k]) with columns gathered by perm (int32 [k]) and zeros from column k on; padded is k
    # or a product's 128 * blocks. A variant's number is that of the columns it computes at a time (`norm_kernel`).
    # flags: LAYER_NORM (bias is read), PERMUTED, OUT_HALF.
    "norm": Kernel(
        "norm.norm",
        _arguments("x:*fp32 weight:*fp32 bias:*fp32 perm:*i32 out:*fp32 k:i32 padded:i32 eps:fp32 flags:i32"),
        {str(chunk): {"CHUNK": chunk} for chunk in NORM_CHUNKS},
        "(m,)",
    ),
    # out fp16 [m, 128 * blocks]: the RMSNorm of few rows as programs of a product compute that of a lone row, the same
    # bits. stride is k, a multiple of 16. flags: ORDERED.
    "few_norm": Kernel(
        "lone.few_norm",
        _arguments("x:*fp32 weight:*fp32 perm:*i32 out:*fp16 blocks:i32 k:i32 stride:i32 eps:fp32 flags:i32"),
        {"any": {}},
        "(m,)",
    ),
    # `norm` without a norm: cast, pad and permute, of the rows index (int32 [m]) names. A plain copy of any shape is
    # one row of k = padded = its size. flags: ROWS (index is read), PERMUTED, X_HALF (x is fp16), OUT_HALF.
    "gather": Kernel(
        "elementwise.gather",
        _arguments("x:*fp32 index:*i32 perm:*i32 out:*fp32 k:i32 padded:i32 flags:i32"),
        {"any": {}},
        "(ceil(padded / ELEMENTS), m)",
    ),
    # out = x + y, size elements. flags: X_HALF, Y_HALF, OUT_HALF.
    "add": Kernel(
        "elementwise.add",
        _arguments("x:*fp32 y:*fp32 out:*fp32 size:i32 flags:i32"),
        {"any": {}},
        "(ceil(size / ELEMENTS),)",
    ),
    # attention; qkv, q, out are fp16, scale is 1/sqrt(d) ----------------------------------------------------------
    # Rotates q in place and appends k and v at start[0] + t. `int8` quantizes the cache: k and v point at int8. flags:
    # LOGN (the rotated q times logn), Q_NORM, K_NORM (RMSNorm of each head before, weights float32 [d]); LISTED: the
    # arrays of the sequence and the capacity are not those given, but in `entry`, int64 [8], as in table.py.
    "rope_append": Kernel(
        "rope.rope_append",
        _arguments(
            f"qkv:*fp16 rope:*fp32 logn:*fp32 q_norm:*fp32 k_norm:*fp32 {_CACHE} entry:*i64 heads:i32 kv_heads:i32 "
            "capacity:i32 d:i32 q_eps:fp32 k_eps:fp32 flags:i32"
        ),
        {"fp16": {"INT8": False}, "int8": {"INT8": True}},
        "(t, ceil((heads + kv_heads) / ROPE_HEADS))",
    ),
    # Rotates q and k of patches in place; qkv [rows, heads * 3 * d], rope float32 [rows, d].
    "rotate": Kernel(
        "rope.rotate",
        _arguments("qkv:*fp16 rope:*fp32 heads:i32 d:i32"),
        {"any": {}},
        "(rows, ceil(2 * heads / ROPE_HEADS))",
    ),
    # Causal, over positions 0 .. start[0] + row. `128` needs d == 128, `any` takes every d.
    "cached_attention": Kernel(
        "attention.cached_attention",
        _arguments(f"qkv:*fp16 {_CACHE} out:*fp16 t:i32 heads:i32 kv_heads:i32 capacity:i32 d:i32 scale:fp32"),
        _CACHE_VARIANTS,
        "(ceil(t / BM), heads)",
    ),
    # The same for at most FEW_ROWS rows, with LISTED of several sequences, t rows of each. A tile is BM of the
    # t * heads / kv_heads queries of a head of keys, which it reads once, and its programs take BN positions each in
    # turns. partials: float32 [rows * heads, splits, 128 + 1]; counters: one a tile. flags: LISTED as above; for t of 1
    # and fewer heads than BM a head of keys ROPE, and `rope_append`'s: what it does is done first, with the same bits,
    # but qkv stays.
    "decode_attention": Kernel(
        "decode_attention.decode_attention",
        _arguments(
            f"qkv:*fp16 {_CACHE} entry:*i64 out:*fp16 partials:*fp32 counters:*i32 rope:*fp32 logn:*fp32 q_norm:*fp32 "
            "k_norm:*fp32 t:i32 heads:i32 kv_heads:i32 capacity:i32 d:i32 scale:fp32 q_eps:fp32 k_eps:fp32 flags:i32"
        ),
        _CACHE_VARIANTS,
        "(sequences * kv_heads * ceil(t * heads / kv_heads / BM), splits): splits <= DECODE_SPLITS",
    ),
    # Attention of q_rows over k_rows. Rows of q, k, v are parts * heads * d apart and heads parts * d apart. parts is 3
    # for patches, whose q, k, v are all the one array that holds them side by side; 1 for separate arrays. out
    # [q_rows, heads * d]. Variants named by a number need that d, `any` takes every d up to 128. With `.segments` a row
    # sees only the rows from bounds[0] up to bounds[1], int32 [2, q_rows]; without, bounds is not read.
    "attention": Kernel(
        "attention.attention",
        _arguments(
            "q:*fp16 k:*fp16 v:*fp16 bounds:*i32 out:*fp16 q_rows:i32 k_rows:i32 heads:i32 parts:i32 d:i32 scale:fp32"
        ),
        {name: _head(*widths, segments=False) for name, widths in _HEADS.items()}
        | {f"{name}.segments": _head(*_HEADS[name], segments=True) for name in ("80", "any")},
        "(ceil(q_rows / BM), heads)",
    ),
    # choosing ---------------------------------------------------------------------------------------------------
    # out [t] int32. values float32, indices int32 [t, ARGMAX_PARTS]; counters: one a row.
    "argmax": Kernel(
        "sampling.argmax",
        _arguments("logits:*fp32 out:*i32 values:*fp32 indices:*i32 counters:*i32 size:i32"),
        {"any": {}},
        "(ARGMAX_PARTS, t)",
    ),
    # loading: bring bytes of the blob (see packing.py) into the layout above. A launch takes `count` of the matrix's
    # 32-row blocks from `first` on, whose bytes lie at `source`: large matrices are uploaded in pieces --------------
    "reorder": Kernel(
        "pack.reorder",
        _arguments("source:*i32 codes:*i32 first:i32 rows:i32 blocks:i32"),
        {"int4": {"BITS": 4}, "int8": {"BITS": 8}},
        "(blocks, count)",
    ),
    # groups = 128 * blocks / group_size; flags: HAS_ZEROS, otherwise every zero is `zero` (8 or 128).
    "pack_scales": Kernel(
        "pack.pack_scales",
        _arguments("source:*fp16 zeros:*u8 scales:*i32 first:i32 rows:i32 groups:i32 zero:i32 flags:i32"),
        {"any": {}},
        "(groups, count)",
    ),
    # fp16 weights: source rows [count, k] -> codes [rows, padded] from row `first` on, at most 65535 at once.
    "pad_rows": Kernel(
        "pack.pad_rows",
        _arguments("source:*fp16 codes:*fp16 first:i32 k:i32 padded:i32"),
        {"any": {}},
        "(ceil(padded / ELEMENTS), count)",
    ),
    # Resize a cache: size 16-bit units of every row, rows source_stride and target_stride units apart.
    "move_rows": Kernel(
        "pack.move_rows",
        _arguments("source:*i16 target:*i16 size:i32 source_stride:i32 target_stride:i32"),
        {"any": {}},
        "(ceil(size / ELEMENTS), number of rows)",
    ),
}

ARCHITECTURES = (75, 80, 90, 120)
"""Compute capabilities of the bundle; code for 80 also runs on 86 and 89."""


def types(name: str) -> dict[str, str]:
    """Return the Triton type of every launch argument of a kernel, in order."""
    family, variant = name.split(".", 1)
    kernel = KERNELS[family]
    cache = "*i8" if kernel.variants[variant].get("INT8") else "*fp16"
    return {argument: cache if kind == "*cache" else kind for argument, kind in kernel.arguments}


def names(architecture: int, family: str | None = None) -> list[str]:
    """List the kernels of an architecture as ``family.variant``: all, or those of a family, the smallest tile first."""
    families = KERNELS if family is None else (family,)
    every = [f"{family}.{variant}" for family in families for variant in KERNELS[family].variants]
    return [name for name in every if _entry(name, architecture) is not None]


def norm_kernel(k: int) -> str:
    """Return the name of the kernel for norms of `k` columns."""
    return f"norm.{next((chunk for chunk in NORM_CHUNKS if k <= chunk), NORM_CHUNKS[-1])}"


@functools.cache
def _tiles() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(Path(__file__).with_name("tiles.json").read_text())


def _entry(name: str, architecture: int) -> dict[str, Any] | None:
    """Return a kernel's entry in tiles.json, None if the architecture does not have the kernel.

    It is that of the longest prefix of `name` (in whole dotted parts), first under the architecture, then under
    "default".
    """
    parts = name.split(".")
    prefixes = [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
    for section in (str(architecture), "default"):
        entries = _tiles().get(section, {})
        for prefix in prefixes:
            if prefix in entries:
                return entries[prefix]
    raise KeyError(f"tiles.json has no entry for {name}")


def tile(name: str, architecture: int) -> dict[str, Any]:
    """Return a kernel's entry in tiles.json: `warps`, `stages`, `registers` of a thread at most, compile-time values.

    `optimizer` is the architecture whose matrix instructions the compiler chooses, if not the kernel's own: on Hopper
    tiles of 8 rows use those of sm_80, which add columns in another order than Hopper's, and tiles of 16 have to agree.

    Those of products also have what `tiles` needs: the smallest tiles `waves`, the target number of programs per
    multiprocessor of a split; tiles of many rows `cost`, the microseconds in which a multiprocessor multiplies 128 x
    128 x 128.
    """
    found = _entry(name, architecture)
    if found is None:
        raise KeyError(f"there is no kernel {name} for sm_{architecture}")
    return found


def constants(name: str, architecture: int) -> dict[str, int | bool]:
    """Return all compile-time constants of a kernel on an architecture."""
    family, variant = name.split(".", 1)
    shapes = {key: value for key, value in tile(name, architecture).items() if key.isupper()}
    return KERNELS[family].variants[variant] | shapes
