"""Prompts on their way into the decoder: checked, with their pictures read."""

from __future__ import annotations

import dataclasses

from qvl_kernels.ops import Array
from qvl_runtime.engine.sequence import Key
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.image_cache import Picture
from qvl_runtime.inputs.pictures import PictureEncoder
from qvl_runtime.inputs.prompt import Prompt
from qvl_runtime.inputs.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of which nothing but arithmetic is left to fail.

    Attributes
    ----------
    ids : list of int
    keys : list of Key
        What each position is computed from.
    pictures : list of (int, Picture)
        The first position of each slot, and what fills it.
    """

    ids: list[int]
    keys: list[Key]
    pictures: list[tuple[int, Picture]]


class Requests:
    """Makes requests for a model.

    Parameters
    ----------
    tokenizer : Tokenizer
    vision : PictureEncoder or None
    window : int
        Tokens a prompt may have.
    """

    def __init__(self, tokenizer: Tokenizer, vision: PictureEncoder | None, window: int):
        self._tokenizer, self._vision, self._window = tokenizer, vision, window

    def make(self, prompt: Prompt, allow_urls: bool) -> Request:
        """Check a prompt's length and read its pictures.

        Raises
        ------
        QvlError
            For an empty or too long prompt, or a picture that cannot be read.
        """
        window = self._window
        if not prompt.ids:
            raise QvlError("the prompt is empty; say something")
        if len(prompt.ids) > window:
            raise QvlError(
                f"the prompt takes {len(prompt.ids)} tokens and the model's window is {window}; shorten the prompt"
            )
        keys: list[Key] = list(prompt.ids)
        starts = [i + 1 for i, token in enumerate(prompt.ids) if token == self._tokenizer.img_start_id]
        pictures = []
        for start, image in zip(starts, prompt.images, strict=True):
            picture = self._vision.read(image, allow_urls=allow_urls)
            keys[start : start + self._tokenizer.n_queries] = [picture.key] * self._tokenizer.n_queries
            pictures.append((start, picture))
        return Request(prompt.ids, keys, pictures)

    def features(self, request: Request, kept: int) -> tuple[list[tuple[int, Array]], int]:
        """Features of a request's pictures from position `kept` on, with their first positions.

        The second value says how many pictures passed through the vision tower for that.
        """
        slots, encoded = [], 0
        for start, picture in request.pictures:
            if start + self._tokenizer.n_queries > kept:
                features, known = self._vision.features(picture)
                slots.append((start, features))
                encoded += not known
        return slots, encoded
