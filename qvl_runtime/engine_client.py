"""Submits prompts to the engine: one job for each answer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Sequence
from typing import TypeVar

from qvl_kernels.ops import Array
from qvl_runtime.boxes import Box
from qvl_runtime.engine.constraints import Answer, AtLeast, Constraint, Form, ReasoningFirst
from qvl_runtime.engine.drafts import PromptLookup
from qvl_runtime.engine.generation import Timings, TokenSelector, generate_step, logprob, stream_generate
from qvl_runtime.engine.job import Job, Work
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.engine.scheduler import Scheduler
from qvl_runtime.engine.session import Slice, Sliced
from qvl_runtime.errors import NoRoomError, PromptTooLongError, QvlError
from qvl_runtime.families.base import Grounding
from qvl_runtime.inputs.pictures import PictureEncoder
from qvl_runtime.inputs.prompt import Prompt, Slot, is_ids
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.options import stop_strings, whole_number
from qvl_runtime.slices import at_once

T = TypeVar("T")

Seen = list[tuple[Slot, Array]]
"""Pictures and their features."""


def _in_slices(encoding: Generator[None, None, T], left: int) -> Sliced[T]:
    """Encode a picture in slices; the engine schedules each slice."""
    while True:
        try:
            next(encoding)
        except StopIteration as end:
            return end.value
        yield Slice(True, left)


class EngineClient:
    """Checks the options of a prompt and submits its job to the engine.

    Parameters
    ----------
    scheduler : Scheduler
    pictures : PictureEncoder or None
        None for a model that takes no pictures.
    tokenizer : Tokenizer
    stop_ids : frozenset of int
        Tokens that end an answer.
    grounding : Grounding
    window : int
        Tokens a prompt and its answer may have together.
    largest : int
        The largest `window` that the model supports.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pictures: PictureEncoder | None,
        *,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        grounding: Grounding,
        window: int,
        largest: int,
    ):
        self.window, self._largest = window, largest
        self._scheduler, self._pictures = scheduler, pictures
        self._prefix_cache, self._ops = scheduler.prefix_cache, scheduler.prefix_cache.decoder.ops
        self._tokenizer, self._stop_ids, self._grounding = tokenizer, stop_ids, grounding

    def check_length(self, prompt: Prompt) -> None:
        """Raise a QvlError for a prompt that is empty or longer than the window."""
        if not prompt.ids:
            raise QvlError("the prompt is empty; pass some text")
        if len(prompt.ids) > self.window:
            pictures = sum(slot.picture.tokens for slot in prompt.slots)
            parts = f" ({pictures} of them pictures)" if pictures else ""
            raise PromptTooLongError(
                f"the prompt takes {len(prompt.ids)} tokens{parts} and the window is {self.window}; {self._remedy()}"
            )

    def _remedy(self) -> str:
        """Return what helps a prompt that is too long."""
        more = f", or load with a context of up to {self._largest}" if self.window < self._largest else ""
        return f"shorten the prompt{more}"

    def answer(
        self,
        prompt: Prompt,
        sampler: Sampler,
        *,
        max_new_tokens: int,
        stop: str | Sequence[str] | None,
        form: Form | None,
        logprobs: int | None,
        speculate: bool,
        salt: str | None,
    ) -> Job:
        """Check the options and submit the job of one answer.

        Parameters
        ----------
        prompt : Prompt
        sampler : Sampler
            Of this answer alone.
        max_new_tokens, stop, logprobs, speculate
            As in `Model.stream`, not checked yet.
        form : Form or None
            The allowed answers.
        salt : str or None
            Partition of the prefix cache; that of the picture cache is in the pictures' keys.

        Returns
        -------
        Job
            Its results are `Piece` objects.

        Raises
        ------
        QvlError
            If the prompt is empty or too long, an option is out of range, or no answer of the form fits.
        """
        self.check_length(prompt)
        asked = whole_number("max_new_tokens", max_new_tokens)
        limit = min(asked, self.window - len(prompt.ids))
        if logprobs is not None:
            whole_number("logprobs", logprobs)
        stops, constraint = stop_strings(stop), None
        if form is not None:
            constraint = self._constraint(form, prompt, asked, limit)
        select = TokenSelector(sampler, list(prompt.ids), constraint, logprobs)
        work = self._pieces(prompt, select, stops, limit, speculate, salt)
        return self._scheduler.submit(work, len(prompt.ids), len(prompt.ids) + limit)

    def _constraint(self, form: Form, prompt: Prompt, asked: int, limit: int) -> Constraint:
        """Start the constraint of an answer. If the model reasons first, half of `limit` is reserved for the answer.

        `limit` is `asked`, the `max_new_tokens` of the user, or what the window leaves of it.
        """
        end = None if isinstance(form, AtLeast) else prompt.reasoning_end  # a minimum length counts the reasoning
        reasoning = 0 if end is None else max(1, limit // 2)
        grounding = self._grounding.constraint
        answer = Answer(self._tokenizer, self._stop_ids, limit - reasoning, prompt.opened, grounding)
        try:
            constraint = form.start(answer)
        except NoRoomError as error:
            # with reasoning: the least of which half is enough
            needed = error.needed if end is None else max(2, 2 * error.needed - 1)
            if asked >= needed:
                raise PromptTooLongError(
                    f"the prompt takes {len(prompt.ids)} tokens and the window is {self.window}; {error.what} needs "
                    f"{needed}; {self._remedy()}"
                ) from None
            raise NoRoomError(asked, error.what, needed) from None
        return constraint if end is None else ReasoningFirst(constraint, end, self._stop_ids, reasoning)

    def _pieces(
        self,
        prompt: Prompt,
        select: TokenSelector,
        stop: list[str],
        limit: int,
        speculate: bool,
        salt: str | None,
    ) -> Work:
        length = len(prompt.ids)
        session, kept = yield from self._prefix_cache.begin(prompt, length + limit, salt)
        try:
            started = time.perf_counter()
            features, encoded = yield from self.features(prompt, kept)
            self._ops.synchronize()
            seen = time.perf_counter()
            yield from session.prefill(prompt, features, length + limit)
            self._ops.synchronize()
            timings = Timings(
                image=seen - started,
                prefill=time.perf_counter() - seen,
                prompt_tokens=length,
                cached_tokens=kept,
                images=len(prompt.slots),
                cached_images=len(prompt.slots) - encoded,
            )
            drafts = PromptLookup(prompt.ids, self._ops.row_cost) if speculate else None
            yield from stream_generate(
                generate_step(session, select, drafts, limit, timings),
                self._tokenizer,
                stop_ids=self._stop_ids,
                stop=stop,
                timings=timings,
                reasoning_end=prompt.reasoning_end,
            )
        finally:
            self._prefix_cache.give(session)

    def score(self, prompt: Prompt, continuations: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """Compute the log probability of every token of each continuation; see `Model.score`."""
        self.check_length(prompt)
        if not isinstance(continuations, Sequence) or isinstance(continuations, str):
            raise QvlError(f"continuations is {continuations!r:.60}; expected a list of texts or token ids")
        length, ids = len(prompt.ids), [self._continuation(continuation) for continuation in continuations]
        if (longest := max(map(len, ids), default=0)) > self.window - length:
            raise PromptTooLongError(
                f"the prompt takes {length} tokens, a continuation {longest}, and the window is {self.window}; "
                f"{self._remedy()}"
            )
        work = self._scores(prompt, ids, length + longest)
        return self._scheduler.submit(work, length, length + longest).join()

    def _continuation(self, continuation: str | Sequence[int]) -> list[int]:
        if isinstance(continuation, str):
            return self._tokenizer.encode_ordinary(continuation)
        if not is_ids(continuation):
            raise QvlError(f"a continuation is {continuation!r:.60}; expected a text or token ids")
        for token in continuation:
            self._tokenizer.token_bytes(token)  # raises for an id outside the vocabulary
        return [int(token) for token in continuation]

    def _scores(self, prompt: Prompt, continuations: list[list[int]], capacity: int) -> Work:
        length = len(prompt.ids)
        session, kept = yield from self._prefix_cache.begin(prompt, capacity)
        try:
            features, _ = yield from self.features(prompt, kept)
            yield from session.prefill(prompt, features, capacity)
            first = session.logits(0)
            for tokens in continuations:
                found = [logprob(first, token, 0).logprob for token in tokens[:1]]
                for before, token in itertools.pairwise(tokens):
                    session.feed(before)
                    yield session
                    found.append(logprob(session.logits(0), token, 0).logprob)
                session.truncate(length)
                yield found
        finally:
            self._prefix_cache.give(session)

    def features(self, prompt: Prompt, kept: int) -> Sliced[tuple[Seen, int]]:
        """Return the features of pictures that end after position `kept`, and how many of them had to be encoded."""
        found, encoded = [], 0
        for slot in prompt.slots:
            if slot.end > kept and self._pictures is not None:
                features, known = yield from _in_slices(self._pictures.features(slot.picture), len(prompt.ids) - kept)
                found.append((slot, features))
                encoded += not known
        return found, encoded

    def features_at_once(self, prompt: Prompt) -> Seen:
        """Return the features of all pictures of a prompt."""
        return at_once(self.features(prompt, 0))[0]

    def boxes(self, text: str, prompt: Prompt) -> list[Box]:
        """Parse the boxes of an answer to a prompt, which may have opened the first of them."""
        return self._grounding.parse(prompt.opened + text, prompt.pictures)
