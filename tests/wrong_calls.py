"""Calls that the type checker must refuse. Nothing runs this file.

Each is marked as an expected error, and mypy reports a mark that has none (`warn_unused_ignores`). So it fails when
arrays, weights, families or options lose their types.
"""

from __future__ import annotations

import numpy as np

import qvl_runtime as qvl
from qvl_kernels.ops import Array, Ops, Weight
from qvl_runtime.families.base import Family
from qvl_runtime.families.weights import Weights


def operations(ops: Ops, x: Array, w: Weight) -> None:
    ops.linear(x, x, out=x)  # type: ignore[arg-type]  # an array is no weight
    ops.linear(w, w, out=x)  # type: ignore[arg-type]  # a weight is no array
    ops.linear(x, w, x)  # type: ignore[call-arg]  # out is keyword-only
    ops.linear(x, w, out=x, activation="relu")  # type: ignore[arg-type]
    ops.gate_up(x, w, w, out=x)  # type: ignore[call-arg]  # norm is missing
    ops.empty((1, 2)).sum()  # type: ignore[attr-defined]  # an array of a backend is not numpy's


class Half:
    """A backend that lacks operations."""

    name = "half"

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape)


def backends(family: Family, weights: Weights) -> None:
    other: Ops = Half()  # type: ignore[assignment]
    family.vision(other)  # type: ignore[arg-type]
    weights.matrix(3)  # type: ignore[arg-type]


def users(model: qvl.Model) -> None:
    model.stream("a", max_tokens=3)  # type: ignore[call-arg]  # the name is max_new_tokens
    model.stream("a", temperature="hot")  # type: ignore[arg-type]
    model.encode_image(3)  # type: ignore[arg-type]
    model.generate("a", max_tokens=3)  # type: ignore[call-overload]  # the name is max_new_tokens
    print(model.generate("a", n=2).text)  # type: ignore[attr-defined]  # a list of answers
    print(model.generate("a", temperature=0.5).history)  # type: ignore[attr-defined]  # an answer of a chat alone has one
    print(model.stream("a").result().history)  # type: ignore[attr-defined]
    print(model.generate("a").text, model.generate("a", n=2)[0].text, model.stream_chat("a").result().history)
