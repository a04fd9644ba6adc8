"""The facade of a loaded model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from qvl_runtime.blob import Blob
from qvl_runtime.engine.scheduler import Scheduler
from qvl_runtime.engine.scoring import score
from qvl_runtime.engine_client import EngineClient
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Access, PictureEncoder
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.options import chat_window, named_options
from qvl_runtime.request_methods import RequestMethods
from qvl_runtime.trace import Trace, no_trace


class Model(RequestMethods):
    """A loaded model. `qvl_runtime.loading.load` returns one.

    Parameters
    ----------
    blob : Blob
    tokenizer : Tokenizer
    scheduler : Scheduler
        Its prefix cache has the decoder.
    pictures : PictureEncoder or None
        None for a model that takes no pictures.
    window : int
        Limit for prompt and answer together, in tokens.
    identity : str
        Identifies what keys and values depend on; see `kv_file.identity`.

    Attributes
    ----------
    blob, tokenizer, pictures, window
        The parameters of these names.
    config : Config
    generation_config : GenerationConfig
    decoder : Decoder
    ops : Ops
        The decoder's backend.
    prompts : Prompts
    """

    def __init__(
        self,
        blob: Blob,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        pictures: PictureEncoder | None,
        *,
        window: int,
        identity: str,
    ):
        self.blob, self.tokenizer, self.pictures, self.window = blob, tokenizer, pictures, window
        self.config, self.generation_config = blob.config, blob.generation_config
        self._scheduler, self._prefix_cache, self._identity = scheduler, scheduler.prefix_cache, identity
        self.decoder, self.ops = self._prefix_cache.decoder, self._prefix_cache.decoder.ops
        self._engine = EngineClient(
            scheduler,
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
        return f"<Model {self.blob.title}, {str(self.blob.path)!r} on {self.ops.name}, window {self.window}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.forget()

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.tokenizer.stop_ids | set(self.generation_config.eos_token_id)

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
        """Compute the logits after every token of a prompt, with the most precise cache.

        Parameters
        ----------
        prompt, images, allow_paths, allow_urls
            As in `stream`.
        trace : callable
            Called with the name and the values of each stage of the decoder, for parity checks.

        Returns
        -------
        numpy.ndarray
            float32 ``[T, vocab]``.

        Raises
        ------
        QvlError
            For an invalid prompt or image, or a prompt longer than the window.
        """
        made = self.prompts.build(prompt, images, Access(allow_paths, allow_urls))
        self._engine.check_length(made)
        with self._scheduler.gate, self._scheduler.device:
            return score(self.decoder, made, self._engine.features_at_once(made), trace)

    def score(
        self, prompt: Any, continuations: Sequence[str | Sequence[int]], images: Sequence[ImageSource] | None = None
    ) -> list[list[float]]:
        """Compute the log probabilities of continuations of a prompt, which is computed once.

        Parameters
        ----------
        prompt, images
            As in `stream`.
        continuations : sequence of str or of sequences of int
            A text is tokenized by itself, without special tokens.

        Returns
        -------
        list of list of float
            The natural logarithm of each token's probability, for each continuation.

        Raises
        ------
        QvlError
            For an invalid prompt, image or token, or if prompt and continuation are longer than the window.
        """
        return self._engine.score(self.prompts.build(prompt, images, Access()), continuations)

    @named_options
    def encode_image(
        self, image: ImageSource, *, allow_paths: bool = True, allow_urls: bool = False, trace: Trace = no_trace
    ) -> np.ndarray:
        """Compute the features of a picture: the embeddings of its positions in a prompt.

        Parameters
        ----------
        image, allow_paths, allow_urls
            As for `stream`.
        trace : callable
            As for `logits`, with the stages of the vision part.

        Returns
        -------
        numpy.ndarray
            float32 ``[tokens, hidden]``.

        Raises
        ------
        QvlError
            If the model takes no pictures, or this one cannot be read or is not allowed.
        """
        if self.pictures is None:
            raise QvlError(f"{self.blob.path}: has no vision part and takes no pictures; use a vision-language model")
        with self._scheduler.gate, self._scheduler.device:
            return self.pictures.encode(image, Access(allow_paths, allow_urls), trace)

    def forget(self) -> None:
        """Free the keys and values of earlier calls."""
        self._prefix_cache.clear()

    def save_past(
        self, path: str | os.PathLike, history: Sequence[tuple[Any, str | None]], *, system: str | None = None
    ) -> int:
        """Write the cached keys and values of a conversation to a file.

        After `load_past` in another run of the same model, the conversation continues without a prefill. The file is
        as large as the cache. `history` and `system` are those of `chat`.

        Returns
        -------
        int
            Tokens saved. 0: nothing of the conversation is cached, and no file was written.

        Raises
        ------
        QvlError
            If the file cannot be written, or a picture cannot be read again.
        """
        self._require_chat()
        own = self.generation_config
        window = chat_window(self.window, own.max_window_size, own.max_new_tokens)
        made = self.prompts.chat("", history, None, system=system, window=window, access=Access())
        with self._scheduler.gate, self._scheduler.device:
            return self._prefix_cache.save(path, made.prompt.keys, self._identity)

    def load_past(self, path: str | os.PathLike) -> int:
        """Load a file of `save_past` into the prefix cache; return the number of its tokens.

        Raises
        ------
        QvlError
            If the file is damaged, has more tokens than the window, or was written by another version, or with another
            model, device, cache type, or `activations`.
        """
        with self._scheduler.gate, self._scheduler.device:
            return self._prefix_cache.load(path, self._identity, self.window)
