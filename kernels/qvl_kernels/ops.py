"""The operations of a model: the only interface between the models and a backend.

Every operation writes into arrays of its caller, so that a sequence of them has fixed addresses and can be
captured once and replayed (`Ops.capture`): a CUDA graph on a GPU, one parallel region on a CPU. What changes from
token to token (ids, the position) therefore lives in arrays, too.

A backend only accepts arrays and weights of its own `empty`, `upload` and `weight`. Models only use the attributes of
`Array` and `Weight`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from qvl_kernels.packing import Matrix


class Array(Protocol):
    """A backend's array, on its device."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Array:
        """Return rows ``i:j`` of the leading dimension as a view."""

    def reshape(self, shape: tuple[int, ...], /) -> Array:
        """Return a view with another shape."""


class Weight(Protocol):
    """A backend's representation of a `Matrix` ``[n, k]``, created by `Ops.weight`."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...


Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""The exact (erf) GELU, its tanh approximation, and ``x * sigmoid(1.702 x)``."""


PRECISIONS = ("auto", "int16", "int8")
"""What the CPU's products of many rows may do with activations; see `qvl_kernels.cpu.CpuOps`."""


FEW_ROWS = 16
"""Number of rows, such as those of a decode step, up to which a row's result does not depend on the other rows, nor on
how many there are: an answer is the same alone and in a batch. See `Ops.coarse` for more rows."""


class DeviceError(RuntimeError):
    """A device is missing, unsupported or too small. The one-line message has a remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """Parameters of a normalization over the last dimension: RMSNorm without `bias`, LayerNorm with `bias`.

    RMSNorm: ``x * rsqrt(mean(x^2) + eps) * weight``. LayerNorm: ``(x - mean) * rsqrt(var + eps) * weight + bias``.
    """

    weight: Array
    bias: Array | None
    eps: float


class KVCache(Protocol):
    """Keys and values of all layers, in the backend's layout."""

    layers: int
    kv_heads: int
    head_dim: int
    capacity: int

    @property
    def nbytes(self) -> int: ...

    def resized(self, capacity: int, length: int, *, keep: bool = False) -> KVCache:
        """Return a cache of `capacity` with the first `length` positions.

        The original becomes invalid unless `keep`.
        """

    def saved(self, layer: int, length: int) -> list[np.ndarray]:
        """Return the first `length` positions of a layer for `restore`: contiguous arrays in the backend's layout."""

    def restore(self, layer: int, length: int, arrays: Sequence[np.ndarray]) -> None:
        """Load arrays of `saved` into a cache of the same layers, heads and dtype, and any capacity.

        Raises
        ------
        ValueError
            For arrays of other shapes or types.
        """


def query_heads(width: int, cache: KVCache) -> int:
    """Return the number of query heads in a row of `width` columns with the keys and values of `cache`'s heads.

    Raises
    ------
    ValueError
        If the number is not a multiple of the cache's heads.
    """
    heads = width // cache.head_dim - 2 * cache.kv_heads
    if width % cache.head_dim or heads < 1 or heads % cache.kv_heads:
        raise ValueError(
            f"qkv of {width} columns: it does not fit a cache of {cache.kv_heads} heads of {cache.head_dim}"
        )
    return heads


def check_segments(segments: Sequence[int], rows: int) -> None:
    """Check that boundaries of segments go from 0 to `rows` and do not decrease.

    Raises
    ------
    ValueError
        If they do not.
    """
    bounds = np.asarray(segments)
    if bounds.ndim != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != rows or (np.diff(bounds) < 0).any():
        raise ValueError(f"segments: expected boundaries from 0 to {rows} that do not decrease")


