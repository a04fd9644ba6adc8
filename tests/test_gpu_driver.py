"""The module that talks to the NVIDIA driver, through the real cuda-core, on a driver library compiled here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qvl_kernels import gpu

pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("cuda.core")

FAKES = Path(__file__).parent / "fakes"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    out = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    options = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{out.name}", "-o", out, FAKES / "libcuda.c", "-ldl"]
    subprocess.run([compiler, *map(str, options)], check=True)
    return out


def _run(library: Path | str, part: str, *arguments: object, **settings: object) -> str:
    environment = {**os.environ, **{f"FAKE_CUDA_{key.upper()}": str(value) for key, value in settings.items()}}
    command = [sys.executable, str(FAKES / "driver_run.py"), str(library), part, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("done\n")
    return result.stdout


def test_memory_launches_and_graphs(library):
    _run(library, "seam")


def test_a_decode_step_is_one_graph(library, blob):
    _run(library, "model", blob("tiny-vl-gptq", bits=4, vision_bits=8, head_bits=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"driver": 11040}, "the NVIDIA driver supports CUDA 11.4 and 12.0 is needed"),
        ({"capability": 61}, "Fake GPU has compute capability 6.1 and 7.5 (Turing, 2018) is the oldest supported"),
        ({"init": 100}, "no usable NVIDIA GPU"),
        ({"devices": 0}, "no NVIDIA GPU found"),
    ],
)
def test_what_is_not_usable_is_said_in_one_line(library, settings, message):
    assert message in _run(library, "refused", **settings)


def test_no_driver_at_all_is_said_in_one_line():
    if not gpu.absent():
        pytest.skip("this machine has a driver")
    assert "no NVIDIA driver found" in _run("", "refused")
