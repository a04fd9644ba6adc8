"""The decoder protocol of the engine, and decode steps of several sequences that are captured once and replayed."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from qvl_kernels.ops import FEW_ROWS, Array, Move, Ops
from qvl_runtime.engine.sequence import SequenceState
from qvl_runtime.trace import Trace, no_trace


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of a picture within a chunk of a prompt.

    Attributes
    ----------
    row : int
        The batch's row of its first position, which may lie before the chunk, or be negative.
    count : int
        Number of rows of the picture.
    values : Array
        float32 ``[levels * count, hidden]``: the embeddings, then the levels that later layers add.
    first, last : int
        The chunk's rows; None for the end of the batch.
    """

    row: int
    count: int
    values: Array
    first: int = 0
    last: int | None = None


class Span(NamedTuple):
    """Consecutive rows of a batch that belong to one sequence."""

    sequence: SequenceState
    rows: int


class Decoder(Protocol):
    """A model's decoder.

    Attributes
    ----------
    ops : Ops
    vocab_size : int
    coarse : bool
        Whether more than `FEW_ROWS` rows use other arithmetic: products with fewer bits, or products or attention
        with sums in another order.
    """

    ops: Ops
    vocab_size: int
    coarse: bool

    def sequence(self, dtype: str, capacity: int, layers: int | None = None) -> SequenceState:
        """Create the empty state of a sequence; see `SequenceState`."""

    def workspace(self, rows: int) -> Any:
        """Allocate arrays for up to `rows` tokens; ``.rows(count)`` slices them, ``.x`` is the residual stream."""

    def embed(self, ids: Array, out: Array) -> None:
        """Embed token ids, int32 ``[T]``, into `out` float32 ``[T, hidden]``."""

    def forward(
        self, work: Any, spans: Sequence[Span], pictures: Sequence[Features] = (), trace: Trace = no_trace
    ) -> None:
        """Run all layers on ``work.x`` in place and append keys and values; the lengths are not advanced.

        The features of `pictures` replace rows before the first layer. Further levels are added after later layers.
        """

    def logits(self, x: Array, out: Array) -> None:
        """``out [T, vocab] = head(norm(x [T, hidden]))``."""


MOST_CAPTURED = 64
"""Captured steps kept of several sequences: drafts of several answers make many sets of rows."""


class Outcome:
    """The result of a step: row i predicts the successor of the i-th token fed. Valid until the next step."""

    def __init__(self, ops: Ops, logits: Array, best: Array):
        self._ops, self._logits, self._best = ops, logits, best
        self._read: list[int] | None = None

    def best(self, row: int) -> int:
        """Return the token with the highest logit; -1 if a logit is not finite."""
        if self._read is None:
            self._read = self._ops.download(self._best).tolist()
        return self._read[row]

    def logits(self, row: int) -> np.ndarray:
        """float32 ``[vocab]``."""
        return self._ops.download(self._logits[row : row + 1])[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
    """Captured steps of one sequence, by the number of rows. Valid while it has the same arrays."""

    arrays: Sequence[Any]
    replays: dict[int, Callable[[], None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Together:
    """A captured step of several sequences.

    Attributes
    ----------
    replay : callable
    move : callable or None
        See `Ops.movable`.
    members : int
        Number of the set of sequences whose arrays it uses.
    """

    replay: Callable[[], None]
    move: Move | None
    members: int


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


class DecodeStep:
    """Runs up to `FEW_ROWS` tokens of one or several sequences; each combination is captured once and replayed.

    Parameters
    ----------
    decoder : Decoder
    """

    def __init__(self, decoder: Decoder):
        ops = decoder.ops
        self.ops, self.decoder = ops, decoder
        self._work = decoder.workspace(FEW_ROWS)
        self._ids = ops.empty((FEW_ROWS,), np.int32)
        self._logits = ops.empty((FEW_ROWS, decoder.vocab_size))
        self._best = ops.empty((FEW_ROWS,), np.int32)
        self._first = [(self._ids[:rows], self._logits[:rows], self._best[:rows]) for rows in range(FEW_ROWS + 1)]
        self._members = 0
        self.forget()

    def __call__(self, fed: Sequence[tuple[SequenceState, Sequence[int]]]) -> Outcome:
        """Feed tokens to sequences, at most `FEW_ROWS` in total."""
        every: list[int] = []
        for sequence, tokens in fed:
            sequence.reserve(sequence.length + len(tokens))
            every += tokens
        ids, logits, best = self._first[len(every)]
        self.ops.write(ids, np.array(every, np.int32))
        self._captured(fed)()
        for sequence, tokens in fed:
            sequence.advance(len(tokens))
        return Outcome(self.ops, logits, best)

    def forget(self) -> None:
        """Free the captured steps of several sequences, and their memory."""
        self._arrays, self._together = list[Any](), dict[Any, Together]()

    def _captured(self, fed: Sequence[tuple[SequenceState, Sequence[int]]]) -> Callable[[], None]:
        if len(fed) > 1:
            return self._captured_together(fed)
        ((sequence, tokens),) = fed
        known = sequence.captured.get(self)
        if known is None or not _same(known.arrays, sequence.arrays):
            known = sequence.captured[self] = Captured(sequence.arrays)
        replay = known.replays.get(len(tokens))
        if replay is None:
            replay = known.replays[len(tokens)] = self._capture(fed)
        return replay

    def _captured_together(self, fed: Sequence[tuple[SequenceState, Sequence[int]]]) -> Callable[[], None]:
        """Return a step of these sequences: one captured with others, of the same capacities where these are fixed, if
        it can be moved."""
        arrays = [array for sequence, _ in fed for array in (*sequence.arrays, sequence.start)]
        if not _same(arrays, self._arrays):
            self._members += 1
            self._together = {rows: step for rows, step in self._together.items() if step.move is not None}
            self._arrays = arrays  # last: after an interrupt all this is done again
        anywhere = self.ops.any_capacity
        rows = tuple([(len(tokens), None if anywhere else sequence.store.capacity) for sequence, tokens in fed])
        known = self._together.get(rows)
        if known is None or not self._moved(known):
            if len(self._together) >= MOST_CAPTURED:
                self._together.clear()
            replay = self._capture(fed)
            known = self._together[rows] = Together(replay, self.ops.movable(replay, arrays), self._members)
        return known.replay

    def _moved(self, step: Together) -> bool:
        """Make a step use the arrays of the present members, if it can."""
        if step.members != self._members:
            if step.move is None or not step.move(self._arrays):
                return False
            step.members = self._members
        return True

    def _capture(self, fed: Sequence[tuple[SequenceState, Sequence[int]]]) -> Callable[[], None]:
        spans = [Span(sequence, len(tokens)) for sequence, tokens in fed]
        return self.ops.capture(partial(self._step, spans, sum([span.rows for span in spans])))

    def _step(self, spans: Sequence[Span], rows: int) -> None:
        work, logits = self._work.rows(rows), self._logits[:rows]
        self.decoder.embed(self._ids[:rows], work.x)
        self.decoder.forward(work, spans)
        self.decoder.logits(work.x, logits)
        self.ops.argmax(logits, out=self._best[:rows])
