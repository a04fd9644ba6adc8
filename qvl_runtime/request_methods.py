"""The methods of a loaded model that answer: generate, stream, chat and batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Unpack, overload

from qvl_runtime.batching import answer_all, one_each
from qvl_runtime.blob import Blob
from qvl_runtime.engine.constraints import Form
from qvl_runtime.engine.generation import Piece
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.engine_client import EngineClient
from qvl_runtime.errors import QvlError
from qvl_runtime.families.base import Calling, Grounding, Prompts
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Access
from qvl_runtime.inputs.prompt import is_ids, is_messages
from qvl_runtime.inputs.tools import Tools, calls_in
from qvl_runtime.options import (
    AnswerOptions,
    batch_size,
    chat_window,
    given,
    named_options,
    one_constraint,
    salt,
    whole_number,
)
from qvl_runtime.results import ChatResult, Result, Stream, collected


class RequestMethods:
    """The methods of `Model` that answer."""

    blob: Blob
    window: int
    generation_config: GenerationConfig
    prompts: Prompts
    _engine: EngineClient

    @property
    def is_chat(self) -> bool:
        """Whether the model is a chat model."""
        return self.generation_config.is_chat

    @property
    def grounding(self) -> Grounding:
        """How the model writes boxes."""
        return self.blob.family.grounding

    @overload
    def generate(
        self,
        prompt: Any,
        images: Sequence[ImageSource] | None = None,
        *,
        n: None = None,
        **options: Unpack[AnswerOptions],
    ) -> Result: ...

    @overload
    def generate(
        self, prompt: Any, images: Sequence[ImageSource] | None = None, *, n: int, **options: Unpack[AnswerOptions]
    ) -> list[Result]: ...

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
        tools: Tools | Sequence[Mapping[str, Any]] | None = None,
        logprobs: int | None = None,
        speculate: bool = True,
        allow_paths: bool = True,
        allow_urls: bool = False,
        cache_salt: str | None = None,
    ) -> Result | list[Result]:
        """Answer a prompt; the options are those of `stream`.

        With `n` return a list of `n` answers. The prompt is computed once. Answer i equals a single answer with the
        seed ``seed + i``; without a seed the answers are random.
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
        tools: Tools | Sequence[Mapping[str, Any]] | None = None,
        logprobs: int | None = None,
        speculate: bool = True,
        allow_paths: bool = True,
        allow_urls: bool = False,
        cache_salt: str | None = None,
    ) -> Stream[Result]:
        """Answer a prompt as a stream of pieces; each piece holds whole characters.

        Parameters
        ----------
        prompt : str, list of dict, or sequence of int
            Raw text with inline ``<img>path</img>``; a list of parts (``[{"image": …}, {"text": …}]``), which a chat
            model reads as the user's turn; chat messages (``[{"role": …, "content": …}]``); or token ids with image
            slots.
        images : sequence of image, optional
            Images for the empty slots, in order. If a text has no slot, they are placed before it.
        max_new_tokens : int
            The answer ends earlier if the window is full.
        min_new_tokens : int
            Number of tokens, with those of reasoning, before which no stop token is allowed. A string of `stop` still
            ends the answer.
        temperature : float
            0 takes the most likely token (greedy): then `top_k`, `top_p`, `min_p` and `seed` have no effect.
        top_k, top_p, min_p
            Draw from the k most likely tokens (0 is off), from the fewest whose probabilities reach p (1 is off), from
            those that have at least p times the highest probability (0 is off).
        repetition_penalty : float
            For tokens of prompt and answer; 1 is off.
        presence_penalty, frequency_penalty : float
            For tokens of the answer, from -2 to 2; 0 is off.
        seed : int, optional
            The same seed gives the same answer; by default a random one.
        stop : str or sequence of str, optional
            Strings that end the answer. The answer does not include them.
        constraint : Form, optional
            Restricts the answer: `Regex`, `JsonSchema` or `Grounding`.
        tools : Tools or sequence of mapping, optional
            Functions that the model may call, for chat messages; see `Tools`. The calls are in the result. Append the
            answer as a message of the role "assistant" and what each call returned as one of the role "tool" to get
            the next answer.
        logprobs : int, optional
            Return the log probability of every token, and of this many most likely alternatives.
        speculate : bool
            Draft tokens by prompt lookup and verify several in one step, while that is faster. The answer is the same.
        allow_paths : bool
            Allow pictures from local files. If False, ``<img>`` tags are plain text.
        allow_urls : bool
            Allow pictures from http(s) URLs.
        cache_salt : str, optional
            Partitions the prefix cache and the picture cache: entries are shared only between requests with the same
            salt. The time an answer takes then reveals nothing about the requests of other users.

        Returns
        -------
        Stream
            An iterator of `Piece`; its `result` method returns the whole answer, a `Result`.

        Raises
        ------
        QvlError
            For an invalid prompt, image or option. Raised before the first piece.
        """
        sampler = Sampler(
            temperature, top_k, top_p, repetition_penalty, seed, min_p, presence_penalty, frequency_penalty
        )
        access = Access(allow_paths, allow_urls, salt(cache_salt))
        form, prompts, calls = one_constraint(constraint, min_new_tokens), self.prompts, None
        if tools is not None:
            tools = tools if isinstance(tools, Tools) else Tools(tools)
            calling = self.calling(prompt)
            prompts, form = calling.prompts(prompts, tools), calling.form(tools, form)
            calls = functools.partial(calls_in, calling.reader)
        made = prompts.build(prompt, images, access)
        job = self._engine.answer(
            made,
            sampler,
            max_new_tokens=max_new_tokens,
            stop=stop,
            form=form,
            logprobs=logprobs,
            speculate=speculate,
            salt=cache_salt,
        )
        return Stream(job, lambda pieces: collected(pieces, lambda text: self._engine.boxes(text, made), calls))

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
        logprobs: int | None = None,
        speculate: bool = True,
        allow_paths: bool = True,
        allow_urls: bool = False,
        cache_salt: str | None = None,
        on_piece: Callable[[Piece], None] | None = None,
    ) -> ChatResult:
        """Answer one turn of a conversation; the options are those of `stream_chat`.

        `on_piece` is called with every `Piece` as it is produced. An exception from it ends the answer.
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
        logprobs: int | None = None,
        speculate: bool = True,
        allow_paths: bool = True,
        allow_urls: bool = False,
        cache_salt: str | None = None,
    ) -> Stream[ChatResult]:
        """Answer one turn of a conversation as a stream.

        Parameters
        ----------
        query : str or list of dict
            The user's turn, as text or as a list of parts.
        history, images : sequence, optional
            Earlier turns, as in `ChatResult.history`; images for the slots of the query, as in `stream`.
        system : str, optional
            System prompt; by default that of the model family.
        max_window_size : int, optional
            Tokens of history in the prompt, counted back from the newest turn. Older turns are left out, whole. Turns
            are also left out if the prompt and the space reserved for the answer would exceed the window.
        block : int, optional
            Leave out at least this many tokens at a time, because the rest of the history is then computed again. By
            default a quarter of the window; 1, the published rule, if `max_window_size` is given.
        max_new_tokens, temperature, …
            As in `stream`. None takes the value of the model's generation config.

        Raises
        ------
        QvlError
            As for `stream`, and if the model is a base model.
        """
        self._require_chat()
        if is_messages(query):
            raise QvlError("chat takes one question, and earlier turns in history: pass messages to generate or stream")
        if system is not None and not isinstance(system, str):
            raise QvlError(f"system is {system!r:.60}; expected a str")
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
        job = self._engine.answer(
            made.prompt,
            sampler,
            max_new_tokens=wanted,
            stop=stop,
            form=one_constraint(constraint),
            logprobs=logprobs,
            speculate=speculate,
            salt=cache_salt,
        )

        def finish(pieces: list[Piece]) -> ChatResult:
            result = collected(pieces, lambda text: self._engine.boxes(text, made.prompt))
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
        """Answer many requests concurrently. Each answer equals that of the request alone.

        Parameters
        ----------
        requests : iterable of mapping
            The arguments of `generate` by name (``{"prompt": …, "images": …, "seed": …}``), or those of `stream_chat`
            if there is a "query". The iterable is consumed lazily.
        max_batch : int
            Largest number of requests in progress, up to 16.
        on_result : callable, optional
            Called with the index and the result of each request, in order of completion. An exception from it ends
            the batch.

        Returns
        -------
        list
            The result of `generate` or `chat` for each request, in order. An invalid request yields its QvlError and
            does not affect the others.
        """
        return answer_all(self, requests, batch_size(max_batch), on_result)

    def calling(self, prompt: Any) -> Calling:
        """Return how the model takes the tools of a prompt.

        Raises
        ------
        QvlError
            If the model takes none, or the prompt is no conversation.
        """
        if self.blob.family.calling is None:
            raise QvlError(f"{self.blob.path}: the chat template of {self.blob.title} has no tools; use Qwen3-VL")
        if isinstance(prompt, str) or is_ids(prompt):
            raise QvlError("tools need chat messages, in which the model's template lists them; found another prompt")
        return self.blob.family.calling

    def _require_chat(self) -> None:
        if not self.is_chat:
            raise QvlError(
                f"{self.blob.path}: is a base model and has no chat turns; use generate() with a plain prompt"
            )
