"""The module that talks to the NVIDIA driver, through the real cuda-core, on a driver library compiled here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fakes.driver_library import compile_driver
from fakes.gpu import Images

from qvl_kernels import cache_folder, gpu
from qvl_kernels.cpu import CpuOps
from qvl_kernels.gpu import signatures
from qvl_kernels.gpu.build import source_hash

pytest.importorskip("cuda.bindings.driver")
pytest.importorskip("cuda.core")

FAKES = Path(__file__).parent / "fakes"


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    return compile_driver(compiler, tmp_path_factory.mktemp("driver"))


def _run(library: Path | str, part: str, *arguments: object, **settings: object) -> str:
    environment = {**os.environ, **{f"FAKE_CUDA_{key.upper()}": str(value) for key, value in settings.items()}}
    command = [sys.executable, str(FAKES / "driver_run.py"), str(library), part, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("done\n")
    return result.stdout + result.stderr


@pytest.mark.parametrize("version", [12000, 12020, 12040, 12080, 13000, 13050])
def test_memory_launches_and_graphs(library, version):
    """With drivers of every age, whose entry points are those of their version."""
    _run(library, "seam", driver=version)


def test_an_interrupt_within_a_capture_ends_it(library):
    _run(library, "interrupted")


def _bundle(folder: Path) -> None:
    """Kernels for sm_90 in the loader's cache."""
    images, kernels = Images(90), {}
    path = folder / "qvl" / f"gpu-kernels-sm90-{source_hash()[:16]}.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("code", b"\x7fELF")
        for name in signatures.names(90):
            image = images[name]
            entry = {
                "symbol": name,
                "warps": image.warps,
                "shared": 60000,
                "constants": image.constants,
                "cubin": "code",
            }
            kernels[name] = {"90": entry}
        bundle.writestr("manifest.json", json.dumps({"sources": source_hash(), "kernels": kernels}))


def test_the_public_api_on_a_bundle_of_kernels(library, blob, tmp_path, monkeypatch):
    """In a process that can import neither torch nor triton."""
    _bundle(tmp_path)
    monkeypatch.setenv("QVL_CACHE_DIR", str(tmp_path / "qvl"))
    _run(library, "model", blob("tiny-vl-gptq", bits=4, vision_bits=8, head_bits=16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"driver": 11040}, "the NVIDIA driver supports CUDA 11.4 and 12.0 is needed"),
        ({"capability": 61}, "Fake GPU has compute capability 6.1 and 7.5 (Turing, 2018) is the oldest supported"),
        ({"init": 100}, "no usable NVIDIA GPU"),
        ({"devices": 0}, "no NVIDIA GPU found"),
        ({"context": 2}, "Fake GPU cannot be used"),
        ({"stream": 2}, "Fake GPU cannot be used"),
    ],
)
def test_what_is_not_usable_is_said_in_one_line(library, settings, message):
    said = _run(library, "refused", **settings)
    assert message in said
    assert f"qvl: no usable GPU ({message}" in said


def test_a_gpu_without_memory_left_is_passed_over(library, tmp_path, monkeypatch):
    CpuOps(threads=1)
    before = cache_folder.find().path
    monkeypatch.setenv("QVL_CACHE_DIR", str(tmp_path / "qvl"))
    _bundle(tmp_path)
    for code in before.glob("cpu-kernels-*.bin") if before else ():  # compiling them again would take a minute
        shutil.copy(code, tmp_path / "qvl")
    assert "running on the CPU" in _run(library, "full", memory=1000)


def test_another_librarys_context_does_not_matter(library):
    _run(library, "foreign")


def test_a_forked_child_is_told_to_load_the_model(library):
    _run(library, "forked")


def test_a_missing_entry_point_is_said_in_one_line(library):
    _run(library, "lacking", without="cuMemHostAlloc")


def test_a_fault_is_told_once_and_not_by_the_collector(library):
    assert _run(library, "faulty", fault=700) == "done\n"


def test_memory_is_not_freed_during_a_capture(library):
    _run(library, "collected")


def test_no_driver_at_all_is_said_in_one_line():
    if not gpu.absent():
        pytest.skip("this machine has a driver")
    assert "no NVIDIA driver found" in _run("", "refused")
