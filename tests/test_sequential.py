"""A layer computed product by product: the same outputs as at once, and Hessians of the products' actual inputs."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import GOLDEN
from fakes.recorded import Recorded
from families import GOLDEN as FAMILIES

from qvl_convert import calibration, gram
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.plan import Recipe, Source
from qvl_convert.sequential import SEQUENTIAL_STAGES, Missing, products
from qvl_convert.walk import Walk, stages
from qvl_runtime.backends import make_ops
from qvl_runtime.families.weights import Weights

CHECKPOINTS = {"tiny-vl": GOLDEN, "q2-untied": FAMILIES, "q25-tied": FAMILIES, "q3-tied": FAMILIES}


class Rounded:
    """A checkpoint rounded to int4; refuses a matrix that is not quantized yet."""

    def __init__(self, source, missing):
        self.source, self.config, self.missing = source, source.checkpoint.config, missing
        self.plans = {plan.spec.name: plan for plan in source.plan(Recipe(vision_bits=4, head_bits=4, group_size=32))}

    def matrix(self, name):
        assert name not in self.missing
        return self.source.matrix(self.plans[name])

    def vector(self, name):
        return self.source.checkpoint.vector(name)


class NamedWeights(Weights):
    """Weights that stay alive, in `made`, so that no two have the same id."""

    def __init__(self, tensors, ops):
        super().__init__(tensors, ops)
        self.made = {}

    def matrix(self, name):
        self.made[name] = super().matrix(name)
        return self.made[name]


class Counted:
    """A backend that counts what it computes of attention."""

    def __init__(self, ops):
        self.ops, self.count = ops, 0

    def __getattr__(self, name):
        operation = getattr(self.ops, name)
        if name not in ("vision_attention", "attend"):
            return operation

        def counted(*args, **options):
            self.count += 1
            operation(*args, **options)

        return counted


@pytest.mark.parametrize(("name", "spilled"), [(name, name == "tiny-vl") for name in CHECKPOINTS])
def test_a_layer_is_the_same_product_by_product(name, spilled, tmp_path, monkeypatch):
    monkeypatch.setattr(gram, "FAST", False)  # sums without rounding, for a close comparison
    folder = CHECKPOINTS[name]
    monkeypatch.chdir(folder)
    source = Source(Checkpoint(folder / "ckpt" / name))
    checkpoint, ops = source.checkpoint, Counted(make_ops("reference"))
    samples = calibration.load("builtin", checkpoint, count=1, max_tokens=300)
    spill = tmp_path if spilled else None
    walks = [
        Walk(backend, checkpoint.family, checkpoint.config, samples, checkpoint.reader)
        for backend in (ops, Recorded(ops))
    ]
    for array in (*walks[0].features, *walks[1].features):
        array[...] = 0.5
    ran = set()
    for stage in stages(checkpoint.family, checkpoint.config):
        if stage.index > 0 or stage.kind not in ("patches", "embedding", *SEQUENTIAL_STAGES):
            continue
        recorded = walks[1].ops
        recorded.inputs = {}
        weights = NamedWeights(Rounded(source, {}), recorded)
        walks[1].run(stage, weights)
        if stage.kind not in SEQUENTIAL_STAGES:
            walks[0].run(stage, Weights(Rounded(source, {}), ops))
            continue
        inputs = {name: recorded.inputs[id(weight)] for name, weight in weights.made.items()}
        missing = {name: Missing(name, 1, len(inputs[name][0].T)) for name in stage.matrices}
        seen, ops.count = [], 0
        for names, hessian in products(walks[0], stage, Rounded(source, missing), missing, spill):
            x = np.concatenate(inputs[min(names)])
            assert hessian.count == len(x) > 0
            np.testing.assert_allclose(hessian.sum, x.T @ x, rtol=1e-5, atol=1e-5 * np.abs(hessian.sum).max())
            seen += sorted(names)
        assert sorted(seen) == sorted(stage.matrices) and ops.count == len(walks[0].outputs(stage))
        for got, want in zip(walks[0].outputs(stage), walks[1].outputs(stage)):
            np.testing.assert_array_equal(got, want)
        ran.add(stage.kind)
    assert ran == set(SEQUENTIAL_STAGES)


def test_products_whose_matrix_is_there_do_not_pause():
    source = Source(Checkpoint(GOLDEN / "ckpt" / "tiny-vl"))
    checkpoint, ops = source.checkpoint, make_ops("reference")
    samples = calibration.load("builtin", checkpoint, count=1, max_tokens=300)
    walk = Walk(ops, checkpoint.family, checkpoint.config, samples, checkpoint.reader)
    walk.hidden[0][...] = 1
    stage = next(stage for stage in stages(checkpoint.family, checkpoint.config) if stage.kind == "decoder")
    last = stage.matrices[-1]
    missing = {last: Missing(last, 1, checkpoint.config.ffn_width)}
    assert [names for names, _ in products(walk, stage, Rounded(source, missing), missing, None)] == [{last}]
