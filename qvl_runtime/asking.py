"""What a loaded model is asked: prompts, turns of a chat, and many of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qvl_runtime.answering import Answering
from qvl_runtime.batching import answer_all, one_each
from qvl_runtime.blob import Blob
from qvl_runtime.engine.constraints import Form
from qvl_runtime.engine.generation import Piece
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.errors import QvlError
from qvl_runtime.families.base import Prompts
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Access
from qvl_runtime.options import chat_window, given, named_options, one_constraint, salt, whole_number
from qvl_runtime.results import ChatResult, Result, Stream, collected


class Asking:
    """The ways to ask a `Model`."""

    blob: Blob
    window: int
    generation_config: GenerationConfig
    prompts: Prompts
    _answering: Answering

    @property
    def is_chat(self) -> bool:
        """Whether the model knows chat turns."""
        return self.generation_config.is_chat

    @named_options
    def generate(
        self,
        prompt: Any,
        images: Sequence[ImageSource] | None = None,
        *,
        n: int | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        constraint: Form | None = None,
        form: Form | None = None,
        logprobs: int | None = None,
        speculate: bool = True,
        allow_paths: bool = True,
        allow_urls: bool = False,
        cache_salt: str | None = None,
    ) -> Result | list[Result]:
        """Answer a prompt; the options are those of `stream`.

        With `n` it gives a list of as many answers, which share the prompt's computation: answer i is that of
        ``seed + i`` alone, or random without a seed.
        """
        options = {name: value for name, value in locals().items() if name != "self"}
        streams = [self.stream(**one) for one in one_each(options)]
        try:
            results = [stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()
        return results[0] if n is None else results

    @named_options
    def stream(
        self,
        prompt: Any,
        images: Sequence[ImageSource] | None = None,
        *,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        constraint: Form | None = None,
        form: Form | None = None,
        logprobs: int | None = None,
        speculate: bool = True,
        allow_paths: bool = True,
        allow_urls: bool = False,
        cache_salt: str | None = None,
    ) -> Stream:
        """Answer a prompt piece by piece, never showing half a character.

        Parameters
        ----------
        prompt : str, list of dict, or sequence of int
            A text with inline ``<img>path</img>``, taken as it is; a list of parts (``[{"image": …}, {"text": …}]``),
            which is the user's turn where the model is a chat model; chat messages (``[{"role": …, "content": …}]``);
            or token ids with image slots.
        images : sequence of image, optional
            For the empty slots, in order. A text without a slot gets them in front.
        max_new_tokens : int
            The answer ends earlier where the model's window does.
        min_new_tokens : int
            None of the first so many tokens ends the answer; a text of `stop` still does.
        temperature, …, seed
            See `Sampler`. By default the answer is greedy.
        stop : str or sequence of str, optional
            Texts that end the answer and are not in it.
        constraint : Form, optional
            What the answer must look like: `Regex`, `JsonSchema` or `Grounding`. `form` is an older name of it.
        logprobs : int, optional
            Give the log probability of every token, and of this many of the most likely ones in its place.
        speculate : bool
            Draft tokens that repeat the text so far and compute several at once, as long as that pays. The answer is
            the same.
        allow_paths : bool
            Whether pictures may be files. If not, ``<img>`` tags are plain text.
        allow_urls : bool
            Whether http(s) pictures may be fetched.
        cache_salt : str, optional
            Whose request it is: what earlier prompts and pictures left in the caches is used only with the salt they
            came with, so that the time an answer takes tells nobody what another has asked.

        Returns
        -------
        Stream
            An iterator of `Piece`; its `result` is the whole answer.

        Raises
        ------
        QvlError
            For a prompt, image or option that cannot be used. Raised before the first piece.
        """
        sampler = Sampler(
            temperature, top_k, top_p, repetition_penalty, seed, min_p, presence_penalty, frequency_penalty
        )
        made = self.prompts.build(prompt, images, Access(allow_paths, allow_urls, salt(cache_salt)))
        form = one_constraint(constraint, form, min_new_tokens)
        job = self._answering.answer(made, sampler, max_new_tokens, stop, form, logprobs, speculate, cache_salt)
        return Stream(job, lambda seen: collected(seen, lambda text: self._answering.boxes(made.opened + text, made)))

    @named_options
    def chat(
        self,
        query: Any,
        history: Sequence[tuple[Any, str | None]] | None = None,
        images: Sequence[ImageSource] | None = None,
        *,
        system: str | None = None,
        max_window_size: int | None = None,
        block: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        constraint: Form | None = None,
        form: Form | None = None,
        logprobs: int | None = None,
        speculate: bool = True,
        allow_paths: bool = True,
        allow_urls: bool = False,
        cache_salt: str | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> ChatResult:
        """Answer one turn of a conversation; the options are those of `stream_chat`.

        `on_piece` is called with every `Piece` as it comes; what it raises ends the answer.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "on_piece")}
        stream = self.stream_chat(**options)
        try:
            if on_piece is not None:
                for piece in stream:
                    on_piece(piece)
            return stream.result()
        finally:
            stream.cancel()

    @named_options
    def stream_chat(
        self,
        query: Any,
        history: Sequence[tuple[Any, str | None]] | None = None,
        images: Sequence[ImageSource] | None = None,
        *,
        system: str | None = None,
        max_window_size: int | None = None,
        block: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        constraint: Form | None = None,
        form: Form | None = None,
        logprobs: int | None = None,
        speculate: bool = True,
        allow_paths: bool = True,
        allow_urls: bool = False,
        cache_salt: str | None = None,
    ) -> Stream:
        """Answer one turn of a conversation piece by piece; the stream's result is a `ChatResult`.

        Parameters
        ----------
        query : str or list of dict
            The user's turn, as text or as a list of parts.
        history, images : sequence, optional
            Earlier turns, as `ChatResult.history` gives them; pictures for the query's slots, as in `stream`.
        system : str, optional
            The family's default if not given.
        max_window_size : int, optional
            Tokens of history that are kept, counted from the newest turn back. The oldest turns leave whole, and
            also where the question would not fit the model's window with room for an answer.
        block : int, optional
            Turns leave in blocks of at least this many tokens: each time, all that stays has to be computed again. By
            default a quarter of the model's own window, and 1, the published rule, where `max_window_size` is given.
        max_new_tokens, temperature, …
            As in `stream`, but from the model's own generation config where they are None.

        Raises
        ------
        QvlError
            As `stream`, and for a base model.
        """
        self._require_chat()
        own = self.generation_config
        wanted = own.max_new_tokens if max_new_tokens is None else whole_number("max_new_tokens", max_new_tokens)
        sampler = Sampler(
            temperature=given(temperature, own.temperature if own.do_sample else 0.0),
            top_k=given(top_k, own.top_k),
            top_p=given(top_p, own.top_p),
            repetition_penalty=given(repetition_penalty, own.repetition_penalty),
            seed=seed,
            min_p=given(min_p, 0.0),
            presence_penalty=given(presence_penalty, 0.0),
            frequency_penalty=given(frequency_penalty, 0.0),
        )
        window = chat_window(self.window, own.max_window_size, wanted, max_window_size, block)
        access = Access(allow_paths, allow_urls, salt(cache_salt))
        made = self.prompts.chat(query, history, images, system=system, window=window, access=access)
        job = self._answering.answer(
            made.prompt, sampler, wanted, stop, one_constraint(constraint, form), logprobs, speculate, cache_salt
        )

        def finish(seen: list[Piece]) -> ChatResult:
            result = collected(seen, lambda text: self._answering.boxes(text, made.prompt))
            text = result.text.strip()
            turns = [*(history or []), (made.query, text)]
            return ChatResult(**vars(result) | {"text": text}, history=turns, left_out=made.left_out)

        return Stream(job, finish)

    @named_options
    def generate_batch(
        self,
        requests: Iterable[Mapping[str, Any]],
        *,
        max_batch: int = 16,
        on_result: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:
        """Answer many requests side by side; each answer is the one it would have been alone.

        Parameters
        ----------
        requests : iterable of mapping
            The arguments of `generate` by name (``{"prompt": …, "images": …, "seed": …}``), or those of `chat` where
            there is a "query". They are read as they are needed.
        max_batch : int
            Requests that are computed at once, at most.
        on_result : callable, optional
            Called with a request's index and what stands in the list for it, in the order in which they end. What it
            raises ends all.

        Returns
        -------
        list
            For each request, in order, what `generate` or `chat` gives. For a request that cannot be answered its
            QvlError: the others go on.
        """
        return answer_all(self, requests, whole_number("max_batch", max_batch, 1), on_result)

    def _require_chat(self) -> None:
        if not self.is_chat:
            raise QvlError(
                f"{self.blob.path}: is a base model and has no chat turns; use generate() with a plain prompt"
            )
