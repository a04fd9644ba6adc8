"""What the tests share: the golden data, converted once a run, and the backends."""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import linked

import qvl_runtime as qvl
from qvl_convert.convert import convert
from qvl_runtime.demo import checkpoint_folder

GOLDEN = Path(__file__).parent / "golden"
BACKENDS = ("reference", "cpu")

LONGEST = (
    "test_gpu_build",
    "test_cpu_backend",
    "test_quantize_model",
    "test_gpu_architectures",
    "test_gpu_model",
    "test_gpu_attention",
    "test_gpu_products",
    "test_family_convert",
)
"""Files that take from half a minute to minutes of a worker. They come first, lest one of them begins last.

Two files that Numba compiles the same routines for are apart, so that the second finds what the first has compiled.
"""


def pytest_configure(config: pytest.Config) -> None:
    """Divide the processors among the workers of a parallel run.

    Threads that wait for each other spin for a while; with more threads than processors they hold one another up.
    """
    workers = getattr(config.option, "numprocesses", None)
    if workers:
        for name in ("QVL_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ.setdefault(name, str(max(1, (os.cpu_count() or 1) // workers)))
        config.option.loadscopereorder = False  # which would put the files of most tests first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the `LONGEST` files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the golden data; see its README.md."""
    return GOLDEN


@pytest.fixture
def in_golden(monkeypatch) -> None:
    """Run with the golden folder as the current directory, as the image paths of its prompts expect."""
    monkeypatch.chdir(GOLDEN)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """``checkpoint(name, variant)``: a golden checkpoint's folder, with the variant's config values replaced."""

    @functools.cache
    def make(name: str, variant: str = "base") -> Path:
        source = GOLDEN / "ckpt" / name
        overrides = json.loads((GOLDEN / "ckpt" / "variants.json").read_text())[variant]
        if not overrides:
            return source
        config = json.loads((source / "config.json").read_text())
        nested = {key: config[key] | value for key, value in overrides.items() if isinstance(value, dict)}
        return linked(source, tmp_path_factory.mktemp(f"{name}-{variant}") / name, **overrides | nested)

    return make


@pytest.fixture(scope="session")
def blob(checkpoint, tmp_path_factory):
    """``blob(name, variant, **options)``: the path of a golden checkpoint, converted."""
    folder = tmp_path_factory.mktemp("blobs")

    def make(name: str, variant: str = "base", **options) -> Path:
        label = "-".join([name, variant, *(f"{k}{v}" for k, v in sorted(options.items()))])
        out = folder / f"{label}.qvl"
        if not out.exists():
            convert(checkpoint(name, variant), out, **options)
        return out

    yield make
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def model(blob):
    """``model(name, variant, device=…, kv_cache=…, activations=…, **options)``: a loaded golden checkpoint.

    The CPU computes it with two threads.
    """

    @functools.cache
    def make(name: str, variant: str = "base", device="reference", kv_cache="fp16", activations="auto", **options):
        path = blob(name, variant, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("QVL_THREADS", "2")
            return qvl.load(path, device=device, kv_cache=kv_cache, activations=activations)

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20231001)


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory) -> qvl.Model:
    """The model that ships with the package, on the CPU."""
    out = tmp_path_factory.mktemp("demo") / "demo.qvl"
    convert(checkpoint_folder(), out)
    return qvl.load(out, device="cpu")


@pytest.fixture(scope="session")
def served(demo_model):
    """A server of the demo model, as it is started without options."""
    from serving import serving  # its packages are needed by tests of the server alone

    with serving(demo_model) as server:
        yield server


@pytest.fixture
def driver():
    """The driver of a fake GPU, on which kernels are recorded and not run."""
    from fakes.gpu import FakeDriver

    return FakeDriver()


@pytest.fixture
def ops(driver):
    """The GPU backend on `driver`; tests of other backends have `ops` of their own."""
    from fakes.gpu import Images

    from qvl_kernels.gpu.ops import CudaOps

    return CudaOps(driver, Images())
