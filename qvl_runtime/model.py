"""The facade: ask a loaded model."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qvl_kernels.ops import Ops
from qvl_runtime.engine.constraints import Form
from qvl_runtime.engine.drafts import ROW_COST, PromptLookup
from qvl_runtime.engine.generation import (
    ChatResult,
    Chooser,
    Piece,
    Result,
    Timings,
    collect,
    generate_step,
    score,
    stream_generate,
)
from qvl_runtime.engine.kv_file import identity
from qvl_runtime.engine.sampling import Sampler
from qvl_runtime.engine.sequence import Context
from qvl_runtime.engine.session import Sessions
from qvl_runtime.errors import QvlError
from qvl_runtime.families.qwen_vl.decoder import Decoder
from qvl_runtime.families.qwen_vl.grounding import opened_box
from qvl_runtime.families.weights import Trace, Weights, no_trace
from qvl_runtime.file.blob import Blob
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import PictureEncoder
from qvl_runtime.inputs.prompt import DEFAULT_SYSTEM, Prompt, build_chat, build_prompt
from qvl_runtime.inputs.request import Request, Requests
from qvl_runtime.inputs.tokenizer import Tokenizer

ANSWER_SHARE = 8
"""A chat keeps one part in so many of the window free for the answer, if that many tokens are asked for."""

BLOCK_SHARE = 4
"""Turns leave a full window in blocks of one part in so many."""


class Model:
    """A loaded model. Make one with `qvl_runtime.loading.load`.

    Attributes
    ----------
    tokenizer : Tokenizer
    config : ModelConfig
    generation_config : GenerationConfig
    window : int
        Tokens a prompt and its answer may have together.
    """

    def __init__(
        self,
        blob: Blob,
        ops: Ops,
        vision_ops: Ops,
        kv_cache: str,
        context: int | None,
        activations: str,
        conversations: int,
        image_cache_bytes: int,
        cache_dir: str | os.PathLike | None,
    ):
        self.ops = ops
        self.blob = blob
        self.config, self.generation_config = blob.config, blob.generation_config
        window, visual = self.config.max_position_embeddings, self.config.visual
        self.window = window if context is None else min(context, window)
        self.tokenizer = Tokenizer.from_ranks(
            blob.ranks,
            image_tags=visual is not None,
            n_queries=visual.n_queries if visual else 256,
            vocab_size=self.config.vocab_size,
        )
        self.decoder = Decoder(Weights(blob, ops))
        self._device, self._kv_cache, self._activations = threading.RLock(), kv_cache, activations
        self._sessions = Sessions(self.decoder, kv_cache, conversations, self._device)
        self.vision = None
        if visual is not None:
            self.vision = PictureEncoder(
                Weights(blob, vision_ops),
                ops,
                activations=activations,
                memory=image_cache_bytes,
                folder=cache_dir,
                device=self._device,
            )
        self._requests = Requests(self.tokenizer, self.vision, self.window)

    @property
    def is_chat(self) -> bool:
        """Whether the model was trained for turns of a conversation."""
        return self.generation_config.chat_format == "chatml"

    def generate(
        self, prompt: Any, images: Sequence[ImageSource] | None = None, *, n: int | None = None, **options: Any
    ) -> Result | list[Result]:
        """Answer a prompt; the options are those of `stream`.

        With `n` it gives a list of so many answers, which share the prompt's computation. Answer i is the one that
        ``seed + i`` gives alone; without a seed each is random.
        """
        opened = opened_box(prompt) if isinstance(prompt, str) else ""
        if n is None:
            return collect(self.stream(prompt, images, **options), opened)
        if n < 1:
            raise QvlError(f"n is {n}; expected 1 or more")
        seed = options.pop("seed", None)
        seeds = [None if seed is None else seed + i for i in range(n)]
        return [collect(self.stream(prompt, images, seed=s, **options), opened) for s in seeds]

    def stream(
        self,
        prompt: Any,
        images: Sequence[ImageSource] | None = None,
        *,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
        form: Form | None = None,
        logprobs: int | None = None,
        speculate: bool = True,
        allow_urls: bool = False,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Answer a prompt piece by piece, never showing half a character.

        Parameters
        ----------
        prompt : str, list of dict, or sequence of int
            A text with inline ``<img>path</img>``; the list format (``[{"image": …}, {"text": …}]``); chat messages
            (``[{"role": …, "content": …}]``); or token ids with image slots.
        images : sequence of image, optional
            Paths, bytes, PIL images or uint8 arrays, for the slots in order. A text without a tag gets them in
            front, as ``Picture N: <img></img>``.
        max_new_tokens : int
            The answer ends earlier where the model's window does.
        stop : str or sequence of str
            Texts that end the answer and are not in it.
        form : Form, optional
            What the answer must look like: see `qvl_runtime.engine.constraints`.
        logprobs : int, optional
            Give the log probability of every token, and of so many of the most likely ones in its place.
        speculate : bool
            Guess tokens that repeat the text so far and compute several at once, as long as the guesses are good.
            The answer is the same.
        allow_urls : bool
            Let http(s) images be fetched.
        **sampling
            temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, seed: see
            `Sampler`. Without them the answer is greedy.

        Yields
        ------
        Piece

        Raises
        ------
        QvlError
            For a prompt, image or option that cannot be used. Raised before the first piece.
        """
        opened = opened_box(prompt) if isinstance(prompt, str) else ""
        prompt = build_prompt(prompt, images, self.tokenizer, chat=self.is_chat, allow_urls=allow_urls)
        limit = self._limit(prompt, max_new_tokens)
        choose = self._chooser(Sampler(**sampling), prompt, limit, form, logprobs, opened)
        return self._answer(self._requests.make(prompt, allow_urls), choose, stop, limit, speculate)

    def chat(
        self,
        query: Any,
        history: Sequence[tuple[str, str | None]] | None = None,
        images: Sequence[ImageSource] | None = None,
        *,
        system: str = DEFAULT_SYSTEM,
        max_window_size: int | None = None,
        block: int | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        form: Form | None = None,
        logprobs: int | None = None,
        speculate: bool = True,
        allow_urls: bool = False,
        on_piece: Callable[[Piece], None] = lambda piece: None,
        **sampling: Any,
    ) -> ChatResult:
        """Answer one turn of a conversation.

        Parameters
        ----------
        query : str or list of dict
            The user's turn, as text or in the list format.
        history : sequence of (str, str or None)
            Earlier turns, as `ChatResult.history` gives them.
        images : sequence of image, optional
            For the query's image slots, as in `stream`.
        max_window_size : int
            Tokens of history that are kept, counted from the newest turn back. The oldest turns leave whole, and
            also where the question would not fit the model's window with room for an answer.
        block : int
            Turns leave in blocks of at least so many tokens: each time, all that stays has to be computed anew. By
            default a quarter of the model's own window, and 1, the published rule, where `max_window_size` is given.
        on_piece : callable
            Called with every `Piece` as it comes; what it raises ends the answer.
        max_new_tokens, **sampling
            As in `stream`, but from the model's own generation config where they are None or not given.

        Raises
        ------
        QvlError
            As `stream`, and for a base model, which has no turns.
        """
        if not self.is_chat:
            raise QvlError(
                f"{self.blob.path}: is a base model and has no chat turns; use generate() with a plain prompt"
            )
        config = self.generation_config
        wanted = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        prompt, query = self._chat_prompt(query, history, images, system, max_window_size, block, wanted, allow_urls)
        own = {
            "temperature": config.temperature if config.do_sample else 0.0,
            **{name: getattr(config, name) for name in ("top_k", "top_p", "repetition_penalty")},
        }
        sampler = Sampler(**own | {name: value for name, value in sampling.items() if value is not None})
        limit = self._limit(prompt, wanted)
        choose = self._chooser(sampler, prompt, limit, form, logprobs, "")
        pieces = self._answer(self._requests.make(prompt, allow_urls), choose, stop, limit, speculate)
        result = collect(_shown(pieces, on_piece))
        text = result.text.strip()
        fields = {**{f.name: getattr(result, f.name) for f in dataclasses.fields(Result)}, "text": text}
        return ChatResult(**fields, history=[*(history or []), (query, text)], left_out=prompt.left_out)

    def logits(
        self,
        prompt: Any,
        images: Sequence[ImageSource] | None = None,
        *,
        allow_urls: bool = False,
        trace: Trace = no_trace,
    ) -> np.ndarray:
        """Logits after every token of a prompt, float32 ``[T, vocab]``, with the most precise cache there is.

        `trace` is called with each stage of the decoder, for parity checks.
        """
        prompt = build_prompt(prompt, images, self.tokenizer, chat=self.is_chat, allow_urls=allow_urls)
        request = self._requests.make(prompt, allow_urls)
        slots, _ = self._requests.features(request, 0)
        with self._device:
            context = Context(self.ops, self.config, self.ops.score_cache_dtype, len(request.ids), layers=1)
            context.begin(len(request.ids))
            return score(self.decoder, context, request.ids, slots, trace)

    def encode_image(self, image: ImageSource, *, allow_urls: bool = False, trace: Trace = no_trace) -> np.ndarray:
        """What the decoder sees of a picture: float32 ``[n_queries, hidden]``.

        `trace` is called with each stage of the ViT and the adapter, for parity checks.
        """
        if self.vision is None:
            raise QvlError(f"{self.blob.path}: sees no pictures (it has no vision part); use a Qwen-VL model")
        return self.vision.encode(image, allow_urls=allow_urls, trace=trace)

    def forget(self) -> None:
        """Let go of the pasts of earlier calls, and their memory."""
        self._sessions.clear()

    def save_past(
        self, path: str | os.PathLike, history: Sequence[tuple[Any, str | None]], *, system: str = DEFAULT_SYSTEM
    ) -> int:
        """Write keys and values of a conversation to a file, as far as earlier calls left them in memory.

        `load_past` in another run of the same model then lets the conversation go on without computing it again. The
        file is as large as the cache: in Qwen-VL 0.5 MB a token, half with int8.

        Parameters
        ----------
        history, system
            The conversation, as for `chat`.

        Returns
        -------
        int
            Tokens saved. 0: nothing of the conversation is in memory, and no file was written.

        Raises
        ------
        QvlError
            When the file cannot be written, or a picture of the conversation cannot be read again.
        """
        wanted = self.generation_config.max_new_tokens
        prompt, _ = self._chat_prompt("", history, None, system, None, None, wanted, False)
        return self._sessions.save(path, self._requests.make(prompt, False).keys, self._past_identity())

    def load_past(self, path: str | os.PathLike) -> int:
        """Take up what `save_past` wrote; returns how many tokens that are.

        Raises
        ------
        QvlError
            When the file is damaged, or was written with other weights, another device, kind of cache, or setting of
            `activations`. Nothing is lost but time: the conversation is then computed anew.
        """
        return self._sessions.load(path, self._past_identity())

    def _past_identity(self) -> str:
        return identity(self.blob, self.ops, self._activations, self._kv_cache)

    def _chat_prompt(
        self,
        query: Any,
        history: Sequence[tuple[Any, str | None]] | None,
        images: Sequence[ImageSource] | None,
        system: str,
        max_window_size: int | None,
        block: int | None,
        wanted: int,
        allow_urls: bool,
    ) -> tuple[Prompt, Any]:
        """`build_chat`, with what this model does where nothing is asked for; `wanted`: tokens of the answer."""
        if max_window_size is None:
            max_window_size = self.generation_config.max_window_size
            block = max(1, min(max_window_size, self.window) // BLOCK_SHARE) if block is None else block
        return build_chat(
            self.tokenizer,
            query,
            history,
            images,
            system=system,
            max_window_size=max_window_size,
            max_tokens=self.window - min(wanted, self.window // ANSWER_SHARE),
            block=1 if block is None else block,
            allow_urls=allow_urls,
        )

    def _limit(self, prompt: Prompt, max_new_tokens: int) -> int:
        """How many tokens an answer may have: what was asked for, or what the window has room for."""
        if max_new_tokens < 0:
            raise QvlError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
        return min(max_new_tokens, self.window - len(prompt.ids))

    def _chooser(
        self, sampler: Sampler, prompt: Prompt, limit: int, form: Form | None, logprobs: int | None, opened: str
    ) -> Chooser:
        if logprobs is not None and logprobs < 0:
            raise QvlError(f"logprobs is {logprobs}; expected 0 or more alternatives, or None")
        constraint = None if form is None else form.start(self.tokenizer, self._stop_ids(), limit, opened)
        return Chooser(sampler, list(prompt.ids), constraint, logprobs)

    def _answer(
        self, request: Request, choose: Chooser, stop: str | Sequence[str], limit: int, speculate: bool
    ) -> Iterator[Piece]:
        length = len(request.ids)
        session = self._sessions.take(request.keys, length + limit)
        try:
            kept = session.keep(request.keys)
            started = time.perf_counter()
            slots, encoded = self._requests.features(request, kept)
            self.ops.synchronize()
            seen = time.perf_counter()
            session.prefill(request.ids, request.keys, slots, length + limit)
            self.ops.synchronize()
            timings = Timings(
                image=seen - started,
                prefill=time.perf_counter() - seen,
                prompt_tokens=length,
                kept_tokens=kept,
                images=len(request.pictures),
                kept_images=len(request.pictures) - encoded,
            )
            guesses = PromptLookup(request.ids, ROW_COST.get(self.ops.name, 1.0)) if speculate else None
            yield from stream_generate(
                generate_step(session, choose, guesses, limit, timings),
                self.tokenizer,
                stop_ids=self._stop_ids(),
                stop=[stop] if isinstance(stop, str) else list(stop),
                timings=timings,
            )
        finally:
            self._sessions.give(session)

    def _stop_ids(self) -> frozenset[int]:
        tokens = self.tokenizer
        ids = {tokens.im_end_id, tokens.im_start_id, tokens.eod_id, self.generation_config.eos_token_id}
        return frozenset(ids - {None})


def _shown(pieces: Iterator[Piece], show: Callable[[Piece], None]) -> Iterator[Piece]:
    for piece in pieces:
        show(piece)
        yield piece
