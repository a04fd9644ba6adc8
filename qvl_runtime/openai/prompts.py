"""The prompt of a request for `Model.stream`, with its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qvl_runtime.inputs.pictures import Access
from qvl_runtime.inputs.resolution import Resized, Resolution
from qvl_runtime.model import Model
from qvl_runtime.openai.errors import refused
from qvl_runtime.openai.limits import Limits
from qvl_runtime.openai.messages import Messages
from qvl_runtime.openai.pictures import Sent, measured

NOTHING = Access(paths=False)
"""Access of a request: neither files nor URLs."""


def sources_of(prompt: Messages | str | list[int]) -> list[str | bytes]:
    """Return the pictures of a prompt, for `fetched`."""
    return prompt.sources if isinstance(prompt, Messages) else []


def with_pictures(
    model: Model, prompt: Messages | str | list[int], contents: Sequence[bytes], limits: Limits
) -> tuple[Any, list[Sent]]:
    """Return the prompt for `Model.stream` and its pictures; `contents` are the bytes of the pictures."""
    if not isinstance(prompt, Messages):
        return prompt, []
    if model.blob.family.calling is None and any(turn.calls or turn.role == "tool" for turn in prompt.turns):
        told = "this model's chat template has no tools, so no message may have calls or their results"
        raise refused(told, prompt.field)
    if contents and model.pictures is None:
        raise refused("this model has no vision part: it takes no pictures", prompt.field)
    upright = model.pictures is not None and model.pictures.reader.upright
    pictures = [measured(content, i, limits, upright=upright) for i, content in enumerate(contents)]
    if sum(picture.width * picture.height for picture in pictures) > limits.all_pixels:
        told = f"the pictures of the request have more than {limits.all_pixels} pixels: shrink or omit some"
        raise refused(told, prompt.field)

    resolutions = prompt.resolutions
    _check_resolutions(model, resolutions, prompt.field)

    def mark(corners: Sequence[float], number: int) -> str:
        assert model.pictures is not None, "a box lies on a picture"
        content = pictures[number].content
        source = Resized(content, resolutions[number]) if number in resolutions else content
        read = model.pictures.reader.read(source, NOTHING)
        return model.blob.family.grounding.mark(corners, read)

    return prompt.for_model(pictures, mark), pictures


def _check_resolutions(model: Model, resolutions: Mapping[int, Resolution], field: str) -> None:
    """Refuse pictures that ask for more pixels than others get."""
    most = None if model.pictures is None else model.pictures.reader.max_pixels
    for number, resolution in resolutions.items():
        asked = max(resolution.largest or 0, resolution.min_pixels or 0)
        if most is not None and asked > most:
            raise refused(f"picture {number} asks for {asked} pixels, but {most} are allowed (--max-pixels)", field)
