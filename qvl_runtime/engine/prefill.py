"""The forward pass of prompts: the next slice of one, or those of several in the same products."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qvl_kernels.ops import FEW_ROWS, Array
from qvl_runtime.engine.decoder import Features, Span
from qvl_runtime.inputs.prompt import Key, Slot
from qvl_runtime.trace import Trace

if TYPE_CHECKING:
    from qvl_runtime.engine.session import Session


@dataclasses.dataclass(eq=False)
class Unread:
    """A prompt that a session computes.

    Attributes
    ----------
    ids, keys : sequence
        Tokens, and the content of every position.
    features : sequence of (Slot, Array)
    capacity : int
        Number of positions of prompt and answer.
    work : object
        The decoder's workspace, for the next slice.
    """

    ids: Sequence[int]
    keys: Sequence[Key]
    features: Sequence[tuple[Slot, Array]]
    capacity: int
    work: Any = None


def slice_end(first: int, length: int, rows: int) -> int:
    """Return the end of a slice of about `rows` tokens that begins at `first`, in a prompt of `length` tokens.

    Slices end at multiples of `rows`. None has `FEW_ROWS` tokens or fewer unless the whole remainder has: small
    products may use other arithmetic than large ones, and the cuts must not affect the answer.
    """
    end = (first // rows + 1) * rows
    if end - first <= FEW_ROWS:
        end += rows
    return length if length - end <= FEW_ROWS else end


def compute_slices(sessions: Sequence[Session], rows: int, check: Trace) -> None:
    """Compute a slice of about `rows` tokens of a session with an unread prompt; of several sessions, all that is left.

    With several sessions `mixes` must hold for each. `check` is called after each layer; after an exception from it
    no session has changed.
    """
    decoder, parts, spans, pictures, total = sessions[0].decoder, [], [], list[Features](), 0
    for session in sessions:
        unread = session.unread
        assert unread is not None, "the prompt is computed already"
        session.state.reserve(unread.capacity)
        first, length = session.length, len(unread.ids)
        chunk = unread.ids[first : length if len(sessions) > 1 else slice_end(first, length, rows)]
        parts.append(np.asarray(chunk, np.int32))
        spans.append(Span(session.state, len(chunk)))
        for slot, values in unread.features:
            row = total + slot.start - first
            pictures.append(Features(row, slot.picture.tokens, values, total, total + len(chunk)))
        total += len(chunk)
    unread = sessions[0].unread
    assert unread is not None
    if unread.work is None or unread.work.x.shape[0] < total:
        unread.work = decoder.workspace(total)
    work = unread.work.rows(total)
    decoder.embed(decoder.ops.upload(np.concatenate(parts)), work.x)
    decoder.forward(work, spans, pictures, check)
    total = 0
    for session, span in zip(sessions, spans):
        total += span.rows
        session.read(span.rows, work.x[total - 1 : total])


def mixes(session: Session) -> bool:
    """Whether the rest of a session's prompt may be computed beside others, and gives the same answer.

    Products of more than `FEW_ROWS` rows may use other arithmetic than this rest would alone.
    """
    return session.unread is not None and (
        not session.decoder.coarse or len(session.unread.ids) - session.length > FEW_ROWS
    )
