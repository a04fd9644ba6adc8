"""The interface of a model family.

A family is one folder below `qvl_runtime.families` and one line in its registry. Its module has a constant `FAMILY`
with the members of `Family`. The engine, the file format, the converter and the command line use these members only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from qvl_kernels.ops import Array, Ops
from qvl_runtime.boxes import Box
from qvl_runtime.engine.constraints import Constraint, Form
from qvl_runtime.engine.sequence import Rotary
from qvl_runtime.families.config import Config
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.layers import DecoderNames
from qvl_runtime.families.specs import MatrixSpec, TensorSpec
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Access, Picture, Pixels, Preprocess, Vision
from qvl_runtime.inputs.prompt import ChatPrompt, Prompt, Window
from qvl_runtime.inputs.tokenizer import Tokenizer
from qvl_runtime.inputs.tools import CallReader, Tools

VisionStage = Callable[[np.ndarray, Pixels], Array]
"""Computes a stage for one picture. Arguments: the previous state, float32 ``[rows, width]`` on the host (unused by
"patches"), and the picture's pixels."""


class Prompts(Protocol):
    """Converts prompts to token ids with the family's template."""

    def build(self, prompt: Any, images: Sequence[ImageSource] | None, access: Access) -> Prompt:
        """Build a prompt for `Model.generate`."""

    def answer(self, text: str) -> list[int]:
        """Encode an answer, including the token that ends it in a chat."""

    def chat(
        self,
        query: Any,
        history: Sequence[tuple[Any, str | None]] | None,
        images: Sequence[ImageSource] | None,
        *,
        system: str | None,
        window: Window,
        access: Access,
    ) -> ChatPrompt:
        """Build the prompt of the next turn for `Model.chat`."""


class Grounding(Protocol):
    """A family's notation of boxes."""

    def mark(self, corners: Sequence[float], picture: Picture) -> str:
        """Write a box for a question. `corners` are in pixels of the original picture."""

    def write(self, things: Sequence[tuple[str, Sequence[float]]], picture: Picture) -> str:
        """Write an answer with boxes: what each thing is, and its corners as `mark` takes them."""

    def parse(self, text: str, pictures: Sequence[Picture]) -> list[Box]:
        """Return all well-formed boxes of an answer, in order. `pictures` are those of the prompt. Never raises."""

    def constraint(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        """Return the constraint to this notation for an answer of at most `limit` tokens.

        Raises
        ------
        NoRoomError
            If a box may need more than `limit` tokens.
        """


class Calling(Protocol):
    """A family's tools: how prompts list them, and how answers call them."""

    def prompts(self, prompts: Any, tools: Tools) -> Prompts:
        """Return the prompts of this family's model with tools listed in every conversation.

        Raises
        ------
        QvlError
            If the model's tokenizer cannot write calls.
        """

    def reader(self) -> CallReader:
        """Create the reader of one answer."""

    def form(self, tools: Tools, form: Form | None) -> Form | None:
        """Return the form of an answer that may have calls; `form` is that of an answer without any.

        Raises
        ------
        QvlError
            If they exclude each other, or a function's parameters cannot be used.
        """


C = TypeVar("C", bound=Config)
T = TypeVar("T", bound=Tokenizer)


class Family(Protocol[C, T]):
    """A model family, with its own config and tokenizer.

    Attributes
    ----------
    model_type : str
        As in `config.json`.
    grounding : Grounding
    calling : Calling or None
        None for a family whose template has no tools.
    upright : bool
        Whether the EXIF orientation of pictures is applied.
    """

    @property
    def model_type(self) -> str: ...

    @property
    def grounding(self) -> Grounding: ...

    @property
    def calling(self) -> Calling | None: ...

    @property
    def upright(self) -> bool: ...

    # reading files
    def read_config(self, data: Mapping[str, Any], where: str) -> C:
        """Parse `config.json`, or the result of `Config.to_dict`.

        Raises
        ------
        QvlError
            For a missing key, or an unsupported value.
        """

    def title(self, config: C, generation: GenerationConfig) -> str:
        """Return the model's display name."""

    def tensors(self, config: C) -> Iterator[TensorSpec]:
        """Yield all tensors of a model, in order of use."""

    def decoder_names(self, config: C) -> DecoderNames:
        """Return the names of the decoder's tensors in the blob."""

    def tokenizer(self, ranks: bytes, config: C) -> T:
        """Create the tokenizer of a config; `ranks` is the result of `read_ranks`."""

    # computing
    def rotary(self, ops: Ops, config: C, capacity: int) -> Rotary:
        """Create the rotary positions of one sequence of up to `capacity` tokens."""

    def preprocess(
        self,
        config: C,
        preprocessing: Mapping[str, Any],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Preprocess:
        """Return the preprocessing of pictures; `preprocessing` is that of the blob's metadata.

        Raises
        ------
        QvlError
            For unsupported or contradictory limits.
        """

    def vision(self, weights: Weights[C]) -> Vision:
        """Create the vision part of a model whose config `sees`."""

    def vision_values(self, config: C) -> tuple[int, int]:
        """Count the float32 values for encoding the largest picture: permanent ones, and those of one step."""

    def describe_vision(self, config: C, preprocessing: Mapping[str, Any]) -> str:
        """Describe the vision part in one line; `preprocessing` is that of the blob's metadata."""

    def prompts(
        self, tokenizer: T, config: C, generation: GenerationConfig, read: Callable[..., Picture] | None
    ) -> Prompts:
        """Create the prompt template. `read` is `PictureReader.read`, or None for a text-only model."""

    # for the converter
    def stage_of(self, spec: MatrixSpec) -> tuple[str, int]:
        """Return the stage of a matrix: its kind and index.

        Kinds: "patches"; "vision", a ViT layer; "adapter", a level of the features; "embedding"; "decoder", a layer;
        "norm", with the head. The stages run in the order of `tensors`.
        """

    def vision_shape(self, config: C, pixels: Pixels) -> tuple[int, int]:
        """Return the shape of a picture's hidden state in the ViT."""

    def levels(self, config: C) -> int:
        """Return the number of feature levels; see `Vision.encode`."""

    def vision_stage(self, kind: str, index: int, weights: Weights[C]) -> VisionStage:
        """Create a stage of the vision part: "patches" from pixels, "vision" from the state, "adapter" to features."""

    def published_name(self, name: str, config: C) -> str | None:
        """Map the name of a checkpoint's tensor to its name in `tensors`; None if it is not used."""

    def published_files(
        self, config: C, generation: GenerationConfig, preprocessing: Mapping[str, Any], data: bytes
    ) -> dict[str, Any]:
        """Return the files of a published checkpoint besides its weights, by name: JSON objects, or bytes.

        `data` is the result of `read_ranks`.
        """

    def read_generation(self, folder: Path) -> GenerationConfig:
        """Read the prompt and sampling settings of a published checkpoint."""

    def read_ranks(self, folder: Path, config: C) -> bytes:
        """Read the vocabulary of a published checkpoint in the format of the blob."""

    def read_preprocessing(self, folder: Path, config: C) -> dict[str, Any]:
        """Read the preprocessing settings of a published checkpoint: the blob's `preprocessing`."""
