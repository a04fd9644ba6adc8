"""The facade: ask a loaded model."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qvl_runtime.answering import Answering
from qvl_runtime.blob import Blob
from qvl_runtime.engine.constraints import Form
from qvl_runtime.engine.generation import Piece
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.engine.scoring import score
from qvl_runtime.engine.session import Sessions
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Access, PictureEncoder
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.options import chat_window, given, named_options, one_constraint, whole_number
from qvl_runtime.results import ChatResult, Result, Stream, collected
from qvl_runtime.trace import Trace, no_trace


class Model:
    """A loaded model. Make one with `qvl_runtime.loading.load`.

    Attributes
    ----------
    tokenizer : Tokenizer
    config : Config
    generation_config : GenerationConfig
    window : int
        Tokens a prompt and its answer may have together.
    """

    def __init__(
        self,
        blob: Blob,
        tokenizer: Tokenizer,
        sessions: Sessions,
        pictures: PictureEncoder | None,
        *,
        window: int,
        identity: str,
        device: threading.RLock,
    ):
        self.blob, self.tokenizer, self.pictures, self.window = blob, tokenizer, pictures, window
        self.config, self.generation_config = blob.config, blob.generation_config
        self.decoder, self.ops = sessions.decoder, sessions.decoder.ops
        self._sessions, self._identity, self._device = sessions, identity, device
        self._answering = Answering(
            sessions,
            pictures,
            tokenizer=tokenizer,
            stop_ids=self.stop_ids,
            grounding=blob.family.grounding,
            window=window,
            largest=blob.config.max_position_embeddings,
        )
        read = None if pictures is None else pictures.reader.read
        self.prompts = blob.family.prompts(tokenizer, blob.config, blob.generation_config, read)

    def __repr__(self) -> str:
        title = self.blob.family.title(self.config, self.generation_config)
        return f"<Model {title}, {str(self.blob.path)!r} on {self.ops.name}, window {self.window}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    @property
    def is_chat(self) -> bool:
        """Whether the model knows chat turns."""
        return self.generation_config.is_chat

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.tokenizer.stop_ids | set(self.generation_config.eos_token_id)

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
    ) -> Result | list[Result]:
        """Answer a prompt; the options are those of `stream`.

        With `n` it gives a list of as many answers, which share the prompt's computation: answer i is that of
        ``seed + i`` alone, or random without a seed.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "n", "seed")}
        first = seed if seed is None else whole_number("seed", seed)

        def answer(seed: int | None) -> Result:
            return self.stream(**options, seed=seed).result()

        if n is None:
            return answer(first)
        return [answer(None if first is None else first + i) for i in range(whole_number("n", n, 1))]

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
        made = self.prompts.build(prompt, images, Access(allow_paths, allow_urls))
        form = one_constraint(constraint, form, min_new_tokens)
        pieces = self._answering.answer(made, sampler, max_new_tokens, stop, form, logprobs, speculate)
        return Stream(
            pieces, lambda seen: collected(seen, lambda text: self._answering.boxes(made.opened + text, made))
        )

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
        on_piece: Callable[[Piece], None] | None = None,
    ) -> ChatResult:
        """Answer one turn of a conversation; the options are those of `stream_chat`.

        `on_piece` is called with every `Piece` as it comes; what it raises ends the answer.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "on_piece")}
        stream = self.stream_chat(**options)
        for piece in stream:
            if on_piece is not None:
                on_piece(piece)
        return stream.result()

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
        access = Access(allow_paths, allow_urls)
        made = self.prompts.chat(query, history, images, system=system, window=window, access=access)
        pieces = self._answering.answer(
            made.prompt, sampler, wanted, stop, one_constraint(constraint, form), logprobs, speculate
        )

        def finish(seen: list[Piece]) -> ChatResult:
            result = collected(seen, lambda text: self._answering.boxes(text, made.prompt))
            text = result.text.strip()
            turns = [*(history or []), (made.query, text)]
            return ChatResult(**vars(result) | {"text": text}, history=turns, left_out=made.left_out)

        return Stream(pieces, finish)

    @named_options
    def logits(
        self,
        prompt: Any,
        images: Sequence[ImageSource] | None = None,
        *,
        allow_paths: bool = True,
        allow_urls: bool = False,
        trace: Trace = no_trace,
    ) -> np.ndarray:
        """Logits after every token of a prompt, float32 ``[T, vocab]``, with the most precise cache there is.

        `trace` is called with each stage of the decoder, for parity checks.
        """
        made = self.prompts.build(prompt, images, Access(allow_paths, allow_urls))
        self._answering.check_length(made)
        features, _ = self._answering.features(made, 0)
        with self._device:
            return score(self.decoder, made, features, trace)

    def score(
        self, prompt: Any, continuations: Sequence[str | Sequence[int]], images: Sequence[ImageSource] | None = None
    ) -> list[list[float]]:
        """How likely each continuation of a prompt is: natural logarithms, one a token.

        The prompt is computed once. A continuation that is a text is tokenized by itself, without special tokens.
        """
        return self._answering.score(self.prompts.build(prompt, images, Access()), continuations)

    @named_options
    def encode_image(
        self, image: ImageSource, *, allow_paths: bool = True, allow_urls: bool = False, trace: Trace = no_trace
    ) -> np.ndarray:
        """What the decoder sees of a picture, float32 ``[tokens, hidden]``; `trace` as in `logits`."""
        if self.pictures is None:
            raise QvlError(f"{self.blob.path}: has no vision part and takes no pictures; use a vision-language model")
        return self.pictures.encode(image, Access(allow_paths, allow_urls), trace)

    def forget(self) -> None:
        """Free the keys and values of earlier calls."""
        self._sessions.clear()

    def save_past(
        self, path: str | os.PathLike, history: Sequence[tuple[Any, str | None]], *, system: str | None = None
    ) -> int:
        """Write keys and values of a conversation to a file, as far as earlier calls left them in memory.

        After `load_past` in another run of the same model the conversation goes on without computing it again. The
        file is as large as the cache. `history` and `system` are those of `chat`.

        Returns
        -------
        int
            Tokens saved. 0: none of the conversation is in memory, and no file was written.

        Raises
        ------
        QvlError
            When the file cannot be written, or a picture cannot be read again.
        """
        self._require_chat()
        own = self.generation_config
        window = chat_window(self.window, own.max_window_size, own.max_new_tokens)
        made = self.prompts.chat("", history, None, system=system, window=window, access=Access())
        return self._sessions.save(path, made.prompt.keys, self._identity)

    def load_past(self, path: str | os.PathLike) -> int:
        """Take up what `save_past` wrote; returns how many tokens that are.

        Raises
        ------
        QvlError
            When the file is damaged, or was written with other weights, another device, cache, or `activations`.
        """
        return self._sessions.load(path, self._identity)

    def _require_chat(self) -> None:
        if not self.is_chat:
            raise QvlError(
                f"{self.blob.path}: is a base model and has no chat turns; use generate() with a plain prompt"
            )
