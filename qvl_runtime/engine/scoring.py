"""Logits after every token of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qvl_kernels.ops import Array
from qvl_runtime.engine.decoder import Decoder, Features, Span
from qvl_runtime.inputs.prompt import Prompt, Slot
from qvl_runtime.trace import Trace, no_trace

ROWS = 64
"""Tokens whose logits are computed at a time."""


def score(
    decoder: Decoder, prompt: Prompt, features: Sequence[tuple[Slot, Array]], trace: Trace = no_trace
) -> np.ndarray:
    """Compute the logits after every token of a prompt, float32 ``[T, vocab]``, with the most precise cache.

    The cache has one layer: each layer's keys are used at once and overwritten by the next layer's.
    """
    ops, length = decoder.ops, len(prompt.ids)
    sequence = decoder.sequence(ops.score_cache_dtype, length, layers=1)
    sequence.begin(length, prompt.slots)
    work, part = decoder.workspace(length), ops.empty((min(ROWS, length), decoder.vocab_size))
    decoder.embed(ops.upload(np.asarray(prompt.ids, np.int32)), work.x)
    pictures = [Features(slot.start, slot.picture.tokens, values) for slot, values in features]
    decoder.forward(work, [Span(sequence, length)], pictures, trace)
    out = np.empty((length, decoder.vocab_size), np.float32)
    for first in range(0, length, ROWS):
        x = work.x[first : first + ROWS]
        decoder.logits(x, part[: x.shape[0]])
        out[first : first + ROWS] = ops.download(part[: x.shape[0]])
    return out
