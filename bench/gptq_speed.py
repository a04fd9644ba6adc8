"""Time the steps of GPTQ for the matrices of one decoder layer and one ViT layer of Qwen-VL.

    python bench/gptq_speed.py [--part 8]

No checkpoint is needed: weights and inputs are random, the inputs correlated and with columns of different magnitude.
The number of input rows is that of the built-in calibration set. Only a part of each matrix's rows is quantized
(`--part 8`: an eighth), and the time is multiplied by it; Hessians and factors are complete. The time to run prompts
through the layer is not included (see `gptq_time.py`). A symmetric product counts half of the operations. The peak is
that of a float32 product of 4096 x 4096 in the same run. A table, then one JSON document as the last line.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import harness
import numpy as np

from qvl_convert import gptq
from qvl_convert.hessian import Hessian, factorize
from qvl_kernels.packing import pack

TOKENS, PATCHES = 14_989, 27_648
LAYERS = {
    "decoder": (32, TOKENS, [(4096, [12288]), (4096, [4096]), (4096, [11008, 11008]), (11008, [4096])]),
    "vision": (48, PATCHES, [(1664, [4992]), (1664, [1664]), (1664, [8192]), (8192, [1664])]),
}
"""Number of layers, rows of inputs, and for each input its width and the rows of the matrices that read it."""


def random_inputs(rng: np.random.Generator, rows: int, k: int) -> np.ndarray:
    x = rng.standard_normal((rows, k), np.float32)
    x += rng.standard_normal((rows, 256), np.float32) @ (rng.standard_normal((256, k), np.float32) / 8)
    return x * np.exp(rng.standard_normal(k)).astype(np.float32)


class Steps:
    """Seconds and operations by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.work: dict[str, float] = defaultdict(float)

    def timed(self, step: str, work: float, share: int, function: Callable, *values: Any) -> Any:
        """Call a function that does one of `share` equal parts of a step."""
        start = time.perf_counter()
        result = function(*values)
        self.seconds[step] += share * (time.perf_counter() - start)
        self.work[step] += share * work
        return result


def peak(rng: np.random.Generator) -> float:
    """Operations a second of a float32 product."""
    a, seconds = rng.standard_normal((4096, 4096), np.float32), []
    b = a.copy()
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(seconds)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--part", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--shrink", type=int, default=1, help="divide every width, for a try")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    gptq.gptq(np.ones((8, 256), np.float32), factorize(np.eye(256, dtype=np.float32)))
    warm = Hessian(256)
    warm.add(np.ones((1, 256)))
    warm.mean()
    limit, results = peak(rng), {}
    print(f"float32 product: {limit / 1e9:.0f} GFLOP/s")
    for kind in args.kinds:
        layers, rows, inputs = LAYERS[kind]
        steps = Steps()
        for k, heights in inputs:
            k //= args.shrink
            x, hessian = random_inputs(rng, rows, k), Hessian(k)
            for part in np.array_split(x, 32):
                steps.timed("Hessians", len(part) * k * k, 1, hessian.add, part)
            mean = steps.timed("Hessians", 0, 1, hessian.mean)
            del x, hessian
            factor = steps.timed("factors", k**3 / 3, 1, factorize, mean)
            for n in heights:
                few = n // args.part
                w = rng.standard_normal((few, k), np.float32) * np.float32(0.02)
                steps.timed("scales", 0, args.part, gptq.search_scales, w, factor.price, 4, 128, True)
                codes, scales, _ = steps.timed("rounding", few * k * k, args.part, gptq.gptq, w, factor)
                steps.timed("packing", 0, args.part, pack, codes, scales, 4, 128)
        # the search for scales is a part of `gptq`
        steps.seconds["rounding"] -= steps.seconds["scales"]
        whole = sum(steps.seconds.values())
        print(f"{kind}: {whole:.1f} s a layer, {layers * whole / 60:.1f} min for {layers}, without running it")
        for name, seconds in steps.seconds.items():
            rate = steps.work[name] / seconds
            shown = f"{rate / 1e9:6.0f} GFLOP/s, {rate / limit:4.0%} of the peak" if rate else ""
            print(f"  {name:<10}{seconds:8.2f} s{shown}")
        results[kind] = {"seconds": steps.seconds, "operations": steps.work, "layer": whole, "layers": layers}
    harness.print_document(bench="gptq_speed", float32_peak=limit, part=args.part, results=results)


if __name__ == "__main__":
    main()
