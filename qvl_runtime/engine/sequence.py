"""The past of one conversation: its keys and values, and the positions they were computed with."""

from __future__ import annotations

import functools

import numpy as np

from qvl_kernels.ops import KVCache, Ops
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.qwen_vl.positions import logn_table, ntk_alpha, rotary_table

Key = int | bytes
"""What a position was computed from: a token id, or the hash of the picture that fills the slot it is in."""

PAGE = 256
"""Capacity grows in steps of this many positions."""


class Context:
    """A KV cache with its length, its rotary tables, and the rule of dynamic NTK.

    Attributes
    ----------
    store : KVCache
        The backend's arrays.
    start : Array
        int32 ``[1]`` on the device: the position of the next token.
    rope, logn : Array
        Tables of all positions of the window, for `Ops.rope_append`.
    length : int
        Positions filled.
    alpha : int
        The NTK factor the keys in the store were rotated with.
    """

    def __init__(self, ops: Ops, config: ModelConfig, dtype: str, capacity: int, layers: int | None = None):
        self.ops, self.config = ops, config
        self.window = config.max_position_embeddings
        self._layers = config.num_hidden_layers if layers is None else layers
        self._dtype = dtype
        self.store = self._empty(capacity)
        self.start = ops.upload(np.zeros(1, np.int32))
        rope = _rotary(self._pages(self.window), 1, config)
        self.rope = ops.empty(rope.shape)  # not uploaded: that may share memory, and this table is overwritten
        ops.write(self.rope, rope)
        self.logn = ops.upload(logn_table(self._pages(self.window), config))
        self.length, self.alpha = 0, 1

    def _pages(self, capacity: int) -> int:
        return min(-(-capacity // PAGE) * PAGE, max(self.window, PAGE))

    def _empty(self, capacity: int) -> KVCache:
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        return self.ops.kv_cache(self._layers, heads, head_dim, self._pages(capacity), self._dtype)

    def layer(self, index: int) -> int:
        """Where a layer's keys lie: a context of fewer layers than the model reuses them in turn."""
        return index % self._layers

    def begin(self, length: int) -> None:
        """Prepare for a prompt of `length` tokens in all, of which the first `self.length` are in the cache.

        Where the longer prompt asks for another NTK factor the cached keys are void and `length` drops to 0.
        """
        self.rotate(ntk_alpha(length, self.config))
        self.truncate(self.length)

    def rotate(self, alpha: int) -> None:
        """Take another NTK factor; keys in the cache are void then."""
        if alpha != self.alpha:
            # The keys are void before the table changes: an interrupt must not leave one with the other.
            self.length, self.alpha = 0, 0
            self.ops.write(self.rope, _rotary(self._pages(self.window), alpha, self.config))
            self.alpha = alpha

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping those that are filled.

        A cache grows by half at least, so that a long conversation is not copied at every turn.
        """
        if capacity > self.store.capacity:
            # While it moves, the past is in neither cache: an interrupt or a lack of memory must not leave half of it.
            length, self.length = self.length, 0
            try:
                self.store = self.store.resized(self._pages(max(capacity, self.store.capacity * 3 // 2)), length)
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


@functools.lru_cache(maxsize=8)
def _rotary(positions: int, alpha: int, config: ModelConfig) -> np.ndarray:
    table = rotary_table(positions, alpha, config)
    table.flags.writeable = False
    return table
