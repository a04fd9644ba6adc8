"""Time and memory of GPTQ at the true shapes of Qwen-VL: one ViT layer and one decoder layer, projected to all layers.

    python bench/synthetic.py TRUE
    OPENBLAS_THREAD_TIMEOUT=4 python bench/gptq_time.py TRUE [--samples 32] [--device cpu]

The calibration set is the built-in one. Weights and the layers' inputs are random, which does not change the time.
`wall` is elapsed time; `processor` is CPU time of all threads, which other programs hardly change. The environment
variable makes OpenBLAS' idle threads release the cores at once; the command `qvl` does so by itself. A table, then one
JSON document as the last line.
"""

from __future__ import annotations

import os
import resource
import time

import harness
import numpy as np

from qvl_convert import calibration
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.plan import Published, Recipe, Source
from qvl_convert.quantize_model import Calibrated
from qvl_convert.sequential import Missing, products
from qvl_convert.walk import Walk, stages
from qvl_kernels.packing import Matrix
from qvl_runtime.backends import make_ops
from qvl_runtime.families.weights import Weights


class Quantized:
    """A checkpoint whose matrices are those quantized so far."""

    def __init__(self, published: Published, made: dict[str, Matrix]):
        self.config, self.vector, self.matrix = published.config, published.vector, made.__getitem__


class Clock:
    """Adds the time since the last `stop` to a step."""

    def __init__(self, steps: dict[str, dict[str, float]]):
        self._steps, self._wall, self._processor = steps, time.perf_counter(), time.process_time()

    def stop(self, name: str) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        self._steps[name]["wall"] += wall - self._wall
        self._steps[name]["processor"] += processor - self._processor
        self._wall, self._processor = wall, processor


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("source")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", default=["vision", "decoder"], choices=("vision", "decoder"))
    args = parser.parse_args()
    source = Source(Checkpoint(args.source))
    checkpoint = source.checkpoint
    samples = calibration.load("builtin", checkpoint, count=args.samples)
    plans = {plan.spec.name: plan for plan in source.plan(Recipe(vision_bits=4, head_bits=4, method="gptq"))}
    ops, published = make_ops(args.device), Published(source)
    family, config = checkpoint.family, checkpoint.config
    walk, maker = Walk(ops, family, config, samples, checkpoint.reader), Calibrated(samples, device=args.device)
    walk.run(stages(family, config)[0], Weights(published, ops))
    rng = np.random.default_rng(0)
    for array in (*walk.patches, *walk.hidden):
        array[...] = rng.standard_normal(array.shape, np.float32)
    tokens, pictures = sum(len(s.ids) for s in samples), sum(len(s.images) for s in samples)
    print(f"{args.samples} samples, {tokens} tokens, {pictures} pictures, {os.cpu_count()} processors, {ops.name}")
    results = {}
    for kind in args.kinds:
        stage = next(s for s in stages(family, config) if s.kind == kind)
        steps = {name: {"wall": 0.0, "processor": 0.0} for name in ("layer and Hessians", "quantize")}
        made, missing = {}, {name: Missing(name, plans[name].spec.n, plans[name].spec.k) for name in stage.matrices}
        tensors = Quantized(published, made)
        clock = Clock(steps)
        for names, hessian in products(walk, stage, tensors, missing, None):
            clock.stop("layer and Hessians")
            todo = [plans[name] for name in stage.matrices if name in names]
            for plan, matrix in maker.quantize(source, todo, dict.fromkeys(names, hessian)):
                made[plan.spec.name] = matrix
            del hessian
            clock.stop("quantize")
        clock.stop("layer and Hessians")
        for name, step in steps.items():
            print(f"  {name:<18} wall {step['wall']:7.1f} s   processor {step['processor']:7.1f} s", flush=True)
        layers = config.visual.layers if kind == "vision" else config.num_hidden_layers
        total = {key: sum(step[key] for step in steps.values()) for key in ("wall", "processor")}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        results[kind] = {
            "steps": steps,
            "layer": total,
            "all_layers_hours": {k: layers * v / 3600 for k, v in total.items()},
        }
        results[kind]["peak_gb"] = peak
        whole = results[kind]["all_layers_hours"]
        print(
            f"  one layer {total['wall']:.1f} s, processor {total['processor']:.1f} s; all {layers}: "
            f"{whole['wall']:.1f} h, processor {whole['processor']:.1f} h; peak {peak:.1f} GB"
        )
    harness.print_document(bench="gptq_time", samples=args.samples, tokens=tokens, results=results)


if __name__ == "__main__":
    main()
