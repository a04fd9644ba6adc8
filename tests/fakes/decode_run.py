"""Decode steps of a blob on the fake GPU, with neither torch nor triton: ``decode_run.py BLOB``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fakes.absent  # noqa: F401
import numpy as np
from fakes.gpu import FakeDriver, Images

from qvl_kernels.gpu import CudaOps
from qvl_runtime.blob import Blob
from qvl_runtime.engine.decoder import DecodeStep, Span
from qvl_runtime.families.layers import Decoder
from qvl_runtime.families.weights import Weights


def main(path: str) -> None:
    driver, blob = FakeDriver(), Blob(path)
    ops = CudaOps(driver, Images())
    decoder = Decoder(Weights(blob, ops), blob.family.decoder_names(blob.config), blob.family.rotary)
    for dtype in ("fp16", "int8"):
        context = decoder.sequence(dtype, 16)
        context.begin(2)
        work = decoder.workspace(2)
        decoder.embed(ops.upload(np.array([1, 2], np.int32)), work.x)
        decoder.forward(work, [Span(context, 2)])
        context.advance(2)
        step = DecodeStep(decoder)
        step([(context, [3])])

        driver.launches.clear()
        step([(context, [4])])
        first = list(driver.launches)
        driver.launches.clear()
        step([(context, [5])])
        assert driver.launches == first, "one graph serves every step"
        assert int(ops.download(context.start)[0]) == context.length == 5
        families = [launch.name.partition(".")[0] for launch in first]
        layers = blob.config.num_hidden_layers
        for family in ("decode_attention", "gate_up"):
            assert families.count(family) == layers
        assert "rope_append" not in families, "attention rotates and appends the row of a recorded token itself"
        assert families[0] == "embed" and families[-1] == "argmax"

        context.reserve(300)
        step([(context, [6])])
        assert context.store.capacity >= 300 and context.length == 6
    assert not {"torch", "triton"} & sys.modules.keys()
    print("decoded")


if __name__ == "__main__":
    main(*sys.argv[1:])
