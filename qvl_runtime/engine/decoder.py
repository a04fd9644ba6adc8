"""What the engine asks of a model's decoder, and a step of it that is captured once and replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from qvl_kernels.ops import Array, Ops
from qvl_runtime.engine.sequence import SequenceState
from qvl_runtime.trace import Trace, no_trace


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of a picture in a chunk of a prompt.

    Attributes
    ----------
    row : int
        Row of the chunk that the first of them replaces; it may lie before the chunk.
    count : int
        Rows that the picture takes.
    values : Array
        float32 ``[levels * count, hidden]``: the embedding, then what further layers add.
    """

    row: int
    count: int
    values: Array


class Decoder(Protocol):
    """A model's decoder.

    Attributes
    ----------
    ops : Ops
    vocab_size : int
    """

    ops: Ops
    vocab_size: int

    def sequence(self, dtype: str, capacity: int, layers: int | None = None) -> SequenceState:
        """The empty state of a sequence; see `SequenceState`."""

    def workspace(self, rows: int) -> Any:
        """Arrays for up to `rows` tokens at a time; ``.rows(count)`` cuts them, ``.x`` is the residual stream."""

    def embed(self, ids: Array, out: Array) -> None:
        """Embed token ids, int32 ``[T]``, into `out` float32 ``[T, hidden]``."""

    def forward(
        self, work: Any, sequence: SequenceState, pictures: Sequence[Features] = (), trace: Trace = no_trace
    ) -> None:
        """Run all layers over ``work.x`` in place, appending to `sequence` (whose length is not advanced).

        The features of `pictures` replace rows before the first layer; further levels are added after the others.
        """

    def logits(self, x: Array, out: Array) -> None:
        """``out [T, vocab] = head(norm(x [T, hidden]))``."""


class DecodeStep:
    """A few tokens through the decoder, captured once for a sequence and replayed for all that follow.

    Attributes
    ----------
    logits : Array
        float32 ``[rows, vocab]``: row i is for what follows the i-th token fed.
    best : Array
        int32 ``[rows]``: the highest of each row of `logits`.
    """

    def __init__(self, decoder: Decoder, sequence: SequenceState, rows: int = 1):
        ops = decoder.ops
        self.ops, self.decoder, self.sequence = ops, decoder, sequence
        self.work = decoder.workspace(rows)
        self.ids = ops.empty((rows,), np.int32)
        self.logits = ops.empty((rows, decoder.vocab_size))
        self.best = ops.empty((rows,), np.int32)
        self._arrays: tuple[Any, ...] = ()
        self._replays: dict[int, Callable[[], None]] = {}

    def __call__(self, *tokens: int) -> None:
        """Feed up to `rows` tokens."""
        self.sequence.reserve(self.sequence.length + len(tokens))
        self.ops.write(self.ids[: len(tokens)], np.array(tokens, np.int32))
        self._captured(len(tokens))()
        self.sequence.advance(len(tokens))

    def _captured(self, rows: int) -> Callable[[], None]:
        arrays = self.sequence.arrays
        if len(arrays) != len(self._arrays) or any(a is not b for a, b in zip(arrays, self._arrays)):
            self._replays, self._arrays = {}, arrays
        if rows not in self._replays:
            self._replays[rows] = self.ops.capture(partial(self._step, rows))
        return self._replays[rows]

    def _step(self, rows: int) -> None:
        work, logits = self.work.rows(rows), self.logits[:rows]
        self.decoder.embed(self.ids[:rows], work.x)
        self.decoder.forward(work, self.sequence)
        self.decoder.logits(work.x, logits)
        self.ops.argmax(logits, out=self.best[:rows])
