"""The state of one sequence: its keys and values, their number, and its rotary positions."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np

from qvl_kernels.ops import Array, KVCache, Ops
from qvl_runtime.inputs.prompt import Slot

PAGE = 256
"""Granularity of the capacity, in positions."""


class Rotary(Protocol):
    """Rotary positions of one sequence.

    Attributes
    ----------
    rope : Array
        float32 ``[capacity, head_dim]``, as for `Ops.rope_append`; row i belongs to the i-th token.
    logn : Array or None
        float32 ``[capacity]``: log-n factors of the queries.
    alpha : int
        The NTK factor of the rotary base. Keys that were rotated with another factor are invalid. 1 for a family
        without dynamic scaling.
    """

    rope: Array
    logn: Array | None
    alpha: int

    def scaling(self, length: int) -> int:
        """Return the `alpha` of a prompt of `length` tokens."""

    def rescale(self, alpha: int) -> None:
        """Change `alpha`."""

    def place(self, length: int, slots: Sequence[Slot]) -> None:
        """Compute the rows of a prompt of `length` tokens, and those after it."""

    def reserve(self, capacity: int) -> None:
        """Grow to `capacity` tokens; the rows set by `place` remain."""


class Shape(Protocol):
    """The part of a config that the size of a cache depends on."""

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


LOST = cast(KVCache, types.SimpleNamespace(capacity=0))
"""In place of a cache until the next `SequenceState.reserve`. It takes no memory, so that it is there when none is."""


class SequenceState:
    """The keys and values of one sequence, its length, and its rotary positions.

    Parameters
    ----------
    ops : Ops
    shape : Shape
    rotary : callable
        Creates the `Rotary` for a capacity.
    dtype : str
        Type of the cache: "fp16" or "int8".
    capacity : int
        Initial capacity in tokens.
    layers : int, optional
        Number of cache layers if fewer than the model has; they are used cyclically.
    context : int, optional
        Expected length: beyond it the cache grows only as far as needed.

    Attributes
    ----------
    store : KVCache
    start : Array
        int32 ``[1]`` on the device: the position of the next token.
    length : int
        Positions filled.
    captured : dict
        Captured steps of this sequence alone, by the object that captured them.
    """

    def __init__(
        self,
        ops: Ops,
        shape: Shape,
        rotary: Callable[[int], Rotary],
        dtype: str,
        capacity: int,
        layers: int | None = None,
        context: int | None = None,
    ):
        self.ops, self._shape, self._dtype = ops, shape, dtype
        self.window = shape.max_position_embeddings
        self._context = self.window if context is None else context
        self._layers = shape.num_hidden_layers if layers is None else layers
        self.store = self._empty(capacity)
        self.rotary = rotary(self.store.capacity)
        self.start = ops.upload(np.zeros(1, np.int32))
        self.length = 0
        self.captured: dict[Any, Any] = {}

    def _pages(self, capacity: int) -> int:
        return min(-(-capacity // PAGE) * PAGE, max(self.window, PAGE))

    def _empty(self, capacity: int) -> KVCache:
        shape = self._shape
        return self.ops.kv_cache(
            self._layers, shape.num_key_value_heads, shape.head_dim, self._pages(capacity), self._dtype
        )

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arrays that captured operations refer to; these become invalid when an array changes."""
        return self.store, self.rotary.rope, self.rotary.logn

    def layer(self, index: int) -> int:
        """Return the index of a layer's keys in the store."""
        return index % self._layers

    def begin(self, length: int, slots: Sequence[Slot] = ()) -> None:
        """Prepare for a prompt of `length` tokens, of which the first `self.length` are cached.

        If the prompt needs another scaling of the rotary base, the cached keys are invalid and `length` becomes 0.
        """
        self.rescale(self.rotary.scaling(length))
        self.reserve(length)
        self.rotary.place(length, slots)
        self.truncate(self.length)

    def rescale(self, alpha: int) -> None:
        """Change the scaling of the rotary base; this invalidates the cached keys."""
        if alpha != self.rotary.alpha:
            # Invalidate the keys first: an interrupt must not leave old keys with the new table.
            self.length = 0
            self.rotary.rescale(alpha)

    def reserve(self, capacity: int) -> None:
        """Grow to `capacity` positions; filled positions are preserved.

        A cache grows by at least half, so that a long conversation is not copied at every turn.
        """
        if capacity > self.store.capacity:
            length, self.length = self.length, 0
            old, grown = self.store, min(self.store.capacity * 3 // 2, self._context)
            pages = self._pages(max(capacity, grown))
            with self._moving():
                self.store = self._empty(pages) if old is LOST else old.resized(pages, length)
                self.rotary.reserve(self.store.capacity)
            self.length = length

    def take_over(self, other: SequenceState, length: int, capacity: int) -> None:
        """Copy the first `length` positions of another sequence with the same prefix, and grow to `capacity`."""
        self.length = 0
        self.rescale(other.rotary.alpha)
        with self._moving():
            self.store = other.store.resized(self._pages(max(capacity, length)), length, keep=True)
            self.rotary.reserve(self.store.capacity)
        self.length = length

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        """Replace the cache, which is lost after an interrupt or an allocation failure: neither is complete then."""
        self.captured.clear()  # they keep the old cache in memory
        self.store = LOST
        try:
            yield
        except BaseException:
            self.store = LOST
            raise

    def advance(self, count: int) -> None:
        """Mark `count` more positions as filled."""
        self.truncate(self.length + count)

    def truncate(self, length: int) -> None:
        """Drop all positions from `length` on."""
        self.length = length
        self.ops.write(self.start, np.array([length], np.int32))