def restored(parts: Sequence[tuple[tuple[int, ...], np.dtype]], arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Check the shapes and types of `arrays` for `KVCache.restore`.

    Raises
    ------
    ValueError
        If they are not.
    """
    found = [(array.shape, array.dtype) for array in arrays]
    if found != list(parts):
        raise ValueError(f"these arrays are not of this cache: expected {list(parts)}, found {found}")
    return arrays


class Attended(NamedTuple):
    """Rows of a batch that belong to one sequence, and what `Ops.rope_append` needs for them."""

    rows: int
    rope: Array
    logn: Array | None
    cache: KVCache
    layer: int
    start: Array


def attend_in_turn(
    ops: Ops, qkv: Array, sequences: Sequence[Attended], out: Array, q_norm: Norm | None, k_norm: Norm | None
) -> None:
    """Do what `Ops.attend` does, one sequence after the other."""
    first = 0
    for rows, rope, logn, cache, layer, start in sequences:
        some, end = qkv[first : first + rows], first + rows
        ops.rope_append(some, rope=rope, logn=logn, cache=cache, layer=layer, start=start, q_norm=q_norm, k_norm=k_norm)
        ops.cached_attention(some, cache, layer, start, out=out[first:end])
        first = end


Move = Callable[[Sequence[Array | KVCache | None]], bool]
"""See `Ops.movable`."""


class Ops(Protocol):
    """A backend.

    Attributes
    ----------
    name : str
        "reference", "cpu" or "cuda".
    activation_dtype : numpy dtype
        Type of the arrays between products: float32, or float16 on a GPU. The residual stream, norms' inputs and
        logits are always float32.
    score_cache_dtype : str
        The most precise cache ("fp32" or "fp16"), for scoring.
    row_cost : float
        Time of each further row of a small batch, relative to one row: the cost of an additional drafted token.
    slice_rows : int
        Tokens of a prompt to compute between two steps of other answers, which wait for them.
    any_capacity : bool
        Whether a captured step can be moved to caches of other capacities.
    """

    name: str
    activation_dtype: np.dtype
    score_cache_dtype: str
    row_cost: float
    slice_rows: int
    any_capacity: bool

    # memory
    def empty(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike = np.float32) -> Array:
        """Allocate an uninitialized array."""

    def upload(self, values: np.ndarray) -> Array:
        """Copy `values` to the device, or share the memory if possible."""

    def write(self, target: Array, values: np.ndarray) -> None:
        """Overwrite `target` in place."""

    def download(self, array: Array) -> np.ndarray:
        """Return the values as a new numpy array."""

    def copy(self, source: Array, target: Array) -> None:
        """Copy `source` into `target` of the same shape, converting between float32 and float16."""

    def weight(self, matrix: Matrix) -> Weight:
        """Prepare a matrix for products."""

    def coarse(self, weight: Weight) -> bool:
        """Whether a row of a product of more than `FEW_ROWS` rows may differ from the same one among fewer.

        Its activations have fewer bits then, or its sums another order.
        """

    def coarse_attention(self, width: int) -> bool:
        """Whether `cached_attention` of more than `FEW_ROWS` rows sums in another order than of fewer.

        `width`: columns of its `out`.
        """

    def kv_cache(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str) -> KVCache:
        """Allocate a cache of `capacity` positions, for `kv_heads` heads of keys and values.

        `dtype`: "fp16", "int8" (one scale per position and head), or `score_cache_dtype`.
        """

    # products
    def embed(self, ids: Array, table: Weight, *, out: Array) -> None:
        """``out [T, D] = table[ids]``; ids int32 [T], out float32."""

    def linear(
        self,
        x: Array,
        w: Weight,
        *,
        out: Array,
        norm: Norm | None = None,
        activation: Activation | None = None,
        residual: Array | None = None,
    ) -> None:
        """``out [T, N] = activation?(norm?(x [T, K]) @ w.T + bias) + residual?``.

        `residual` [T, N] is float32 and may be `out` itself.
        """

    def gate_up(self, x: Array, gate: Weight, up: Weight, *, out: Array, norm: Norm) -> None:
        """SwiGLU: ``h = norm(x)``, ``out [T, F] = silu(h @ gate.T) * (h @ up.T)`` (biases are added if present)."""

    # elementwise
    def normalize(self, x: Array, norm: Norm, *, out: Array) -> None:
        """``out [T, D] = norm(x)``."""

    def add(self, x: Array, y: Array, *, out: Array) -> None:
        """``out = x + y``, all of one shape."""

    def gather(self, x: Array, index: Array, *, out: Array) -> None:
        """``out[i] = x[index[i]]``: float32 rows; index int32, each below the rows of x."""

    # attention; scores are scaled by 1/sqrt(head_dim) and accumulated in float32
    def vision_attention(
        self,
        qkv: Array,
        heads: int,
        *,
        out: Array,
        rope: Array | None = None,
        segments: Sequence[int] | None = None,
    ) -> None:
        """Self-attention of patches.

        Parameters
        ----------
        qkv : Array
            ``[P, heads * 3 * d]``: q, k, v of each head are adjacent. With `rope`, q and k are unspecified afterwards.
        out : Array
            ``[P, heads * d]``.
        rope : Array, optional
            float32 ``[P, d]``: cos in the first half of a row, sin in the second, for a half-split rotation of q and
            k over the whole head, in float32.
        segments : sequence of int, optional
            Boundaries 0 ... P, not decreasing, on the host: a row attends to the rows of its segment. By default to
            all rows.
        """

    def cross_attention(self, q: Array, k: Array, v: Array, heads: int, *, out: Array) -> None:
        """Full attention of q [Q, heads * d] over k, v [P, heads * d]; out [Q, heads * d]."""

    def rope_append(
        self,
        qkv: Array,
        *,
        rope: Array,
        logn: Array | None,
        cache: KVCache,
        layer: int,
        start: Array,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        """Rotate q and k of `qkv` and append k and v to the cache.

        Parameters
        ----------
        qkv : Array
            ``[T, (heads + 2 * kv_heads) * d]``: all q, then k, then v. q is changed in place; afterwards the k and v
            parts are unspecified. `kv_heads` and d are the cache's; `heads` is a multiple of `kv_heads`.
        rope : Array
            float32 ``[capacity, d]``: cos in the first half of a row, sin in the second. Row t of `qkv` takes row
            ``start[0] + t``, its position in the cache. The rotation is half-split (neox):
            ``[a, b] -> [a cos - b sin, b cos + a sin]``.
        logn : Array or None
            float32 ``[capacity]``: a factor for the rotated q of each row of the cache.
        start : Array
            int32 ``[1]``.
        q_norm, k_norm : Norm, optional
            RMSNorm of each head before the rotation, in float32, with one weight ``[d]`` for all heads.
        """

    def cached_attention(self, qkv: Array, cache: KVCache, layer: int, start: Array, *, out: Array) -> None:
        """Causal attention of the q part of `qkv` over positions 0 .. ``start[0] + t`` of the cache.

        Grouped queries: of ``heads`` heads of q, head i reads head ``i // (heads / kv_heads)`` of keys and values,
        which are read from the cache only, rounded. The result therefore does not depend on how a prompt was cut into
        slices. out ``[T, heads * d]``.
        """

    def attend(
        self,
        qkv: Array,
        sequences: Sequence[Attended],
        *,
        out: Array,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        """`rope_append` and `cached_attention` for the rows of several sequences, which follow each other.

        Afterwards all of `qkv` is unspecified.
        """

    # choosing
    def argmax(self, logits: Array, *, out: Array) -> None:
        """``out [T] int32``: index of the largest value of each row of logits [T, V], the first of ties.

        -1 for a row with a value that is not finite.
        """

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """Record the operations of `step` and return a function that repeats them on the same arrays.

        `step` runs at most once, while recording; its results are undefined.
        """

    def movable(self, replay: Callable[[], None], inputs: Sequence[Array | KVCache | None]) -> Move | None:
        """Return a function that makes a captured step use other arrays and caches in place of `inputs`.

        It takes as many as `inputs`; it changes nothing and returns False if their shapes or types differ. From now on
        the step keeps none of them alive. None if the step cannot be changed and must be captured again.
        """

    def synchronize(self) -> None:
        """Wait until all operations are complete."""
