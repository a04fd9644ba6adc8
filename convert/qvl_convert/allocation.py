"""Chooses the bits of each layer for a given file size and the least total error.

The error of a layer is measured: all prompts pass it with its weights rounded to 3, 4 and 8 bits and all earlier layers
as published; the error is the relative change of its output. Starting with 3 bits everywhere (4 in groups of 32), the
step to more bits with the largest error reduction per byte is taken until no step fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np

from qvl_convert.calibration import Sample
from qvl_convert.plan import BITS, MatrixPlan, Published, Recipe, Source
from qvl_convert.walk import Stage, Walk, relative_error, stages
from qvl_kernels.packing import group_sizes
from qvl_runtime.backends import make_ops
from qvl_runtime.errors import QvlError
from qvl_runtime.families.config import Config
from qvl_runtime.families.weights import Weights

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SAMPLES = 4
HEAD_ROWS = 64


def parse_size(text: str) -> int:
    """Parse a size such as ``5.5GB`` or ``900 MiB`` to bytes.

    Raises
    ------
    QvlError
        For another format, or a number beyond any file.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", text, re.IGNORECASE)
    size = float(found[1]) * UNITS[found[2].upper()] if found else math.inf
    if not math.isfinite(size):
        raise QvlError(f"--target-size {text!r:.60}: give a size such as 5.5GB or 900MB")
    return int(size)


def allocate(
    source: Source,
    samples: list[Sample],
    target: int,
    *,
    group_size: int,
    size_of: Callable[[list[MatrixPlan]], int],
    device: str = "auto",
) -> dict[str, int]:
    """Choose bits.

    Parameters
    ----------
    source : Source
    samples : list of Sample
        A few are enough; if the model sees, one with a picture.
    target : int
        Largest file size in bytes.
    group_size : int
    size_of : callable
        Returns the file size of a list of plans in bytes.
    device : str

    Returns
    -------
    dict
        Bits by matrix name.

    Raises
    ------
    QvlError
        If the fewest bits everywhere are too large, or the source is already quantized.
    """
    if source.imported:
        raise QvlError(f"{source.checkpoint.folder}: is quantized already; --target-size needs the unquantized model")
    plans = {bits: _plans(source, bits, group_size) for bits in BITS if bits == 16 or group_size in group_sizes(bits)}
    fewest = min(plans)
    smallest = size_of(list(plans[fewest].values()))
    if smallest > target:
        raise QvlError(
            f"--target-size of {target / 1e6:,.2f} MB is too small: with {fewest} bits everywhere and groups of "
            f"{group_size} the file has {smallest / 1e6:,.2f} MB; name a larger one"
        )
    checkpoint = source.checkpoint
    units = stages(checkpoint.family, checkpoint.config)
    losses = measure(source, _few(samples), units, plans, device)
    head = checkpoint.family.decoder_names(checkpoint.config).head
    owner = next(i for i, unit in enumerate(units) if head in unit.matrices)
    for i, unit in enumerate(units):
        if not unit.matrices:  # "norm" with a tied head: what its logits lose depends on the bits of the embedding
            losses[owner] = {bits: losses[owner][bits] + losses[i][bits] for bits in plans}
    weights = [{bits: sum(_nbytes(plans[bits][name]) for name in unit.matrices) for bits in plans} for unit in units]
    chosen = choose(losses, weights, target - smallest)
    return {name: bits for unit, bits in zip(units, chosen) for name in unit.matrices}


def _few(samples: list[Sample]) -> list[Sample]:
    """Return the first `SAMPLES` samples; if they have no picture, the first with one takes the place of the last."""
    few = samples[:SAMPLES]
    if not any(sample.slots for sample in few):
        few[-1:] = [sample for sample in samples if sample.slots][:1] or few[-1:]
    return few


def choose(losses: list[dict[int, float]], sizes: list[dict[int, int]], room: int) -> list[int]:
    """Choose the best steps up from the fewest bits.

    Parameters
    ----------
    losses, sizes : list of dict
        Error and bytes of each unit by bits.
    room : int
        Bytes available beyond the fewest bits everywhere.

    Returns
    -------
    list of int
        Bits of each unit.
    """
    chosen = [min(loss) for loss in losses]
    while True:
        steps = []
        for i, (loss, size) in enumerate(zip(losses, sizes)):
            for bits in [more for more in loss if more > chosen[i]]:
                extra, gain = size[bits] - size[chosen[i]], loss[chosen[i]] - loss[bits]
                if extra <= room and gain > 0:
                    steps.append((gain / max(extra, 1), i, bits))
        if not steps:
            return chosen
        _, i, bits = max(steps, key=lambda step: (step[0], -step[1], step[2]))
        room -= sizes[i][bits] - sizes[i][chosen[i]]
        chosen[i] = bits


def measure(
    source: Source,
    samples: list[Sample],
    units: list[Stage],
    plans: dict[int, dict[str, MatrixPlan]],
    device: str,
) -> list[dict[int, float]]:
    """Measure the squared relative output error of each unit at fewer than 16 bits; at 16 it counts as 0."""
    checkpoint, ops = source.checkpoint, make_ops(device, "int16")
    walk = Walk(ops, checkpoint.family, checkpoint.config, samples, checkpoint.reader)
    models = {bits: Published(source, plans[bits].values()) for bits in plans}
    losses = []
    for unit in units:
        before = [np.array(x) for x in walk.outputs(unit)]
        results = {}
        for bits, model in models.items():
            for target, values in zip(walk.outputs(unit), before):
                target[...] = values
            weights: Weights[Config] = Weights(model, ops)
            walk.run(unit, weights)
            results[bits] = _seen(walk, unit, weights)
        losses.append({bits: relative_error(results[bits], results[16]) ** 2 for bits in plans})
    return losses


def _seen(walk: Walk, unit: Stage, weights: Weights) -> list[np.ndarray]:
    """Return the output of a unit: activations, or logits."""
    if unit.kind != "norm":
        return [np.array(x) for x in walk.outputs(unit)]
    head = weights.matrix(walk.family.decoder_names(walk.config).head)
    return [next(walk.logits(head, i, max(0, len(x) - HEAD_ROWS))) for i, x in enumerate(walk.hidden)]


def _plans(source: Source, bits: int, group_size: int) -> dict[str, MatrixPlan]:
    recipe = Recipe(bits=bits, group_size=group_size, vision_bits=bits, head_bits=bits)
    return {plan.spec.name: plan for plan in source.plan(recipe)}


def _nbytes(plan: MatrixPlan) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in plan.layout().values())
