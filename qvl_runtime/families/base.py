"""What a model family is to the rest of the program.

A family is one folder below `qvl_runtime.families` and one line in its registry. Its module has a constant `FAMILY`
with the members of `Family`. The engine, the file format, the converter and the command line use these members only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qvl_kernels.ops import Array, Ops
from qvl_runtime.boxes import Box
from qvl_runtime.engine.constraints import Constraint
from qvl_runtime.engine.sequence import Rotary
from qvl_runtime.families.generation_config import GenerationConfig
from qvl_runtime.families.layers import DecoderNames
from qvl_runtime.families.specs import MatrixSpec, TensorSpec
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.images import ImageSource
from qvl_runtime.inputs.pictures import Access, Picture, Pixels, Preprocess, Vision
from qvl_runtime.inputs.prompt import ChatPrompt, Prompt, Window
from qvl_runtime.inputs.tokenizer import Tokenizer


class Config(Protocol):
    """What every family's config says of its decoder."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def ffn_width(self) -> int: ...

    @property
    def norm_eps(self) -> float:
        """Epsilon of the decoder's norms."""

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON types, with `model_type`; `Family.read_config` reads them back."""


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

    def mark(self, corners: Sequence[float], size: tuple[int, int]) -> str:
        """A box in a question: `corners` in pixels of a picture of `size`."""

    def parse(self, text: str, pictures: Sequence[Picture]) -> list[Box]:
        """All well-formed boxes of an answer, in order. `pictures` are those of the prompt. Never raises."""

    def constraint(self, tokenizer: Tokenizer, stop_ids: frozenset[int], limit: int, opened: str) -> Constraint:
        """Hold an answer of at most `limit` tokens to this notation."""


class Family(Protocol):
    """A model family.

    Attributes
    ----------
    model_type : str
        As in `config.json`.
    grounding : Grounding
    upright : bool
        Pictures are turned as their EXIF orientation says.
    """

    model_type: str
    grounding: Grounding
    upright: bool

    # what the files say
    def read_config(self, data: Mapping[str, Any], where: str) -> Config:
        """Read `config.json`, or what `Config.to_dict` gave.

        Raises
        ------
        QvlError
            For a missing key, or a value that this runtime does not compute.
        """

    def title(self, config: Config, generation: GenerationConfig) -> str:
        """The model's name for people."""

    def tensors(self, config: Config) -> Iterator[TensorSpec]:
        """All tensors of a model, in the order in which it uses them."""

    def decoder_names(self, config: Config) -> DecoderNames:
        """Names of the decoder's tensors in the blob."""

    def tokenizer(self, ranks: bytes, config: Config) -> Tokenizer:
        """The tokenizer that belongs to a config; `ranks` is what `read_ranks` gave."""

    # what it computes
    def rotary(self, ops: Ops, config: Config, capacity: int) -> Rotary:
        """Rotary positions of one sequence, with room for `capacity` tokens."""

    def preprocess(
        self,
        config: Config,
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

    def vision(self, weights: Weights) -> Vision:
        """The vision part of a model whose config `sees`."""

    def vision_values(self, config: Config) -> tuple[int, int]:
        """float32 values that encoding the largest picture takes: those that stay, and those of one step."""

    def describe_vision(self, config: Config) -> str:
        """The vision part in one line, for people."""

    def prompts(
        self, tokenizer: Tokenizer, config: Config, generation: GenerationConfig, read: Callable[..., Picture] | None
    ) -> Prompts:
        """The prompt template. `read` is `PictureEncoder.read`, or None for a model that takes no pictures."""

    # what the converter needs besides
    def stage_of(self, spec: MatrixSpec) -> tuple[str, int]:
        """The stage that a matrix belongs to: its kind and index.

        Kinds: "patches"; "vision", a ViT layer; "adapter", a level of the features; "embedding"; "decoder", a layer;
        "norm", with the head. The stages are run in the order of `tensors`.
        """

    def vision_shape(self, config: Config, pixels: Pixels) -> tuple[int, int]:
        """Shape of a picture's hidden state inside the ViT."""

    def levels(self, config: Config) -> int:
        """Levels of features; see `Vision.encode`."""

    def vision_stage(self, kind: str, index: int, weights: Weights) -> VisionStage:
        """A stage of the vision part: "patches" from pixels, "vision" from the state, "adapter" to features."""

    def published_name(self, name: str, config: Config) -> str | None:
        """What a tensor of a checkpoint is called in `tensors`; None if it is not used."""

    def read_generation(self, folder: Path) -> GenerationConfig:
        """What a published checkpoint says about prompts and sampling."""

    def read_ranks(self, folder: Path, config: Config) -> bytes:
        """The tokenizer's vocabulary from a published checkpoint, as the blob stores it."""

    def read_preprocessing(self, folder: Path, config: Config) -> dict[str, Any]:
        """What a published checkpoint says about the preparation of pictures: the blob's `preprocessing`."""
