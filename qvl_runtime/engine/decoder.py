"""What the engine asks of a model's decoder, and a step of several sequences, captured once and replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

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


class Span(NamedTuple):
    """The next rows of what is computed at once, which belong to one sequence."""

    sequence: SequenceState
    rows: int


class Decoder(Protocol):
    """A model's decoder.

    Attributes
    ----------
    ops : Ops
    vocab_size : int
    coarse : bool
        Whether more than `FEW_ROWS` tokens are computed with fewer bits than so many or fewer.
    """

    ops: Ops
    vocab_size: int
    coarse: bool

    def sequence(self, dtype: str, capacity: int, layers: int | None = None) -> SequenceState:
        """The empty state of a sequence; see `SequenceState`."""

    def workspace(self, rows: int) -> Any:
        """Arrays for up to `rows` tokens at a time; ``.rows(count)`` cuts them, ``.x`` is the residual stream."""

    def embed(self, ids: Array, out: Array) -> None:
        """Embed token ids, int32 ``[T]``, into `out` float32 ``[T, hidden]``."""

    def forward(
        self, work: Any, spans: Sequence[Span], pictures: Sequence[Features] = (), trace: Trace = no_trace
    ) -> None:
        """Run all layers over ``work.x`` in place, appending to the sequences (whose lengths are not advanced).

        The features of `pictures` replace rows before the first layer; further levels are added after the others.
        """

    def logits(self, x: Array, out: Array) -> None:
        """``out [T, vocab] = head(norm(x [T, hidden]))``."""


FEW_ROWS = 16
"""Rows of a step, at most. On the CPU so many are computed with 16-bit activations, each row as it would be alone:
an answer does not depend on what is computed beside it."""


class Outcome:
    """What a step has given: row i is for what follows the i-th token fed. It holds until the next step."""

    def __init__(self, ops: Ops, logits: Array, best: Array):
        self._ops, self._logits, self._best = ops, logits, best
        self._read: np.ndarray | None = None

    def best(self, row: int) -> int:
        """The token with the highest logit; -1 where one is not finite."""
        if self._read is None:
            self._read = self._ops.download(self._best)
        return int(self._read[row])

    def logits(self, row: int) -> np.ndarray:
        """float32 ``[vocab]``."""
        return self._ops.download(self._logits[row : row + 1])[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
    """Steps that can be repeated as long as their sequences have these arrays, by the rows of each sequence."""

    arrays: list[Any]
    replays: dict[tuple[int, ...], Callable[[], None]] = dataclasses.field(default_factory=dict)

    def of(self, arrays: Sequence[Any]) -> bool:
        """Whether these are the arrays."""
        return len(arrays) == len(self.arrays) and all(a is b for a, b in zip(arrays, self.arrays))


class DecodeStep:
    """A few tokens through the decoder, of one or of several sequences; each such set is captured once and replayed.

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
        self._members: list[SequenceState] = []
        self._together = Captured([])

    def __call__(self, fed: Sequence[tuple[SequenceState, Sequence[int]]]) -> Outcome:
        """Feed tokens to sequences, up to `FEW_ROWS` in all."""
        spans, rows = [], 0
        for sequence, tokens in fed:
            sequence.reserve(sequence.length + len(tokens))
            spans.append(Span(sequence, len(tokens)))
            rows += len(tokens)
        every = [token for _, tokens in fed for token in tokens]
        self.ops.write(self._ids[:rows], np.array(every, np.int32))
        self._captured(spans, rows)()
        for sequence, count in spans:
            sequence.advance(count)
        return Outcome(self.ops, self._logits[:rows], self._best[:rows])

    def forget(self) -> None:
        """Let go of what was captured of several sequences, and of their memory."""
        self._members, self._together = [], Captured([])

    def _captured(self, spans: Sequence[Span], rows: int) -> Callable[[], None]:
        members = [span.sequence for span in spans]
        arrays = [array for sequence in members for array in sequence.arrays]
        known = members[0].captured.get(self) if len(members) == 1 else self._together
        if known is None or (len(members) > 1 and members != self._members) or not known.of(arrays):
            known = Captured(arrays)
            if len(members) == 1:
                members[0].captured[self] = known
            else:
                self._members, self._together = members, known
        counts = tuple(span.rows for span in spans)
        if counts not in known.replays:
            known.replays[counts] = self.ops.capture(partial(self._step, spans, rows))
        return known.replays[counts]

    def _step(self, spans: Sequence[Span], rows: int) -> None:
        work, logits = self._work.rows(rows), self._logits[:rows]
        self.decoder.embed(self._ids[:rows], work.x)
        self.decoder.forward(work, spans)
        self.decoder.logits(work.x, logits)
        self.ops.argmax(logits, out=self._best[:rows])
