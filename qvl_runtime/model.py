"""The facade: load a blob, then ask."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from qvl_kernels.ops import Array
from qvl_runtime.adapter import Adapter
from qvl_runtime.blob import Blob
from qvl_runtime.boxes import opened_box
from qvl_runtime.decoder import Decoder
from qvl_runtime.devices import make_ops
from qvl_runtime.errors import QvlError
from qvl_runtime.generation import Engine, Piece, Result, Timings, collect, generate_step, score, stream_generate
from qvl_runtime.images import ImageSource, load_image, preprocess
from qvl_runtime.kv_cache import Context
from qvl_runtime.prompt import DEFAULT_SYSTEM, Prompt, build_chat, build_prompt
from qvl_runtime.sampling import Sampler
from qvl_runtime.tokenizer import Tokenizer
from qvl_runtime.vision import VisionTower
from qvl_runtime.weights import Trace, Weights, no_trace

KV_CACHES = ("fp16", "int8")


@dataclasses.dataclass(frozen=True)
class ChatResult(Result):
    """An answer in a chat: `text` is stripped, and `history` holds the conversation with it."""

    history: list[tuple[str, str | None]]


def load(
    path: str | os.PathLike,
    device: str = "auto",
    kv_cache: str = "fp16",
    *,
    check: bool = False,
    activations: str = "auto",
) -> Model:
    """Open a `.qvl` file.

    Parameters
    ----------
    path : path
        A file made by ``qvl convert``.
    device : str
        "auto" (a usable GPU, or else the CPU), "cpu", "cuda", or "reference" (slow, plain numpy).
    kv_cache : str
        "fp16", or "int8" for half the memory.
    check : bool
        Verify the hash of every tensor first.
    activations : str
        On the CPU, how exact products of many rows are: "int16", "int8" (a scale per 32 columns; about twice as
        fast), or "auto": int8 only for products large enough for it to matter.

    Raises
    ------
    QvlError
        When the file is damaged or an argument is unknown.
    DeviceError
        When the device is missing or too small.
    """
    if kv_cache not in KV_CACHES:
        raise QvlError(f"kv_cache {kv_cache!r} is unknown; choose one of {', '.join(KV_CACHES)}")
    blob = Blob(path)
    if check:
        blob.check()
    return Model(blob, device, kv_cache, activations)


class Model:
    """A loaded model. Make one with `load`.

    Attributes
    ----------
    tokenizer : Tokenizer
    config : ModelConfig
    generation_config : GenerationConfig
    """

    def __init__(self, blob: Blob, device: str, kv_cache: str, activations: str):
        self.ops = make_ops(device, activations)
        self.blob, self.kv_cache = blob, kv_cache
        self.config, self.generation_config = blob.config, blob.generation_config
        visual = self.config.visual
        self.tokenizer = Tokenizer.from_ranks(
            blob.ranks,
            image_tags=visual is not None,
            n_queries=visual.n_queries if visual else 256,
            vocab_size=self.config.vocab_size,
        )
        weights = Weights(blob, self.ops)
        self.decoder = Decoder(weights)
        self.vision = (VisionTower(weights), Adapter(weights)) if visual else None

    @property
    def is_chat(self) -> bool:
        """Whether the model was trained for turns of a conversation."""
        return self.generation_config.chat_format == "chatml"

    def generate(self, prompt: Any, images: Sequence[ImageSource] | None = None, **options: Any) -> Result:
        """Answer a prompt; the options are those of `stream`."""
        opened = opened_box(prompt) if isinstance(prompt, str) else ""
        return collect(self.stream(prompt, images, **options), opened)

    def stream(
        self,
        prompt: Any,
        images: Sequence[ImageSource] | None = None,
        *,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        allow_urls: bool = False,
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
        temperature, top_p, top_k, repetition_penalty, seed
            See `Sampler`. Temperature 0 is greedy.
        stop : str or sequence of str
            Texts that end the answer and are not in it.
        allow_urls : bool
            Let http(s) images be fetched.

        Yields
        ------
        Piece

        Raises
        ------
        QvlError
            For a prompt, image or option that cannot be used. Raised before the first piece.
        """
        prompt = build_prompt(prompt, images, self.tokenizer, chat=self.is_chat, allow_urls=allow_urls)
        sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed)
        stops = [stop] if isinstance(stop, str) else list(stop)
        return self._answer(self._prepare(prompt, allow_urls), sampler, stops, self._limit(prompt, max_new_tokens))

    def chat(
        self,
        query: Any,
        history: Sequence[tuple[str, str | None]] | None = None,
        images: Sequence[ImageSource] | None = None,
        *,
        system: str = DEFAULT_SYSTEM,
        max_window_size: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        allow_urls: bool = False,
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
            Tokens of history that are kept, counted from the newest turn back.
        max_new_tokens, temperature, top_p, top_k, repetition_penalty
            The model's own generation config where None.

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
        prompt, query = build_chat(
            self.tokenizer,
            query,
            history,
            images,
            system=system,
            max_window_size=config.max_window_size if max_window_size is None else max_window_size,
            allow_urls=allow_urls,
        )
        if temperature is None:
            temperature = config.temperature if config.do_sample else 0.0
        sampler = Sampler(
            temperature,
            config.top_k if top_k is None else top_k,
            config.top_p if top_p is None else top_p,
            config.repetition_penalty if repetition_penalty is None else repetition_penalty,
            seed,
        )
        stops = [stop] if isinstance(stop, str) else list(stop)
        limit = self._limit(prompt, config.max_new_tokens if max_new_tokens is None else max_new_tokens)
        result = collect(self._answer(self._prepare(prompt, allow_urls), sampler, stops, limit))
        text = result.text.strip()
        fields = {**{f.name: getattr(result, f.name) for f in dataclasses.fields(Result)}, "text": text}
        return ChatResult(**fields, history=[*(history or []), (query, text)])

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
        prompt = build_prompt(prompt, images, self.tokenizer, chat=self.is_chat)
        prompt = self._prepare(prompt, allow_urls)
        slots = self._encode_slots(prompt)
        context = Context(self.ops, self.config, self.ops.score_cache_dtype, len(prompt.ids), layers=1)
        context.begin(len(prompt.ids))
        return score(self.decoder, context, prompt.ids, slots, trace)

    def encode_image(self, image: ImageSource, *, allow_urls: bool = False, trace: Trace = no_trace) -> np.ndarray:
        """What the decoder sees of a picture: float32 ``[n_queries, hidden]``.

        `trace` is called with each stage of the ViT and the adapter, for parity checks.
        """
        return self.ops.download(self._encode(load_image(image, allow_urls=allow_urls), trace))

    def _encode(self, image: Image.Image, trace: Trace = no_trace) -> Array:
        if self.vision is None:
            raise QvlError(f"{self.blob.path}: sees no pictures (it has no vision part); use a Qwen-VL model")
        tower, adapter = self.vision
        return adapter(tower(preprocess(image, self.config.visual.image_size), trace), trace)

    def _encode_slots(self, prompt: Prompt) -> list[tuple[int, Array]]:
        """Features of every image of a prompt, with the index of the first position each replaces."""
        slots = [i + 1 for i, token in enumerate(prompt.ids) if token == self.tokenizer.img_start_id]
        return [(slot, self._encode(image)) for slot, image in zip(slots, prompt.images, strict=True)]

    def _prepare(self, prompt: Prompt, allow_urls: bool) -> Prompt:
        """Check a prompt's length and load its pictures, so that nothing but arithmetic is left to fail."""
        window = self.config.max_position_embeddings
        if not prompt.ids:
            raise QvlError("the prompt is empty; say something")
        if len(prompt.ids) > window:
            raise QvlError(
                f"the prompt takes {len(prompt.ids)} tokens and the model's window is {window}; shorten the prompt"
            )
        return Prompt(prompt.ids, [load_image(image, allow_urls=allow_urls) for image in prompt.images])

    def _limit(self, prompt: Prompt, max_new_tokens: int) -> int:
        """How many tokens an answer may have: what was asked for, or what the window has room for."""
        if max_new_tokens < 0:
            raise QvlError(f"max_new_tokens is {max_new_tokens}; expected 0 or more")
        return min(max_new_tokens, self.config.max_position_embeddings - len(prompt.ids))

    def _answer(self, prompt: Prompt, sampler: Sampler, stops: list[str], limit: int) -> Iterator[Piece]:
        length = len(prompt.ids)
        started = time.perf_counter()
        slots = self._encode_slots(prompt)
        self.ops.synchronize()
        encoded = time.perf_counter()
        context = Context(self.ops, self.config, self.kv_cache, length + limit)
        context.begin(length)
        engine = Engine(self.decoder, context)
        engine.prefill(prompt.ids, slots)
        self.ops.synchronize()
        timings = Timings(encoded - started, time.perf_counter() - encoded, prompt_tokens=length)
        yield from stream_generate(
            generate_step(engine, prompt.ids, sampler),
            self.tokenizer,
            stop_ids=self._stop_ids(),
            stop=stops,
            max_new_tokens=limit,
            timings=timings,
        )

    def _stop_ids(self) -> frozenset[int]:
        tokens = self.tokenizer
        ids = {tokens.im_end_id, tokens.im_start_id, tokens.eod_id, self.generation_config.eos_token_id}
        return frozenset(ids - {None})
