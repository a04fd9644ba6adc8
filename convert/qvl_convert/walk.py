"""Runs many prompts through a model layer by layer: memory holds one layer and the activations.

The layers are those of the runtime; only the order of the loops differs: all prompts pass a layer before the next layer
is read. A model larger than memory can therefore run from its original files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from qvl_convert.spilling import spilled
from qvl_kernels.ops import Array, Ops, Weight
from qvl_runtime.engine.decoder import Features, Span
from qvl_runtime.engine.sequence import Rotary, SequenceState
from qvl_runtime.families.base import Family
from qvl_runtime.families.config import Config
from qvl_runtime.families.layers import Block, Workspace, place_features
from qvl_runtime.families.specs import MatrixSpec
from qvl_runtime.families.weights import Weights
from qvl_runtime.inputs.pictures import PictureReader, Pixels
from qvl_runtime.inputs.prompt import Slot

PICTURE_STAGES = ("patches", "vision", "adapter")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a model that all prompts pass before the next one is read.

    Attributes
    ----------
    kind : str
        "patches", "vision", "adapter", "embedding", "decoder" or "norm".
    index : int
        Index of a layer of ViT or decoder.
    matrices : tuple of str
        Base names of its matrices.
    """

    kind: str
    index: int
    matrices: tuple[str, ...]


def stages(family: Family, config: Config) -> list[Stage]:
    """Return the stages of a model, in order; the output of "norm" is the input of the output head."""
    groups: dict[tuple[str, int], list[str]] = {}
    for spec in family.tensors(config):
        if isinstance(spec, MatrixSpec):
            groups.setdefault(family.stage_of(spec), []).append(spec.name)
    groups.setdefault(("norm", 0), [])  # a tied head has no matrix
    return [Stage(kind, index, tuple(names)) for (kind, index), names in groups.items()]


