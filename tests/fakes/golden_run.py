"""Runs golden checkpoints on the GPU backend with its kernels in Triton's interpreter; prints what came out as JSON.

A process of its own: whether Triton interprets or compiles is settled when it is imported.

    TRITON_INTERPRET=1 python tests/fakes/golden_run.py INT4_BLOB IMAGE_BLOB
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from fakes.gpu import FakeDriver, Images  # noqa: E402
from fakes.interpreter import execute  # noqa: E402

import qvl_runtime as qvl  # noqa: E402
from qvl_kernels import gpu  # noqa: E402
from qvl_kernels.gpu.ops import CudaOps  # noqa: E402

DECODED = 3


def main(int4_blob: str, image_blob: str) -> dict:
    golden, driver = TESTS / "golden", FakeDriver(executor=execute)
    gpu.available = lambda: (True, driver.name)
    gpu.CudaOps = lambda *args, **options: CudaOps(driver, Images(), *args, **options)

    text = np.load(golden / "lm" / "tiny-vl-gptq_gptq_text.npz")
    ids = text["input_ids"][0].tolist()
    model = qvl.load(int4_blob, device="cuda")
    logits = model.logits(ids)[text["pos"]]
    result = {
        "logits": float(np.abs(logits - text["logits"][0]).max()),
        "greedy": model.generate(ids, max_new_tokens=DECODED).token_ids,
        "greedy_int8": qvl.load(int4_blob, device="cuda", kv_cache="int8").generate(ids, max_new_tokens=2).token_ids,
        "greedy_expected": text["gen_ids"][0].tolist(),
    }

    vision = np.load(golden / "vis" / "tiny-vl-bin_base.npz")
    features = qvl.load(image_blob, device="cuda").encode_image(golden / "images" / "rgb_odd.png")
    result["features"] = float(np.abs(features[vision["qrows"]] - vision["final"][0]).max())
    result["kernels"] = sorted({launch.name for launch in driver.launches})
    return result


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
