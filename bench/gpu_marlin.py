"""Time int4 products beside Marlin (fp16 times symmetric int4 in groups of 128) and torch's fp16 product.

    python bench/gpu_marlin.py --library libmarlin.so

The library is the folder gptqmodel_ext/marlin of GPTQModel 7.7, compiled with its flags for this GPU and this torch,
with `gptq_marlin_gemm` and `gptq_marlin_repack` registered under torch.ops.bench_marlin. First Marlin's results are
compared with a product by the dequantized matrix: exit status 1 if they differ. All three run from CUDA graphs, in
turns, over copies of the weights that are larger than the caches; each graph has at least 24 products.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# so that a checkout works without installation
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent, HERE.parent / "kernels", HERE.parent / "convert")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gpu_bench import common  # noqa: E402

from qvl_kernels.packing import unpack_groups  # noqa: E402

SHAPES = ((12288, 4096), (4096, 4096), (11008, 4096), (4096, 11008), (6144, 2560), (2560, 9728))
ROWS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024)
CHECKED = (4096, 4096)
GROUP = 128
UINT4B8 = 4 << 8 | 8 << 17 | 1 << 50
"""The id of Marlin's type kU4B8: 4 bits of mantissa, a bias of 8."""
LEAST_CALLS = 24
TOLERANCE = 5e-3
DEVICE = "cuda"


