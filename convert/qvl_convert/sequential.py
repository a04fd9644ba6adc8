"""Runs a layer product by product, so that each matrix is calibrated with what the quantized ones before it compute.

All prompts run up to the first product whose matrix is missing. There the product's input is added to a Hessian and
kept, with the residual stream. When the matrix has been made, the prompts continue from there: a layer is computed
once, however many matrices it has.

This holds for layers in which a product needs nothing but its input and its residual of what came before: those of the
decoders and of the ViTs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from qvl_convert.hessian import Hessian
from qvl_convert.spilling import spilled
from qvl_convert.walk import Stage, Walk
from qvl_kernels.ops import Array, Norm, Ops, Weight
from qvl_runtime.families.weights import Tensors, Weights

SEQUENTIAL_STAGES = ("vision", "decoder")
SKIPPED = frozenset(("normalize", "add", "gather", "copy", "vision_attention", "attend"))
"""Operations between products; `write`, `upload` and `empty` only prepare arrays."""


class Paused(Exception):
    """A prompt has reached a product whose matrix is missing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Missing:
    """A weight that has not been made yet."""

    name: str
    n: int
    k: int


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """Where a prompt paused: the index of the product, and what it reads."""

    product: int
    x: np.ndarray
    residual: np.ndarray | None


class Pausing:
    """A backend that pauses at products with missing weights, and continues from there.

    Parameters
    ----------
    ops : Ops
        The backend that computes.
    spill : Path, optional
        Folder for what is kept; by default it is in memory.

    Attributes
    ----------
    hessian : Hessian or None
        Of the inputs of the product at which the prompts paused.
    names : set of str
        The missing matrices of that product.
    """

    def __init__(self, ops: Ops, spill: Path | None):
        self._ops, self._spill = ops, spill
        self._kept: dict[int, Kept] = {}
        self._prompt, self._product = 0, 0
        self.hessian: Hessian | None = None
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._ops, name)
        if name not in SKIPPED:
            return operation
        return lambda *args, **options: None if self._prompt in self._kept else operation(*args, **options)

    def begin(self, prompt: int) -> None:
        """Continue a prompt; operations are skipped up to the product where it paused."""
        self._prompt, self._product = prompt, 0

    def linear(
        self, x: Array, w: Weight, *, out: Array, norm: Norm | None = None, residual: Array | None = None, **rest: Any
    ) -> None:
        if self._ready(x, norm, residual, w):
            self._ops.linear(x, w, out=out, norm=norm, residual=residual, **rest)

    def gate_up(self, x: Array, gate: Weight, up: Weight, *, out: Array, norm: Norm) -> None:
        if self._ready(x, norm, None, gate, up):
            self._ops.gate_up(x, gate, up, out=out, norm=norm)

    def _ready(self, x: Array, norm: Norm | None, residual: Array | None, *weights: Weight) -> bool:
        """Whether to compute the next product: not if this was done before the prompt paused."""
        product = self._product
        self._product += 1
        kept = self._kept.get(self._prompt)
        if kept is not None:
            if product < kept.product:
                return False
            del self._kept[self._prompt]
            self._ops.write(x, kept.x)
            if residual is not None and kept.residual is not None:
                self._ops.write(residual, kept.residual)
        missing = [w for w in weights if isinstance(w, Missing)]
        if missing:
            self._pause(product, x, norm, residual, missing)
        return True

    def _pause(self, product: int, x: Array, norm: Norm | None, residual: Array | None, missing: list[Missing]) -> None:
        self.names = {w.name for w in missing}
        self.hessian = self.hessian or Hessian(missing[0].k)
        values = self._ops.download(x)
        if norm is None:
            seen = values
        else:
            normed = self._ops.empty(x.shape, self._ops.activation_dtype)
            self._ops.normalize(x, norm, out=normed)
            seen = self._ops.download(normed)
        self.hessian.add(seen)
        kept_residual = None if residual is None else self._keep("residual", self._ops.download(residual))
        self._kept[self._prompt] = Kept(product, self._keep("x", values), kept_residual)
        raise Paused

    def _keep(self, name: str, values: np.ndarray) -> np.ndarray:
        if self._spill is None:
            return values
        # the one before is still mapped
        room = spilled(self._spill / f"{name}.{self._prompt}.{self._product}", values.shape, values.dtype)
        room[...] = values
        return room


class PausingWeights(Weights):
    """Weights of which some are missing."""

    def __init__(self, tensors: Tensors, ops: Ops, missing: dict[str, Missing]):
        super().__init__(tensors, ops)
        self._missing = missing

    def matrix(self, name: str) -> Weight:
        return self._missing.get(name) or super().matrix(name)


def products(
    walk: Walk, stage: Stage, tensors: Tensors, missing: dict[str, Missing], spill: Path | None
) -> Iterator[tuple[set[str], Hessian]]:
    """Run a stage of `SEQUENTIAL_STAGES`; yield the matrices of each product that are missing, and their Hessian.

    Parameters
    ----------
    walk : Walk
        Left with the outputs of the stage.
    stage : Stage
    tensors : Tensors
        The matrices of the stage; the missing ones must be there when the generator continues.
    missing : dict
        By name; those that were yielded are removed.
    spill : Path, optional
        Folder for activations; by default they are in memory.
    """
    pausing = Pausing(walk.ops, spill)
    while True:
        weights = PausingWeights(tensors, cast(Ops, pausing), missing)
        pausing.hessian, pausing.names = None, set()
        step, target = walk.steps(stage, weights)
        for i, array in enumerate(target):
            pausing.begin(i)
            try:
                out = step(i)
            except Paused:
                continue
            array[...] = walk.ops.download(out)
        if pausing.hessian is None:
            return
        yield pausing.names, pausing.hessian
        for name in pausing.names:
            del missing[name]
