"""What a model family is to the rest of the program.

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
from qvl_runtime.engine.constraints import Constraint
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

VisionStage = Callable[[np.ndarray, Pixels], Array]
"""Computes a stage for one picture, from the state before it, float32 ``[rows, width]`` on the host (unused by
"patches"), and the picture's pixels."""


class Prompts(Protocol):
    """Makes token ids of every form of prompt, by the family's template."""

    def build(self, prompt: Any, images: Sequence[ImageSource] | None, access: Access) -> Prompt:
        """A prompt as `Model.generate` takes it."""

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer, with the token that ends it in a chat."""

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
        """One more turn of a conversation, as `Model.chat` takes it."""


class Grounding(Protocol):
    """How a family writes boxes."""

    def mark(self, corners: Sequence[float], picture: Picture) -> str:
        """A box in a question: `corners` are in pixels of a picture as it was given."""

    def parse(self, text: str, pictures: Sequence[Picture]) -> list[Box]:
        """All well-formed boxes of an answer, in order. `pictures` are those of the prompt. Never raises."""

    def constraint(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        """Hold an answer of at most `limit` tokens to this notation."""


C = TypeVar("C", bound=Config)
T = TypeVar("T", bound=Tokenizer)


class Family(Protocol[C, T]):
    """A model family, with its own config and tokenizer.

    Attributes
    ----------
    model_type : str
        As in `config.json`.
    grounding : Grounding
    upright : bool
        Pictures are turned as their EXIF orientation says.
    """

    @property
    def model_type(self) -> str: ...

    @property
    def grounding(self) -> Grounding: ...

    @property
    def upright(self) -> bool: ...

    # what the files say
    def read_config(self, data: Mapping[str, Any], where: str) -> C:
        """Read `config.json`, or what `Config.to_dict` gave.

        Raises
        ------
        QvlError
            For a missing key, or a value that this runtime does not compute.
        """

    def title(self, config: C, generation: GenerationConfig) -> str:
        """The model's name for people."""

    def tensors(self, config: C) -> Iterator[TensorSpec]:
        """All tensors of a model, in the order in which it uses them."""

    def decoder_names(self, config: C) -> DecoderNames:
        """Names of the decoder's tensors in the blob."""

    def tokenizer(self, ranks: bytes, config: C) -> T:
        """The tokenizer that belongs to a config; `ranks` is what `read_ranks` gave."""

    # what it computes
    def rotary(self, ops: Ops, config: C, capacity: int) -> Rotary:
        """Rotary positions of one sequence, with room for `capacity` tokens."""

    def preprocess(
        self,
        config: C,
        preprocessing: Mapping[str, Any],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Preprocess:
        """How pictures are prepared; `preprocessing` is that of the blob's metadata.

        Raises
        ------
        QvlError
            For limits that the family does not take, or that contradict each other.
        """

    def vision(self, weights: Weights[C]) -> Vision:
        """The vision part of a model whose config `sees`."""

    def vision_values(self, config: C) -> tuple[int, int]:
        """float32 values that encoding the largest picture takes: those that stay, and those of one step."""

    def describe_vision(self, config: C) -> str:
        """The vision part in one line, for people."""

    def prompts(
        self, tokenizer: T, config: C, generation: GenerationConfig, read: Callable[..., Picture] | None
    ) -> Prompts:
        """The prompt template. `read` is `PictureEncoder.read`, or None for a model that takes no pictures."""

    # what the converter needs besides
    def stage_of(self, spec: MatrixSpec) -> tuple[str, int]:
        """The stage that a matrix belongs to: its kind and index.

        Kinds: "patches"; "vision", a ViT layer; "adapter", a level of the features; "embedding"; "decoder", a layer;
        "norm", with the head. The stages are run in the order of `tensors`.
        """

    def vision_shape(self, config: C, pixels: Pixels) -> tuple[int, int]:
        """Shape of a picture's hidden state inside the ViT."""

    def levels(self, config: C) -> int:
        """Levels of features; see `Vision.encode`."""

    def vision_stage(self, kind: str, index: int, weights: Weights[C]) -> VisionStage:
        """A stage of the vision part: "patches" from pixels, "vision" from the state, "adapter" to features."""

    def published_name(self, name: str, config: C) -> str | None:
        """What a tensor of a checkpoint is called in `tensors`; None if it is not used."""

    def published_files(
        self, config: C, generation: GenerationConfig, preprocessing: Mapping[str, Any], data: bytes
    ) -> dict[str, Any]:
        """Files of a published checkpoint besides its weights, by name: JSON objects, or bytes.

        `data` is what `read_ranks` gave.
        """

    def read_generation(self, folder: Path) -> GenerationConfig:
        """What a published checkpoint says about prompts and sampling."""

    def read_ranks(self, folder: Path, config: C) -> bytes:
        """The tokenizer's vocabulary from a published checkpoint, as the blob stores it."""

    def read_preprocessing(self, folder: Path, config: C) -> dict[str, Any]:
        """What a published checkpoint says about the preparation of pictures: the blob's `preprocessing`."""
