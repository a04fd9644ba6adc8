"""Many prompts through a model, one layer at a time: memory holds one layer and the activations.

The layers are the runtime's own; only the order of the loops differs: all prompts pass a layer before the next layer
is read. So a model far larger than memory can be run from its original files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qvl_convert.plan import Recipe, Source
from qvl_kernels.ops import Array, Ops, Weight
from qvl_kernels.packing import Matrix
from qvl_runtime.engine.sequence import Context
from qvl_runtime.families.qwen_vl import decoder, vision
from qvl_runtime.families.qwen_vl.adapter import Adapter
from qvl_runtime.families.qwen_vl.config import ModelConfig
from qvl_runtime.families.qwen_vl.tensors import MatrixSpec, tensors
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.images import ImageSource, load_image, preprocess

VISION, DECODER = f"{vision.NAME}.", "transformer.h."


class Model(Protocol):
    """What `Weights` reads: a `Blob`, or anything with its three names."""

    config: ModelConfig

    def matrix(self, name: str) -> Matrix:
        """A weight, by its base name."""

    def vector(self, name: str) -> np.ndarray:
        """A float32 tensor."""


class Published:
    """A checkpoint as it was published, seen as a blob of fp16 weights."""

    def __init__(self, source: Source):
        self.source, self.config = source, source.checkpoint.config
        self._plans = {plan.spec.name: plan for plan in source.plan(Recipe(bits=16, vision_bits=16, head_bits=16))}

    def matrix(self, name: str) -> Matrix:
        """A weight."""
        return self.source.matrix(self._plans[name])

    def vector(self, name: str) -> np.ndarray:
        """A float32 tensor."""
        return self.source.checkpoint.vector(name)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a model that all prompts pass before the next is read.

    Attributes
    ----------
    kind : str
        "patches", "vision", "adapter", "embedding", "decoder" or "norm".
    index : int
        Of a layer of ViT or decoder.
    matrices : tuple of str
        Base names of its matrices.
    """

    kind: str
    index: int
    matrices: tuple[str, ...]


def stages(config: ModelConfig) -> list[Stage]:
    """The stages of a model, in order; "norm" leaves what the output head reads."""
    groups: dict[tuple[str, int], list[str]] = {}
    for spec in tensors(config):
        if isinstance(spec, MatrixSpec):
            groups.setdefault(_stage_of(spec), []).append(spec.name)
    return [Stage(kind, index, tuple(names)) for (kind, index), names in groups.items()]


def _stage_of(spec: MatrixSpec) -> tuple[str, int]:
    if spec.part == "decoder":
        return "decoder", int(spec.name.removeprefix(DECODER).split(".")[0])
    if spec.part == "vision":
        layer = spec.name.removeprefix(f"{VISION}transformer.resblocks.").split(".")[0]
        return ("vision", int(layer)) if layer.isdigit() else ("patches", 0)
    return {"adapter": "adapter", "embedding": "embedding", "head": "norm"}[spec.part], 0


class Prompted(Protocol):
    """A prompt with its pictures."""

    ids: list[int]
    images: list[ImageSource]


Steps = tuple[Callable[[int], Array], list[np.ndarray]]
"""What computes the i-th result of a stage, and where the results belong."""


