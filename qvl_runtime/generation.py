"""From a prompt's ids to an answer: prefill, then token by token, then text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from qvl_kernels.ops import Array
from qvl_runtime.boxes import Box, parse_boxes
from qvl_runtime.decoder import Decoder, DecodeStep
from qvl_runtime.kv_cache import Context
from qvl_runtime.sampling import Sampler
from qvl_runtime.tokenizer import StreamDecoder, Tokenizer
from qvl_runtime.weights import Trace, no_trace

PREFILL_ROWS = 512
"""Tokens of a prompt computed at a time: enough to keep the products busy, few enough to bound memory."""


@dataclasses.dataclass
class Timings:
    """Where the time went, in seconds."""

    image: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill if self.prefill else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of the tokens after the first, which prefill gives."""
        return (self.new_tokens - 1) / self.decode if self.decode and self.new_tokens > 1 else 0.0


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a stream yields: some text and the tokens behind it.

    The last piece also says why the answer ended ("stop" or "length") and how long it took.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    timings: Timings | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """An answer.

    Attributes
    ----------
    text : str
        As generated, with its tags.
    token_ids : list of int
        Without the token that ended it.
    finish_reason : str
        "stop" or "length".
    boxes : list of Box
        All well-formed boxes of the text.
    prompt_tokens : int
    timings : Timings
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    boxes: list[Box]
    prompt_tokens: int
    timings: Timings


class Engine:
    """A decoder at work on one context."""

    def __init__(self, decoder: Decoder, context: Context):
        self.decoder, self.context = decoder, context
        self.step = DecodeStep(decoder, context)

    def prefill(self, ids: Sequence[int], images: Sequence[tuple[int, Array]]) -> None:
        """Append `ids` to the context; afterwards the step's logits speak of the token that follows.

        Parameters
        ----------
        images : sequence of (int, Array)
            Index into `ids` of the first of an image's positions, and its features.
        """
        ops, work = self.decoder.ops, self.decoder.workspace(min(len(ids), PREFILL_ROWS))
        for first in range(0, len(ids), PREFILL_ROWS):
            chunk = ids[first : first + PREFILL_ROWS]
            rows = work.rows(len(chunk))
            self.decoder.embed(chunk, [(row - first, features) for row, features in images], rows.x)
            self.decoder.forward(rows, self.context)
            self.context.advance(len(chunk))
        self.decoder.logits(rows.x[len(chunk) - 1 : len(chunk)], self.step.logits)
        ops.argmax(self.step.logits, self.step.best)

    def choose(self, sampler: Sampler, past: Sequence[int]) -> int:
        """The next token."""
        ops = self.decoder.ops
        if sampler.is_argmax:
            return int(ops.download(self.step.best)[0])
        return sampler(ops.download(self.step.logits)[0], past)


def generate_step(engine: Engine, prompt: Sequence[int], sampler: Sampler) -> Iterator[int]:
    """Tokens without end, after `engine` was prefilled with `prompt`; each is fed back when the next is asked for."""
    past = list(prompt)
    while True:
        token = engine.choose(sampler, past)
        yield token
        past.append(token)
        engine.step(token)


def stream_generate(
    tokens: Iterator[int],
    tokenizer: Tokenizer,
    *,
    stop_ids: frozenset[int],
    stop: Sequence[str],
    max_new_tokens: int,
    timings: Timings,
) -> Iterator[Piece]:
    """Turn tokens into pieces of text, until a stop token, a stop string, or `max_new_tokens`."""
    decoder, watch = StreamDecoder(tokenizer), StopStrings(stop)
    started = time.perf_counter()
    reason, pending = "length", []
    for token in tokens if max_new_tokens else ():
        if token in stop_ids:
            reason = "stop"
            break
        timings.new_tokens += 1
        pending.append(token)
        text = watch.push(decoder.push(token))
        if watch.found:
            reason = "stop"
            yield Piece(text, tuple(pending))
            pending = []
            break
        if text:
            yield Piece(text, tuple(pending))
            pending = []
        if timings.new_tokens == max_new_tokens:
            break
    timings.decode = time.perf_counter() - started
    rest = "" if watch.found else watch.push(decoder.finish()) + watch.flush()
    yield Piece(rest, tuple(pending), reason, timings)


def collect(pieces: Iterator[Piece], opened: str = "") -> Result:
    """The whole answer of a stream; `opened` is a box the prompt left open, see `opened_box`."""
    pieces = list(pieces)
    text, last = "".join(p.text for p in pieces), pieces[-1]
    ids = [token for p in pieces for token in p.token_ids]
    return Result(text, ids, last.finish_reason, parse_boxes(opened + text), last.timings.prompt_tokens, last.timings)


class StopStrings:
    """Cuts a stream of text before the first of some strings, which may arrive in parts."""

    def __init__(self, stops: Sequence[str]):
        self.stops = [stop for stop in stops if stop]
        self.held, self.found = "", False

    def push(self, text: str) -> str:
        """Text that is certainly before any stop string."""
        self.held += text
        # The string that is complete first ends the text, so it does not matter how the text was cut into parts.
        spans = [(i + len(stop), i) for stop in self.stops if (i := self.held.find(stop)) >= 0]
        if spans:
            self.found = True
            return self._release(min(spans)[1])
        return self._release(len(self.held) - max(map(self._overlap, self.stops), default=0))

    def _overlap(self, stop: str) -> int:
        """How much of the end of what is held could be the beginning of `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self.held)), 0, -1) if self.held.endswith(stop[:n])), 0)

    def _release(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        return text

    def flush(self) -> str:
        """What was held, when nothing more comes."""
        return "" if self.found else self._release(len(self.held))


def score(
    decoder: Decoder,
    context: Context,
    ids: Sequence[int],
    images: Sequence[tuple[int, Array]],
    trace: Trace = no_trace,
) -> np.ndarray:
    """Logits after every token of a prompt: float32 ``[T, vocab]``, in one pass.

    `context` needs but one layer: each layer's keys are used at once and overwritten by the next layer's.
    """
    ops, rows = decoder.ops, 64
    work, part = decoder.workspace(len(ids)), ops.empty((min(rows, len(ids)), decoder.config.vocab_size))
    decoder.embed(ids, images, work.x)
    decoder.forward(work, context, trace)
    out = np.empty((len(ids), decoder.config.vocab_size), np.float32)
    for first in range(0, len(ids), rows):
        x = work.x[first : first + rows]
        decoder.logits(x, part[: x.shape[0]])
        out[first : first + rows] = ops.download(part[: x.shape[0]])
    return out
