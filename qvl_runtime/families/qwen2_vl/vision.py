"""The ViT of Qwen2-VL for pictures of any size, and the parts shared with its successors."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Self, TypeVar

import numpy as np

from qvl_kernels.ops import Activation, Array, Norm, Ops, Weight
from qvl_runtime.families.qwen2_vl.config import MERGE, VISION_EPS, ModelConfig, VisionConfig
from qvl_runtime.families.qwen2_vl.positions import patch_rotary
from qvl_runtime.families.qwen2_vl.tensors import PATCH_EMBEDDING, VISUAL
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.pictures import SLICE_LAYERS, ArrayClaims, Pixels
from qvl_runtime.slices import at_once
from qvl_runtime.trace import Trace, no_trace

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Workspace:
    """Arrays for one picture.

    Attributes
    ----------
    x : Array
        float32 ``[patches, width]``: the residual stream.
    rotary : Array
        float32 ``[patches, head_dim]``: cos and sin of each patch's position.
    segments : list of int
        First row of each window, then the number of rows.
    """

    x: Array
    qkv: Array
    attended: Array
    hidden: Array
    normed: Array
    cell: Array
    features: Array
    rotary: Array
    segments: list[int]

    @property
    def cells(self) -> int:
        """Number of tokens of the picture."""
        return self.cell.shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """Self-attention within segments, after a norm."""

    norm: Norm
    qkv: Weight
    proj: Weight

    @classmethod
    def load(cls, weights: Weights[ModelConfig], block: str, norm: Norm) -> Attention:
        return cls(norm, weights.matrix(f"{block}.attn.qkv"), weights.matrix(f"{block}.attn.proj"))

    def __call__(self, ops: Ops, work: Workspace, heads: int, segments: Sequence[int] | None) -> None:
        """Run on ``work.x`` in place."""
        ops.linear(work.x, self.qkv, out=work.qkv, norm=self.norm)
        ops.vision_attention(work.qkv, heads, out=work.attended, rope=work.rotary, segments=segments)
        ops.linear(work.attended, self.proj, out=work.x, residual=work.x)


Mlp = Callable[[Ops, Workspace], None]
"""The feed-forward of a block, on ``work.x`` in place."""


@dataclasses.dataclass(frozen=True, eq=False)
class ActivatedMlp:
    """A feed-forward with an activation between two layers, after a norm."""

    norm: Norm
    up: Weight
    down: Weight
    activation: Activation

    def __call__(self, ops: Ops, work: Workspace) -> None:
        ops.linear(work.x, self.up, out=work.hidden, norm=self.norm, activation=self.activation)
        ops.linear(work.hidden, self.down, out=work.x, residual=work.x)


@dataclasses.dataclass(frozen=True, eq=False)
class Merger:
    """Merges the four patches of a cell to one token.

    Attributes
    ----------
    whole_cell : bool
        Whether the norm spans the four patches together, not each by itself.
    """

    norm: Norm
    first: Weight
    second: Weight
    whole_cell: bool = False

    @classmethod
    def load(
        cls, weights: Weights[ModelConfig], name: str, norm: Norm, layers: tuple[str, str], whole_cell: bool = False
    ) -> Merger:
        first, second = (weights.matrix(f"{name}.{layer}") for layer in layers)
        return cls(norm, first, second, whole_cell)

    def __call__(self, ops: Ops, work: Workspace, out: Array) -> None:
        """Merge ``work.x`` into `out`, float32 ``[cells, output_width]``."""
        cells = (work.cells, work.x.shape[1] * MERGE**2)
        if self.whole_cell:
            ops.linear(work.x.reshape(cells), self.first, out=work.cell, norm=self.norm, activation="gelu")
        else:
            ops.normalize(work.x, self.norm, out=work.normed)
            ops.linear(work.normed.reshape(cells), self.first, out=work.cell, activation="gelu")
        ops.linear(work.cell, self.second, out=out)


class Lazy(dict[int, T]):
    """Parts of a model by index, created on first access."""

    def __init__(self, make: Callable[[int], T]):
        super().__init__()
        self._make = make

    def __missing__(self, index: int) -> T:
        return self.setdefault(index, self._make(index))


class VisionTower(abc.ABC):
    """Patch embedding, blocks and merger: `qvl_runtime.inputs.pictures.Vision`.

    The operations of a picture are captured once and replayed for further pictures of the same size. Weights are
    loaded on first use, so that a single stage can run alone.

    Parameters
    ----------
    weights : Weights
    """

    def __init__(self, weights: Weights[ModelConfig]):
        self.weights, self.ops = weights, weights.ops
        self.config: VisionConfig = weights.config.visual
        self.patch_embedding = Lazy(lambda _: self.weights.matrix(PATCH_EMBEDDING))
        self.blocks = Lazy(self._block)
        self.mergers = Lazy(self._merger)
        self._grid: tuple[int, int] | None = None
        self._work: Workspace | None = None
        self._replays: dict[int, Callable[[], None]] = {}
        self._claims = ArrayClaims()

    def load(self) -> Self:
        """Load all weights now."""
        for i in range(self.config.depth):
            self.blocks[i]
        for level in range(self.config.levels):
            self.mergers[level]
        self.patch_embedding[0]
        return self

    def _block(self, index: int) -> tuple[Attention, Mlp]:
        name = f"{VISUAL}.blocks.{index}"
        return self._attention(name), self._mlp(name)

    # defined by a family
    @abc.abstractmethod
    def _attention(self, block: str) -> Attention: ...

    @abc.abstractmethod
    def _mlp(self, block: str) -> Mlp: ...

    @abc.abstractmethod
    def _merger(self, level: int) -> Merger: ...

    def _order(self, rows: int, columns: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the order of a picture's cells in the blocks (None: unchanged), and the cells per window."""
        return None, np.array([rows * columns])

    def _positions(self, rows: int, columns: int) -> np.ndarray | None:
        """Return position embeddings to add to the patches, or None."""
        return None

    def _windowed(self, index: int) -> bool:
        """Whether a block uses windowed attention."""
        return False

    def _level_behind(self, index: int) -> int | None:
        """Return the feature level computed from a block's output, or None; not for the last block."""
        return None

    # computing
    def encode(self, pixels: np.ndarray, grid: tuple[int, int], trace: Trace = no_trace) -> Array:
        """Encode one picture.

        Parameters
        ----------
        pixels : ndarray
            float32 ``[patches, 3 * 2 * p * p]``; see `preprocessing.patch_rows`.
        grid : tuple of int
            Rows and columns of tokens.

        Returns
        -------
        Array
            float32 ``[levels * tokens, output_width]``.
        """
        if trace is no_trace:
            return at_once(self.encode_slowly(pixels, grid))
        self._claims.claim()
        work = self._begin(grid)
        self.ops.linear(self.ops.upload(pixels), self.patch_embedding[0], out=work.x)
        trace("patch_embed", work.x)
        self._embed(pixels, grid, work)
        trace("blocks_in", work.x)
        self._run(0, trace)
        features = self._in_order(work.features, grid)
        trace("final", features[: work.cells])
        return features

    def encode_slowly(self, pixels: np.ndarray, grid: tuple[int, int]) -> Generator[None, None, Array]:
        """Encode in slices; see `qvl_runtime.inputs.pictures.Vision`. Restarts if another picture used the arrays."""
        firsts = range(0, self.config.depth, SLICE_LAYERS)
        while True:
            is_latest = self._claims.claim()
            work = self._begin(grid)
            self._embed(pixels, grid, work)
            for first in firsts:
                if not is_latest():
                    break
                if first not in self._replays:
                    self._replays[first] = self.ops.capture(functools.partial(self._run, first))
                self._replays[first]()
                yield
            if is_latest():
                return self._in_order(work.features, grid)

    def stage(self, kind: str, index: int) -> Callable[[np.ndarray, Pixels], Array]:
        """Return a single stage; see `qvl_runtime.families.base.Family.vision_stage`."""

        def patches(_: np.ndarray, pixels: Pixels) -> Array:
            work = self._begin(pixels.grid)
            self._embed(pixels.values, pixels.grid, work)
            return work.x

        def block(state: np.ndarray, pixels: Pixels) -> Array:
            work = self._begin(pixels.grid)
            self.ops.write(work.x, state)
            self._run_block(index, no_trace)
            return work.x

        def merge(state: np.ndarray, pixels: Pixels) -> Array:
            work = self._begin(pixels.grid)
            self.ops.write(work.x, state)
            self._merge(index, work)
            return self._in_order(self._level(index, work), pixels.grid)

        return {"patches": patches, "vision": block, "adapter": merge}[kind]

    def _begin(self, grid: tuple[int, int]) -> Workspace:
        """Return arrays for a picture; the previous ones if the size is the same."""
        if grid != self._grid or self._work is None:
            self._grid = self._work = None  # frees the last picture's memory first
            self._replays = {}
            self._work = self._workspace(*grid, *self._order(*grid))
            self._grid = grid
        return self._work

    @property
    def _begun(self) -> Workspace:
        assert self._work is not None, "_begin allocates the arrays"
        return self._work

    def _embed(self, pixels: np.ndarray, grid: tuple[int, int], work: Workspace) -> None:
        rows, columns = grid
        order, _ = self._order(rows, columns)
        positions = self._positions(MERGE * rows, MERGE * columns)
        residual = None if positions is None else self.ops.upload(_ordered(positions, order))
        ordered = self.ops.upload(_ordered(pixels, order))
        self.ops.linear(ordered, self.patch_embedding[0], out=work.x, residual=residual)

    def _in_order(self, features: Array, grid: tuple[int, int]) -> Array:
        """Return a copy of the features in row-major order of the tokens."""
        out, (order, _) = self.ops.empty(features.shape), self._order(*grid)
        if order is None:
            self.ops.copy(features, out)
        else:
            self.ops.gather(features, self.ops.upload(np.argsort(order).astype(np.int32)), out=out)
        return out

    def _level(self, level: int, work: Workspace) -> Array:
        """Return the rows of a feature level."""
        return work.features[level * work.cells : (level + 1) * work.cells]

    def _merge(self, level: int, work: Workspace) -> None:
        """Compute a feature level from ``work.x``."""
        self.mergers[level](self.ops, work, self._level(level, work))

    def _run(self, first: int, trace: Trace | None = None) -> None:
        """Run a few blocks from `first` on, or all with a trace; after the last one compute the features."""
        last = self.config.depth if trace else min(first + SLICE_LAYERS, self.config.depth)
        trace = trace or no_trace
        for i in range(first, last):
            self._run_block(i, trace)
            level = self._level_behind(i)
            if level is not None:
                self._merge(level, self._begun)
                trace(f"deepstack{level - 1}", self._level(level, self._begun))
        if last == self.config.depth:
            self._merge(0, self._begun)

    def _run_block(self, index: int, trace: Trace) -> None:
        work, (attention, mlp) = self._begun, self.blocks[index]
        attention(self.ops, work, self.config.num_heads, work.segments if self._windowed(index) else None)
        mlp(self.ops, work)
        trace(f"block{index}", work.x)

    def _workspace(self, rows: int, columns: int, order: np.ndarray | None, lengths: np.ndarray) -> Workspace:
        ops, v, cells = self.ops, self.config, rows * columns
        patches, merged = cells * MERGE**2, v.width * MERGE**2
        rotary = patch_rotary(MERGE * rows, MERGE * columns, v)
        starts = MERGE**2 * np.concatenate([[0], np.cumsum(lengths)])
        return Workspace(
            x=ops.empty((patches, v.width)),
            qkv=ops.empty((patches, 3 * v.width), ops.activation_dtype),
            attended=ops.empty((patches, v.width), ops.activation_dtype),
            hidden=ops.empty((patches, v.mlp_width), ops.activation_dtype),
            normed=ops.empty((patches, v.width), ops.activation_dtype),
            cell=ops.empty((cells, merged), ops.activation_dtype),
            features=ops.empty((v.levels * cells, v.output_width)),
            rotary=ops.upload(_ordered(rotary, order)),
            segments=starts.tolist(),
        )


def _ordered(rows: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Reorder rows of patches by cells."""
    if order is None:
        return rows
    return rows.reshape(len(order), -1)[order].reshape(rows.shape)


class Qwen2Vision(VisionTower):
    """The vision tower of Qwen2-VL: LayerNorm, quick GELU."""

    def _attention(self, block: str) -> Attention:
        return Attention.load(self.weights, block, self.weights.layer_norm(f"{block}.norm1", VISION_EPS))

    def _mlp(self, block: str) -> Mlp:
        first, second = (self.weights.matrix(f"{block}.mlp.{name}") for name in ("fc1", "fc2"))
        return ActivatedMlp(self.weights.layer_norm(f"{block}.norm2", VISION_EPS), first, second, "quick_gelu")

    def _merger(self, level: int) -> Merger:
        name = f"{VISUAL}.merger"
        return Merger.load(self.weights, name, self.weights.layer_norm(f"{name}.ln_q", VISION_EPS), ("mlp.0", "mlp.2"))