class Walk:
    """Prompts on their way through a model.

    Parameters
    ----------
    ops : Ops
        Of the weights that `run` is given, or the backend behind them.
    config : ModelConfig
    prompts : sequence
        With `ids` and `images`. Pictures are read when they are needed.
    spill : Path, optional
        Folder for the activations, which else stay in memory.

    Attributes
    ----------
    patches, features, hidden : list of ndarray
        float32: of each picture (in order of the prompts) ``[patches, width]`` inside the ViT, then
        ``[n_queries, hidden_size]``; of each prompt ``[T, hidden_size]``, after "norm" what the output head reads.
    """

    def __init__(self, ops: Ops, config: ModelConfig, prompts: Sequence[Prompted], spill: Path | None = None):
        self.ops, self.config, self.prompts = ops, config, prompts
        self._images = [image for prompt in prompts for image in prompt.images]
        self._spill = spill
        self._cache: Context | None = None
        self.hidden = self._room("hidden", [(len(prompt.ids), config.hidden_size) for prompt in prompts])
        self.patches = self.features = []
        if config.visual is not None:
            v = config.visual
            self.patches = self._room("patches", [(v.patches, v.width)] * len(self._images))
            self.features = self._room("features", [(v.n_queries, v.output_dim)] * len(self._images))

    def run(self, stage: Stage, weights: Weights, *, keep: bool = True) -> None:
        """Take all prompts through a stage; without `keep` only to see what its products are given."""
        step, target = getattr(self, f"_{stage.kind}")(weights, stage.index)
        for i, array in enumerate(target):
            out = step(i)
            if keep:
                array[...] = self.ops.download(out)

    def outputs(self, stage: Stage) -> list[np.ndarray]:
        """The arrays that a stage writes."""
        if stage.kind in ("patches", "vision"):
            return self.patches
        return self.features if stage.kind == "adapter" else self.hidden

    def logits(self, head: Weight, prompt: int, first: int = 0, rows: int = 64) -> Iterator[np.ndarray]:
        """After "norm": a prompt's logits from a position on, float32 ``[rows, vocab]`` at a time.

        `head` is the output head; it is large, so the caller fetches it once.
        """
        for start in range(first, len(self.hidden[prompt]), rows):
            normed = self.hidden[prompt][start : start + rows].astype(self.ops.activation_dtype)
            out = self.ops.empty((len(normed), self.config.vocab_size))
            self.ops.linear(self.ops.upload(normed), head, out=out)
            yield self.ops.download(out)

    def _room(self, name: str, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
        total = sum(rows for rows, _ in shapes)
        if self._spill is None or total == 0:
            return [np.empty(shape, np.float32) for shape in shapes]
        whole = np.memmap(self._spill / f"{name}.float32", np.float32, "w+", shape=(total, shapes[0][1]))
        return np.split(whole, np.cumsum([rows for rows, _ in shapes])[:-1])

    def _patches(self, weights: Weights, _: int) -> Steps:
        embed, size = vision.PatchEmbedding(weights), self.config.visual.image_size

        def step(i: int) -> Array:
            out = self.ops.empty(self.patches[i].shape)
            embed(preprocess(load_image(self._images[i]), size), out)
            return out

        return step, self.patches

    def _vision(self, weights: Weights, index: int) -> Steps:
        block, work = vision.Block.load(weights, index), vision.Workspace.empty(self.ops, self.config.visual)

        def step(i: int) -> Array:
            self.ops.write(work.x, self.patches[i])
            block(weights.ops, work, self.config.visual.heads)
            return work.x

        return step, self.patches

    def _adapter(self, weights: Weights, _: int) -> Steps:
        adapter = Adapter(weights)
        return lambda i: adapter(self.ops.upload(self.patches[i])), self.features

    def _embedding(self, weights: Weights, _: int) -> Steps:
        table, pictures, slots = weights.matrix("transformer.wte"), iter(self.features), []
        for prompt in self.prompts:
            # an image slot starts behind <img>
            starts = [i + 1 for i, token in enumerate(prompt.ids) if self._opens_picture(token)]
            slots.append([(start, next(pictures)) for start in starts])

        def step(i: int) -> Array:
            out = self.ops.empty(self.hidden[i].shape)
            self.ops.embed(self.ops.upload(np.array(self.prompts[i].ids, np.int32)), table, out=out)
            for start, features in slots[i]:
                self.ops.write(out[start : start + len(features)], features)
            return out

        return step, self.hidden

    def _decoder(self, weights: Weights, index: int) -> Steps:
        block = decoder.Block.load(weights, index)
        longest = max(len(x) for x in self.hidden)
        work = decoder.Workspace.empty(self.ops, self.config, longest)

        def step(i: int) -> Array:
            rows = work.rows(len(self.hidden[i]))
            self.ops.write(rows.x, self.hidden[i])
            block(weights.ops, rows, self._context(len(self.hidden[i])), index)
            return rows.x

        return step, self.hidden

    def _norm(self, weights: Weights, _: int) -> Steps:
        norm = weights.rms_norm("transformer.ln_f")

        def step(i: int) -> Array:
            out = self.ops.empty(self.hidden[i].shape)
            self.ops.normalize(self.ops.upload(self.hidden[i]), norm, out=out)
            return out

        return step, self.hidden

    def _context(self, length: int) -> Context:
        """A cache of one layer; every layer overwrites it."""
        if self._cache is None:
            longest = max(len(x) for x in self.hidden)
            self._cache = Context(self.ops, self.config, self.ops.score_cache_dtype, longest, layers=1)
        self._cache.begin(length)
        return self._cache

    def _opens_picture(self, token: int) -> bool:
        return self.config.visual is not None and token == self.config.visual.image_start_id


def relative_error(arrays: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """``|a - b| / |b|`` over all arrays; 0 where there is nothing."""
    change, energy = (
        sum(float(np.square(x, dtype=np.float64).sum()) for x in values)
        for values in ((a - b for a, b in zip(arrays, reference)), reference)
    )
    return float(np.sqrt(change / energy)) if energy else 0.0