class Marlin:
    """One weight ``[n, k]`` for Marlin, prepared and called as GPTQModel's `MarlinLinear` does."""

    workspace: torch.Tensor | None = None
    empty: torch.Tensor | None = None

    def __init__(self, qweight: torch.Tensor, scales: torch.Tensor):
        """`qweight` is GPTQ's int32 ``[k / 8, n]`` and `scales` fp16 ``[k / 128, n]``."""
        self.k, self.n = 8 * qweight.shape[0], qweight.shape[1]
        if Marlin.workspace is None:
            count = torch.cuda.get_device_properties(torch.device(DEVICE)).multi_processor_count
            Marlin.workspace = torch.zeros(max(count, 128), dtype=torch.int32, device=DEVICE)
            Marlin.empty = torch.empty(0, dtype=torch.int32, device=DEVICE)
        self.codes = torch.ops.bench_marlin.gptq_marlin_repack(qweight.contiguous(), Marlin.empty, self.k, self.n, 4)
        order = torch.tensor([i + 8 * j for i in range(8) for j in range(8)], device=DEVICE)
        self.scales = scales.reshape(-1, 64).index_select(1, order).reshape(-1, self.n).contiguous()

    def copy(self) -> Marlin:
        other = object.__new__(Marlin)
        other.k, other.n, other.codes, other.scales = self.k, self.n, self.codes.clone(), self.scales.clone()
        return other

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.bench_marlin.gptq_marlin_gemm(
            x, None, self.codes, None, self.scales, None, Marlin.empty, Marlin.empty, Marlin.empty, Marlin.workspace,
            UINT4B8, x.shape[0], self.n, self.k, True, False, True, False,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return 4 * self.codes.numel() + 2 * self.scales.numel()


def gptq(matrix: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The same int4 matrix in the layout of GPTQ: int32 ``[k / 8, n]`` and fp16 scales ``[k / 128, n]``."""
    codes = torch.from_numpy(matrix.codes()).to(DEVICE).to(torch.int32)
    codes = codes.T.reshape(matrix.k // 8, 8, matrix.n)
    qweight = codes[:, 0].contiguous()
    for i in range(1, 8):
        qweight |= codes[:, i] << 4 * i
    scales = unpack_groups(matrix.scales, matrix.n, matrix.k, GROUP).T
    return qweight, torch.from_numpy(np.ascontiguousarray(scales)).to(DEVICE)


def dequantized(qweight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 ``[n, k]``."""
    codes = torch.stack([qweight >> 4 * i & 15 for i in range(8)], dim=1).reshape(-1, qweight.shape[1])
    return ((codes - 8).float() * scales.float().repeat_interleave(GROUP, dim=0)).T.contiguous()


def check(ops: Any) -> dict:
    """Marlin's results, and ours, beside a product with the dequantized matrix. Scales differ."""
    n, k = CHECKED
    plain = common.matrix(n, k, 4)
    rng = np.random.default_rng(5)
    scales = (plain.scales.astype(np.float32) * rng.uniform(0.5, 2, plain.scales.shape)).astype(np.float16)
    matrix = dataclasses.replace(plain, scales=scales)
    qweight, packed = gptq(matrix)
    weight, theirs, ours = dequantized(qweight, packed), Marlin(qweight, packed), ops.weight(matrix)
    found = {}
    for m in ROWS:
        values = rng.standard_normal((m, k)).astype(np.float16)
        x = torch.from_numpy(values).to(DEVICE)
        right = x.double() @ weight.double().T
        out = ops.empty((m, n), np.float16)
        ops.linear(ops.upload(values), ours, out=out)
        ops.synchronize()
        pair = theirs(x), torch.from_numpy(ops.download(out)).to(DEVICE)
        errors = [float((got.double() - right).norm() / right.norm()) for got in pair]
        found[m] = {"marlin": errors[0], "ours": errors[1]}
    print("Relative errors (Frobenius) of", f"{n}x{k}:")
    for m, errors in found.items():
        print(f"  {m} rows: Marlin {errors['marlin']:.2e}, ours {errors['ours']:.2e}")
    worst = max(errors["marlin"] for errors in found.values())
    if worst >= TOLERANCE:
        print("  Marlin's results are wrong, so its times mean nothing", flush=True)
    return {"marlin_right": worst < TOLERANCE, "errors": found}


def calls(function: Any, weights: list) -> list:
    """Products with every weight, again from the first until there are enough."""
    return [functools.partial(function, w) for w in weights * -(-LEAST_CALLS // len(weights))]


def timed(ops: Any, n: int, values: np.ndarray, ours: list, theirs: list, dense: list) -> dict[str, float]:
    """Seconds of a product of fp16 `values` ``[m, k]``: ours, Marlin's and torch's."""
    m, timer = len(values), common.TorchTimer(torch)
    source, x, out = ops.upload(values), torch.from_numpy(values).to(DEVICE), ops.empty((m, n), np.float16)
    runs = {
        "ours": common.OurTimer(ops).prepare(calls(lambda w: ops.linear(source, w, out=out), ours)),
        "marlin": timer.prepare(calls(lambda w: w(x), theirs)),
        "torch": timer.prepare(calls(lambda w: torch.nn.functional.linear(x, w), dense)),
    }
    return common.side_by_side(runs, 15 if m <= 128 else 9)


def measure(ops: Any, n: int, k: int, end: float, rows: list[dict]) -> None:
    """Append a result for every number of rows; the weights are made once."""
    matrix, begin = common.matrix(n, k, 4), time.monotonic()
    ours = [ops.weight(matrix)]
    ours_bytes = ours[0].codes.nbytes + ours[0].scales.nbytes
    ours += [ops.weight(matrix) for _ in range(common.copies(ours_bytes) - 1)]
    theirs = [Marlin(*gptq(matrix))]
    theirs += [theirs[0].copy() for _ in range(common.copies(theirs[0].nbytes) - 1)]
    dense = [torch.randn((n, k), dtype=torch.float16, device=DEVICE) / k**0.5]
    dense += [dense[0].clone() for _ in range(common.copies(2 * n * k) - 1)]
    values = np.random.default_rng(0).standard_normal((max(ROWS), k), np.float32).astype(np.float16)
    print(f"[{n}x{k}: weights in {time.monotonic() - begin:.1f} s, {len(ours)}, {len(theirs)} and {len(dense)} copies]")
    for m in ROWS:
        if time.monotonic() > end:
            print(f"  out of time before m={m}")
            break
        seconds = timed(ops, n, values[:m], ours, theirs, dense)
        rows.append({"n": n, "k": k, "m": m, **{name: round(1e6 * taken, 3) for name, taken in seconds.items()}})
    print(f"[{n}x{k}: done after {time.monotonic() - begin:.1f} s]", flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="start no measurement after these (%(default)s)")
    parser.add_argument("--library", required=True, help="with Marlin's operations")
    options = parser.parse_args()
    begin = time.monotonic()
    torch.ops.load_library(options.library)
    ops = common.make_ops()
    report: dict[str, Any] = {"gpu": ops.driver.name, "torch": torch.__version__, "rows": []}
    print(f"{ops.driver.name}, torch {torch.__version__}, ready after {time.monotonic() - begin:.1f} s", flush=True)
    gc.disable()  # frees nothing of ours while torch captures a graph
    try:
        with torch.inference_mode():
            report["check"] = check(ops)
            gc.collect()
            for n, k in SHAPES:
                measure(ops, n, k, begin + options.seconds, report["rows"])
                gc.collect()
                torch.cuda.empty_cache()
    finally:
        header = ("n x k", "m", "ours us", "Marlin us", "torch fp16 us", "Marlin/ours", "torch/ours")
        rows = [
            [f"{r['n']}x{r['k']}", r["m"], *(r[name] for name in ("ours", "marlin", "torch")),
             r["marlin"] / r["ours"], r["torch"] / r["ours"]]
            for r in report["rows"]
        ]  # fmt: skip
        common.table("int4 products, groups of 128, weights beyond the caches", header, rows)
        means = {}
        for m in ROWS:
            ratios = [r["marlin"] / r["ours"] for r in report["rows"] if r["m"] == m]
            if ratios:
                means[m] = float(np.exp(np.mean(np.log(ratios))))
        common.table("Marlin/ours, geometric mean over the shapes", ("m", "ratio"), list(means.items()))
        report["marlin_over_ours"] = means
        report["wall_s"] = round(time.monotonic() - begin, 1)
        print(json.dumps(report), flush=True)
    return 0 if report["check"]["marlin_right"] else 1


if __name__ == "__main__":
    sys.exit(main())
