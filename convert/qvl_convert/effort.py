"""How long a calibration will take: the work of its steps, in the seconds they took on one machine.

Only the ratios matter: the time that remains is the work that remains, at the speed so far.
"""

from __future__ import annotations

from collections.abc import Iterable

from qvl_convert.gptq import usual_sweeps
from qvl_convert.plan import MatrixPlan
from qvl_convert.progress import Report
from qvl_convert.walk import PICTURE_STAGES, Prompted, Stage
from qvl_runtime.families.specs import MatrixSpec

LAYER, GRAM, PRODUCT, FACTOR, VALUES = 250e9, 150e9, 115e9, 70e9, 32e6
"""Per second: operations of a layer, of a symmetric product of half that many, of float32 products, and of a Cholesky
factor; and weights that are rounded (2 cores of an AMD EPYC, Zen 3)."""

PATCHES = 4
"""Rows of a ViT for each token of a picture."""


class Effort:
    """Adds up the work of a calibration and reports it.

    Parameters
    ----------
    report : callable
    prompts : sequence
        The calibration samples.
    """

    def __init__(self, report: Report, prompts: Iterable[Prompted]):
        self._report, self._done, self._whole = report, 0.0, 0.0
        self._tokens, self._patches = 0, 0
        for prompt in prompts:
            self._tokens += len(prompt.ids)
            self._patches += PATCHES * sum(slot.picture.tokens for slot in prompt.slots)

    def expect(self, work: float) -> None:
        """Add to the whole work."""
        self._whole += work

    def finish(self, work: float) -> None:
        """Report that a part of the work is done."""
        self._done += work
        self._report(min(self._done, self._whole), self._whole)

    def layer(self, stage: Stage, specs: dict[str, MatrixSpec]) -> float:
        """Return the work of running the prompts through a stage."""
        return 2 * self._rows(stage) * sum(specs[name].n * specs[name].k for name in stage.matrices) / LAYER

    def matrix(self, stage: Stage, plan: MatrixPlan) -> float:
        """Return the work of calibrating a matrix."""
        n, k = plan.spec.n, plan.spec.k
        products = n * k**2 * (1 + 2 * usual_sweeps(plan.group_size))
        return self._rows(stage) * k**2 / GRAM + products / PRODUCT + k**3 / 3 / FACTOR + n * k / VALUES

    def _rows(self, stage: Stage) -> int:
        return self._patches if stage.kind in PICTURE_STAGES else self._tokens