class Prompted(Protocol):
    """A prompt with its pictures."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def slots(self) -> Sequence[Slot]: ...


Steps = tuple[Callable[[int], Array], list[np.ndarray]]
"""A function for the i-th result of a stage, and the arrays of the results."""


class Walk:
    """The state of prompts between the layers of a model.

    Parameters
    ----------
    ops : Ops
        The backend of the weights passed to `run`, or the one they wrap.
    family : Family
    config : Config
    prompts : sequence
        Objects with `ids` and `slots`. Pictures are decoded when needed.
    reader : PictureReader, optional
        Decodes pictures; required if there are any.
    spill : Path, optional
        Folder for the activations; by default they are in memory.

    Attributes
    ----------
    patches, features, hidden : list of ndarray
        float32: for each picture (in order of the prompts) ``[rows, width]`` in the ViT, and
        ``[levels * tokens, hidden_size]``; for each prompt ``[T, hidden_size]``, after "norm" the input of the output
        head.
    """

    def __init__(
        self,
        ops: Ops,
        family: Family,
        config: Config,
        prompts: Sequence[Prompted],
        reader: PictureReader | None = None,
        spill: Path | None = None,
    ):
        self.ops, self.family, self.config, self.prompts = ops, family, config, prompts
        self._names = family.decoder_names(config)
        self._pictures = [slot.picture for prompt in prompts for slot in prompt.slots]
        self._reader, self.spill = reader, spill
        self._cache: SequenceState | None = None
        self.hidden = self._room("hidden", [(len(prompt.ids), config.hidden_size) for prompt in prompts])
        self.patches: list[np.ndarray] = []
        rows = [(family.levels(config) * picture.tokens, config.hidden_size) for picture in self._pictures]
        self.features = self._room("features", rows)

    def run(self, stage: Stage, weights: Weights, *, keep: bool = True) -> None:
        """Run all prompts through a stage; without `keep` the results are discarded."""
        step, target = self.steps(stage, weights)
        for i, array in enumerate(target):
            out = step(i)
            if keep:
                array[...] = self.ops.download(out)

    def steps(self, stage: Stage, weights: Weights) -> Steps:
        """Load a stage; return what computes its i-th result, and the arrays of the results."""
        if stage.kind in PICTURE_STAGES:
            return self._vision(stage, weights)
        if stage.kind == "embedding":
            return self._embedding(weights)
        return self._decoder(weights, stage.index) if stage.kind == "decoder" else self._norm(weights)

    def outputs(self, stage: Stage) -> list[np.ndarray]:
        """Return the arrays that a stage writes."""
        if stage.kind in ("patches", "vision"):
            return self.patches
        return self._level(stage.index) if stage.kind == "adapter" else self.hidden

    def logits(self, head: Weight, prompt: int, first: int = 0, rows: int = 64) -> Iterator[np.ndarray]:
        """Yield a prompt's logits from a position on, float32 ``[rows, vocab]`` at a time; call it after "norm".

        `head` is the output head. It is large, so the caller loads it once.
        """
        for start in range(first, len(self.hidden[prompt]), rows):
            normed = self.hidden[prompt][start : start + rows].astype(self.ops.activation_dtype)
            out = self.ops.empty((len(normed), self.config.vocab_size))
            self.ops.linear(self.ops.upload(normed), head, out=out)
            yield self.ops.download(out)

    def _room(self, name: str, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
        total = sum(rows for rows, _ in shapes)
        if self.spill is None or total == 0:
            return [np.empty(shape, np.float32) for shape in shapes]
        whole = spilled(self.spill / f"{name}.float32", (total, shapes[0][1]), np.float32)
        return np.split(whole, np.cumsum([rows for rows, _ in shapes])[:-1])

    def _level(self, index: int) -> list[np.ndarray]:
        """Return the rows of the features that one stage "adapter" computes."""
        spans = ((index * picture.tokens, (index + 1) * picture.tokens) for picture in self._pictures)
        return [features[first:last] for features, (first, last) in zip(self.features, spans)]

    def _vision(self, stage: Stage, weights: Weights) -> Steps:
        compute = self.family.vision_stage(stage.kind, stage.index, weights)
        if stage.kind == "patches" and not self.patches:
            shapes = [self.family.vision_shape(self.config, self._pixels(i)) for i in range(len(self._pictures))]
            self.patches = self._room("patches", shapes)
        return lambda i: compute(self.patches[i], self._pixels(i)), self.outputs(stage)

    def _pixels(self, index: int) -> Pixels:
        assert self._reader is not None, "pictures need a reader"
        return self._reader.decode(self._pictures[index].content)

    def _placed(self, prompt: int) -> list[Features]:
        """Return the features of a prompt's pictures."""
        before = sum(len(other.slots) for other in self.prompts[:prompt])
        return [
            Features(slot.start, slot.picture.tokens, self.ops.upload(self.features[before + i]))
            for i, slot in enumerate(self.prompts[prompt].slots)
        ]

    def _embedding(self, weights: Weights) -> Steps:
        table = weights.matrix(self._names.embedding)

        def step(i: int) -> Array:
            out = self.ops.empty(self.hidden[i].shape)
            self.ops.embed(self.ops.upload(np.array(self.prompts[i].ids, np.int32)), table, out=out)
            place_features(self.ops, self._placed(i), 0, out)
            return out

        return step, self.hidden

    def _decoder(self, weights: Weights, index: int) -> Steps:
        block = Block.load(weights, self._names, index)
        longest = max(len(x) for x in self.hidden)
        work = Workspace.empty(self.ops, self.config, longest)
        levels = self.family.levels(self.config)

        def step(i: int) -> Array:
            rows = work.rows(len(self.hidden[i]))
            self.ops.write(rows.x, self.hidden[i])
            block(weights.ops, rows, [Span(self._sequence(i), len(self.hidden[i]))], index)
            if index + 1 < levels:
                place_features(self.ops, self._placed(i), index + 1, rows.x)
            return rows.x

        return step, self.hidden

    def _norm(self, weights: Weights) -> Steps:
        norm = weights.rms_norm(self._names.norm)

        def step(i: int) -> Array:
            out = self.ops.empty(self.hidden[i].shape)
            self.ops.normalize(self.ops.upload(self.hidden[i]), norm, out=out)
            return out

        return step, self.hidden

    def _sequence(self, prompt: int) -> SequenceState:
        """Create a cache of one layer, which every layer overwrites, with the positions of a prompt."""
        if self._cache is None:
            longest = max(len(x) for x in self.hidden)

            def rotary(capacity: int) -> Rotary:
                return self.family.rotary(self.ops, self.config, capacity)

            self._cache = SequenceState(self.ops, self.config, rotary, self.ops.score_cache_dtype, longest, layers=1)
        self._cache.begin(len(self.hidden[prompt]), self.prompts[prompt].slots)
        self._cache.truncate(0)
        return self._cache


def relative_error(arrays: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Compute ``|a - b| / |b|`` over all arrays; 0 without values."""
    change, energy = (
        sum(float(np.square(x, dtype=np.float64).sum()) for x in values)
        for values in ((a - b for a, b in zip(arrays, reference)), reference)
    )
    return float(np.sqrt(change / energy)) if energy else 0.0
