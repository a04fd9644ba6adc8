"""One answer: from a checked prompt to pieces of text."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Sequence

from qvl_kernels.ops import Array
from qvl_runtime.boxes import Box
from qvl_runtime.engine.constraints import Answer, Constraint, Form, ReasoningFirst
from qvl_runtime.engine.drafts import PromptLookup
from qvl_runtime.engine.generation import Piece, Timings, TokenSelector, generate_step, logprob, stream_generate
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.engine.session import Sessions
from qvl_runtime.errors import QvlError
from qvl_runtime.families.base import Grounding
from qvl_runtime.inputs.pictures import PictureEncoder
from qvl_runtime.inputs.prompt import Prompt, Slot
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.options import stop_strings, whole_number


class Answering:
    """Computes answers, one after another.

    Parameters
    ----------
    sessions : Sessions
    pictures : PictureEncoder or None
        None for a model that takes no pictures.
    tokenizer : Tokenizer
    stop_ids : frozenset of int
        Tokens that end an answer.
    grounding : Grounding
    window : int
        Tokens a prompt and its answer may have together.
    largest : int
        What `window` could be in this model.
    """

    def __init__(
        self,
        sessions: Sessions,
        pictures: PictureEncoder | None,
        *,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        grounding: Grounding,
        window: int,
        largest: int,
    ):
        self.window, self._largest = window, largest
        self._sessions, self._pictures, self._ops = sessions, pictures, sessions.decoder.ops
        self._tokenizer, self._stop_ids, self._grounding = tokenizer, stop_ids, grounding

    def check_length(self, prompt: Prompt) -> None:
        """Refuse a prompt that is empty or longer than the window."""
        if not prompt.ids:
            raise QvlError("the prompt is empty; say something")
        if len(prompt.ids) > self.window:
            pictures = sum(slot.picture.tokens for slot in prompt.slots)
            parts = f" ({pictures} of them pictures)" if pictures else ""
            remedy = f", or load with a context of up to {self._largest}" if self.window < self._largest else ""
            raise QvlError(
                f"the prompt takes {len(prompt.ids)} tokens{parts} and the window is {self.window}; "
                f"shorten the prompt{remedy}"
            )

    def answer(
        self,
        prompt: Prompt,
        sampler: Sampler,
        max_new_tokens: int,
        stop: str | Sequence[str] | None,
        form: Form | None,
        logprobs: int | None,
        speculate: bool,
        salt: str | None,
    ) -> Generator[Piece, None, None]:
        """Check everything, and return the generator of an answer."""
        self.check_length(prompt)
        limit = min(whole_number("max_new_tokens", max_new_tokens), self.window - len(prompt.ids))
        if logprobs is not None:
            whole_number("logprobs", logprobs)
        stops, constraint = stop_strings(stop), None
        if form is not None:
            constraint = self._constraint(form, prompt, limit)
        select = TokenSelector(sampler, list(prompt.ids), constraint, logprobs)
        return self._pieces(prompt, select, stops, limit, speculate, salt)

    def _constraint(self, form: Form, prompt: Prompt, limit: int) -> Constraint:
        """Hold an answer to a form; half of the tokens are for it where the model reasons first."""
        end = prompt.reasoning_end
        reasoning = 0 if end is None else max(1, limit // 2)
        grounding = self._grounding.constraint
        answer = Answer(self._tokenizer, self._stop_ids, limit - reasoning, prompt.opened, grounding)
        constraint = form.start(answer)
        return constraint if end is None else ReasoningFirst(constraint, end, self._stop_ids, reasoning)

    def _pieces(
        self,
        prompt: Prompt,
        select: TokenSelector,
        stop: list[str],
        limit: int,
        speculate: bool,
        salt: str | None,
    ) -> Generator[Piece, None, None]:
        length = len(prompt.ids)
        session = self._sessions.take(prompt.keys, length + limit, salt)
        try:
            kept = session.keep(prompt)
            started = time.perf_counter()
            features, encoded = self.features(prompt, kept)
            self._ops.synchronize()
            seen = time.perf_counter()
            session.prefill(prompt, features, length + limit)
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
            self._sessions.give(session)

    def score(self, prompt: Prompt, continuations: Sequence[str | Sequence[int]]) -> list[list[float]]:
        """Log probability of every token of some continuations of a prompt; see `Model.score`."""
        self.check_length(prompt)
        encode, length = self._tokenizer.encode_ordinary, len(prompt.ids)
        ids = [encode(text) if isinstance(text, str) else [int(i) for i in text] for text in continuations]
        if (longest := max(map(len, ids), default=0)) > self.window - length:
            raise QvlError(f"a continuation takes {longest} tokens after {length}; the window is {self.window}")
        session = self._sessions.take(prompt.keys, length + longest)
        try:
            features, _ = self.features(prompt, session.keep(prompt))
            session.prefill(prompt, features, length + longest)
            first, scores = session.logits(0), []
            for tokens in ids:
                found = [logprob(first, token, 0).logprob for token in tokens[:1]]
                for before, token in itertools.pairwise(tokens):
                    session.feed(before)
                    found.append(logprob(session.logits(0), token, 0).logprob)
                session.truncate(length)
                scores.append(found)
            return scores
        finally:
            self._sessions.give(session)

    def features(self, prompt: Prompt, kept: int) -> tuple[list[tuple[Slot, Array]], int]:
        """Features of the pictures that reach beyond position `kept`, and how many of them were not known."""
        found, encoded = [], 0
        for slot in prompt.slots:
            if slot.end > kept and self._pictures is not None:
                features, known = self._pictures.features(slot.picture)
                found.append((slot, features))
                encoded += not known
        return found, encoded

    def boxes(self, text: str, prompt: Prompt) -> list[Box]:
        """The boxes of an answer."""
        return self._grounding.parse(text, prompt.pictures)
