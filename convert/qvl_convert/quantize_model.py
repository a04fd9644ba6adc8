"""GPTQ of a whole model, layer by layer. Each layer is calibrated with the output of the quantized layers before it.

The unfinished file is the only state: a resumed run computes the finished layers again from it, so that the remaining
layers get the same inputs and have the same bytes.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np

from qvl_convert.calibration import Sample
from qvl_convert.effort import Effort
from qvl_convert.gptq import gptq
from qvl_convert.hessian import Factor, Hessian, factorize
from qvl_convert.plan import Finished, MatrixPlan, Published, Source
from qvl_convert.progress import Report
from qvl_convert.sequential import SEQUENTIAL_STAGES, Missing, products
from qvl_convert.walk import Stage, Walk, stages
from qvl_kernels.ops import Array, Norm, Ops, Weight
from qvl_kernels.packing import Matrix, pack
from qvl_runtime.backends import make_ops
from qvl_runtime.families.weights import Tensors, Weights

log = logging.getLogger(__name__)


class Watch:
    """A backend that accumulates the Hessians of matrix products.

    Parameters
    ----------
    ops : Ops
        The backend that computes.
    wanted : set of str
        Names of the matrices to watch.

    Attributes
    ----------
    hessians : dict
        `Hessian` by matrix name; matrices with the same input share one.
    """

    def __init__(self, ops: Ops, wanted: set[str]):
        self._ops, self._wanted = ops, wanted
        self._names: dict[int, str] = {}
        self.hessians: dict[str, Hessian] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def as_ops(self) -> Ops:
        """Return self, typed as `Ops`: it has every operation of its backend."""
        return cast(Ops, self)

    def name(self, weight: Weight, name: str) -> None:
        """Register the name of a weight."""
        self._names[id(weight)] = name

    def linear(self, x: Array, w: Weight, *, norm: Norm | None = None, **rest: Any) -> None:
        self._see(x, norm, w)
        self._ops.linear(x, w, norm=norm, **rest)

    def gate_up(self, x: Array, gate: Weight, up: Weight, *, norm: Norm, **rest: Any) -> None:
        self._see(x, norm, gate, up)
        self._ops.gate_up(x, gate, up, norm=norm, **rest)

    def _see(self, x: Array, norm: Norm | None, *weights: Weight) -> None:
        names = [name for w in weights if (name := self._names[id(w)]) in self._wanted]
        if not names:
            return
        if norm is not None:
            normed = self._ops.empty(x.shape, self._ops.activation_dtype)
            self._ops.normalize(x, norm, out=normed)
            x = normed
        shared = self.hessians.get(names[0]) or Hessian(x.shape[1])
        self.hessians |= dict.fromkeys(names, shared)
        shared.add(self._ops.download(x))


class WatchedWeights(Weights):
    """Weights that register their names with a `Watch`."""

    def __init__(self, tensors: Tensors, watch: Watch):
        super().__init__(tensors, watch.as_ops())
        self._watch = watch

    def matrix(self, name: str) -> Weight:
        weight = super().matrix(name)
        self._watch.name(weight, name)
        return weight


class InFile:
    """The finished part of a blob, for `Weights`."""

    def __init__(self, source: Source, plans: list[MatrixPlan], finished: Finished):
        self.source, self.config = source, source.checkpoint.config
        self._plans, self._finished = {plan.spec.name: plan for plan in plans}, finished

    def matrix(self, name: str) -> Matrix:
        return self._finished(self._plans[name])

    def vector(self, name: str) -> np.ndarray:
        return self.source.checkpoint.vector(name)


class Calibrated:
    """The producer of `convert` for ``method="gptq"``.

    Parameters
    ----------
    samples : list of Sample
    device : str
        Device of the layers; GPTQ itself runs on the CPU.
    spill : bool
        Store the activations in a temporary folder, not in memory.
    report : callable
        Receives the work done and the whole work, in seconds on some machine.

    Raises
    ------
    QvlError
        For an unknown device.
    DeviceError
        If "cuda" is requested and there is no usable GPU.
    """

    def __init__(
        self,
        samples: list[Sample],
        *,
        device: str = "auto",
        spill: bool = False,
        report: Report = lambda done, whole: None,
    ):
        self.samples, self._spill, self._report = samples, spill, report
        self._ops = make_ops(device)

    def __call__(
        self, source: Source, plans: list[MatrixPlan], pending: list[MatrixPlan], finished: Finished
    ) -> Iterator[tuple[MatrixPlan, Matrix]]:
        """Produce the missing matrices."""
        with tempfile.TemporaryDirectory(prefix="qvl-") if self._spill else nullcontext() as folder:
            yield from self._layers(source, plans, pending, finished, None if folder is None else Path(folder))

    def _layers(
        self,
        source: Source,
        plans: list[MatrixPlan],
        pending: list[MatrixPlan],
        finished: Finished,
        folder: Path | None,
    ) -> Iterator[tuple[MatrixPlan, Matrix]]:
        todo = {plan.spec.name: plan for plan in pending}
        calibrated = {name for name, plan in todo.items() if plan.method == "gptq"}
        checkpoint = source.checkpoint
        walk = Walk(self._ops, checkpoint.family, checkpoint.config, self.samples, checkpoint.reader, folder)
        published, quantized = Published(source), InFile(source, plans, finished)
        steps = stages(checkpoint.family, checkpoint.config)
        effort, specs = Effort(self._report, self.samples), {plan.spec.name: plan.spec for plan in plans}
        later = set(calibrated)
        for stage in steps:
            effort.expect(sum(effort.matrix(stage, todo[name]) for name in later.intersection(stage.matrices)))
            later.difference_update(stage.matrices)
            if later:
                effort.expect(effort.layer(stage, specs))
        for stage in steps:
            names = [name for name in stage.matrices if name in todo]
            wanted = calibrated.intersection(names)
            yield from ((todo[name], source.matrix(todo[name])) for name in names if name not in wanted)
            for plan, matrix in self._stage(walk, stage, published, quantized, wanted, calibrated != wanted, todo):
                yield plan, matrix
                del matrix
                effort.finish(effort.matrix(stage, plan))
            calibrated -= wanted
            if calibrated:
                effort.finish(effort.layer(stage, specs))

    def _stage(
        self,
        walk: Walk,
        stage: Stage,
        published: Published,
        quantized: InFile,
        wanted: set[str],
        run: bool,
        todo: dict[str, MatrixPlan],
    ) -> Iterator[tuple[MatrixPlan, Matrix]]:
        """Quantize the wanted matrices of a stage; with `run` the prompts pass it."""
        if wanted and stage.kind in SEQUENTIAL_STAGES:
            missing = {name: Missing(name, todo[name].spec.n, todo[name].spec.k) for name in wanted}
            for together, hessian in products(walk, stage, quantized, missing, walk.spill):
                together_plans = [todo[name] for name in stage.matrices if name in together]
                yield from self.quantize(quantized.source, together_plans, dict.fromkeys(together, hessian))
            return
        hessians = self.hessians(walk, stage, published, wanted) if wanted else {}
        yield from self.quantize(quantized.source, [todo[n] for n in stage.matrices if n in wanted], hessians)
        if run and stage.kind != "norm":
            walk.run(stage, Weights(quantized, walk.ops))

    def hessians(self, walk: Walk, stage: Stage, published: Published, wanted: set[str]) -> dict[str, Hessian]:
        """Compute the Hessians of the wanted matrices of a stage with its original weights."""
        if stage.kind == "norm":
            walk.run(stage, Weights(published, walk.ops))
            hessian = Hessian(walk.config.hidden_size)
            for normed in walk.hidden:
                hessian.add(normed)
            return dict.fromkeys(wanted, hessian)
        watch = Watch(walk.ops, wanted)
        walk.run(stage, WatchedWeights(published, watch), keep=False)
        return watch.hessians

    def quantize(
        self, source: Source, plans: list[MatrixPlan], hessians: dict[str, Hessian]
    ) -> Iterator[tuple[MatrixPlan, Matrix]]:
        """Quantize the matrices of a stage; those with the same input should be adjacent."""
        factors: dict[int, Factor] = {}
        for plan in plans:
            started, hessian = time.perf_counter(), hessians[plan.spec.name]
            if id(hessian) not in factors:
                # one factor at a time: it takes three times the memory of a Hessian
                factors = {id(hessian): factorize(hessian.mean(), name=plan.spec.name)}
            factor = factors[id(hessian)]
            weight, bias, origin = source.weight(plan.spec), source.bias(plan.spec), source.origin(plan.spec)
            codes, scales, _ = gptq(weight, factor, bits=plan.bits, group_size=plan.group_size, name=origin)
            yield plan, pack(codes, scales, plan.bits, plan.group_size, bias=bias)
            log.info("%s: %.1f s", plan.spec.name, time.perf_counter() - started)
