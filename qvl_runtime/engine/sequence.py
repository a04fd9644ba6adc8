"""The state of one sequence: its keys and values, how many there are, and its rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from qvl_kernels.ops import Array, KVCache, Ops
from qvl_runtime.inputs.prompt import Slot

PAGE = 256
"""Capacity grows in steps of this many positions."""


class Rotary(Protocol):
    """Rotary positions of one sequence.

    Attributes
    ----------
    rope : Array
        float32 ``[capacity, head_dim]``, as `Ops.rope_append` takes it: row i is that of the i-th token.
    logn : Array or None
        float32 ``[capacity]``: factors of the queries.
    alpha : int
        The factor that the base was scaled by; keys that were rotated with another one cannot be used. 1 for a family
        without dynamic scaling.
    """

    rope: Array
    logn: Array | None
    alpha: int

    def scaling(self, length: int) -> int:
        """The `alpha` that a prompt of `length` tokens asks for."""

    def rescale(self, alpha: int) -> None:
        """Take another `alpha`."""

    def place(self, length: int, slots: Sequence[Slot]) -> None:
        """Set the rows of a prompt of `length` tokens, and of the tokens that follow it."""

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens, keeping what `place` set."""


class Shape(Protocol):
    """What a cache's size depends on; every family's config has it."""

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def max_position_embeddings(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


class SequenceState:
    """The keys and values of one sequence, its length, and its rotary positions.

    Parameters
    ----------
    ops : Ops
    shape : Shape
    rotary : callable
        Makes the `Rotary` for a capacity.
    dtype : str
        Of the cache.
    capacity : int
        Tokens to make room for at first.
    layers : int, optional
        Fewer layers than the model has; they are used in turn.
    context : int, optional
        Tokens that were agreed upon: the cache grows beyond them only as far as it must.

    Attributes
    ----------
    store : KVCache
    start : Array
        int32 ``[1]`` on the device: the position of the next token.
    length : int
        Positions filled.
    captured : dict
        Steps of this sequence alone, by who captured them.
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
        """Whatever captured operations on this sequence refer to; they are void once it changes."""
        return self.store, self.rotary.rope, self.rotary.logn

    def layer(self, index: int) -> int:
        """Index of a layer's keys in the store."""
        return index % self._layers

    def begin(self, length: int, slots: Sequence[Slot] = ()) -> None:
        """Prepare for a prompt of `length` tokens in all, of which the first `self.length` are in the cache.

        If the prompt asks for another scaling of the rotary base, the cached keys are void and `length` drops to 0.
        """
        self.rescale(self.rotary.scaling(length))
        self.reserve(length)
        self.rotary.place(length, slots)
        self.truncate(self.length)

    def rescale(self, alpha: int) -> None:
        """Take another scaling of the rotary base; keys in the cache are void then."""
        if alpha != self.rotary.alpha:
            # The keys are void before the table changes: an interrupt must not leave one with the other.
            self.length = 0
            self.rotary.rescale(alpha)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping those that are filled.

        A cache grows by half at least, so that a long conversation is not copied at every turn.
        """
        if capacity > self.store.capacity:
            # While it moves, the keys are in neither cache: an interrupt or a lack of memory must not leave half of it.
            length, self.length = self.length, 0
            try:
                grown = min(self.store.capacity * 3 // 2, self._context)
                self.store = self.store.resized(self._pages(max(capacity, grown)), length)
                self.rotary.reserve(self.store.capacity)
            except BaseException:
                self.store = self._empty(PAGE)
                raise
            self.length = length

    def take_over(self, other: SequenceState, length: int, capacity: int) -> None:
        """Copy the first `length` positions of another sequence, which begins alike, and make room for `capacity`."""
        self.length = 0
        self.rescale(other.rotary.alpha)
        try:
            self.store = other.store.resized(self._pages(max(capacity, length)), length, keep=True)
            self.rotary.reserve(self.store.capacity)
        except BaseException:
            self.store = self._empty(PAGE)
            raise
        self.length = length

    def advance(self, count: int) -> None:
        """Count `count` more positions as filled."""
        self.truncate(self.length + count)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        self.length = length
        self.ops.write(self.start, np.array([length], np.int32))
