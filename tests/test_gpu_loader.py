"""The choice of compiled kernels and of the GPU, and the errors without them."""

from __future__ import annotations

import importlib.metadata
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from fakes.gpu import FakeDriver

from qvl_kernels import gpu
from qvl_kernels.gpu import build, loader
from qvl_kernels.gpu import driver as gpu_driver
from qvl_kernels.gpu.bundle import Bundle
from qvl_kernels.gpu.launcher import Image
from qvl_kernels.gpu.ops import CudaOps
from qvl_kernels.ops import DeviceError

# choosing the kernels


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        ((7, 5), (75, "cubin")),
        ((8, 0), (80, "cubin")),
        ((8, 6), (80, "cubin")),
        ((8, 7), (80, "ptx")),
        ((8, 9), (80, "cubin")),
        ((9, 0), (90, "cubin")),
        ((10, 0), (80, "ptx")),
        ((12, 0), (120, "cubin")),
        ((12, 1), (80, "ptx")),
    ],
)
def test_code_is_chosen_by_compute_capability(capability, chosen):
    assert loader.choose(capability) == chosen


def _bundle(path: Path, sources: str, names=("add.any",)) -> None:
    entry = {"symbol": "add", "warps": 4, "shared": 8, "constants": {"A": 1}, "cubin": "a.cubin", "ptx": "a.ptx"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as bundle:
        bundle.writestr("a.cubin", b"code")
        bundle.writestr("a.ptx", b"text")
        kernels = {name: {"80": entry} for name in names}
        bundle.writestr("manifest.json", json.dumps({"triton": "3.6.0", "sources": sources, "kernels": kernels}))


def test_kernels_come_from_the_package_or_the_cache_or_the_compiler(tmp_path, monkeypatch, caplog):
    built = []

    def compile_all(path, architectures, progress):
        built.append(architectures)
        _bundle(path, build.source_hash())
        return path

    monkeypatch.setattr(build, "build", compile_all)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: build.TRITON_VERSION)
    monkeypatch.setattr(loader, "BUNDLE", tmp_path / "kernels.zip")
    monkeypatch.setenv("QVL_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        bundle = loader.find((8, 6))
        assert bundle["add.any"] == Image(b"code", "cubin", "add", 4, 8, {"A": 1})
    assert built == [[80]], "compiled once"
    assert [message.split(",")[0] for message in caplog.messages] == ["qvl: compiling the GPU kernels for sm_80"]
    assert loader.find((10, 0))["add.any"].code == b"text" and loader.find((10, 0)).architecture == 80

    _bundle(loader.BUNDLE, build.source_hash())
    assert loader.find((8, 6)).path == loader.BUNDLE
    _bundle(loader.BUNDLE, "of other sources")
    assert loader.find((8, 6)).path != loader.BUNDLE
    loader.BUNDLE.write_bytes(b"nonsense")
    with pytest.raises(DeviceError, match="is no bundle of GPU kernels"):
        loader.find((8, 6))


def test_a_damaged_bundle_is_an_error_of_one_kind(tmp_path):
    """Whichever byte is wrong: `locate` passes over a bundle of the cache folder for this error alone."""
    path = tmp_path / "kernels.zip"
    _bundle(path, "sources")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "small.zip", "w", zipfile.ZIP_DEFLATED) as small:
        small.writestr("manifest.json", whole.read("manifest.json"))
    good = (tmp_path / "small.zip").read_bytes()
    for manifest in ("[]", '"x"', '{"sources": "", "kernels": []}', '{"sources": "", "kernels": {"add.any": 3}}'):
        with zipfile.ZipFile(path, "w") as bundle:
            bundle.writestr("manifest.json", manifest)
        with pytest.raises(DeviceError, match="is no bundle of GPU kernels"):
            Bundle(path, 80, "cubin", io.BytesIO(path.read_bytes()))
    refused = 0
    for i, byte in enumerate(good):
        for wrong in (byte ^ 1, byte ^ 255):
            try:
                Bundle(path, 80, "cubin", io.BytesIO(good[:i] + bytes([wrong]) + good[i + 1 :]))
            except DeviceError:
                refused += 1
    assert refused > len(good)


def test_no_kernels_and_no_compiler_is_said_in_one_line(tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(loader, "BUNDLE", tmp_path / "kernels.zip")
    monkeypatch.setenv("QVL_CACHE_DIR", str(tmp_path / "cache"))
    for version, message in ((absent, "no Triton is installed"), (lambda name: "3.9", "Triton 3.9 is installed")):
        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(DeviceError, match=f"without compiled GPU kernels, and {message}.*pip install triton=="):
            loader.find((9, 0))
        monkeypatch.setattr(gpu_driver, "Driver", FakeDriver)
        usable, reason = gpu.available()
        assert not usable and message in reason
    _bundle(loader.BUNDLE, build.source_hash())
    assert gpu.available() == (True, "Fake GPU")


def test_info_says_what_would_be_used(blob, tmp_path, monkeypatch, capsys):
    from qvl_runtime.cli.info import info

    monkeypatch.setattr(gpu_driver, "Driver", FakeDriver)
    monkeypatch.setattr(loader, "BUNDLE", tmp_path / "kernels.zip")
    monkeypatch.setenv("QVL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: build.TRITON_VERSION)
    path = blob("tiny-vl", bits=4)
    info(path, device="cuda")
    said = capsys.readouterr().out
    assert "Fake GPU, compute capability 8.0, driver for CUDA 12.8" in said
    assert "GPU kernels  sm_80, to be compiled when first used" in said
    _bundle(loader.BUNDLE, build.source_hash())
    info(path, device="cuda", as_json=True)
    assert json.loads(capsys.readouterr().out)["device"]["kernels"] == f"sm_80, from {loader.BUNDLE}"
    monkeypatch.setattr(loader, "BUNDLE", tmp_path / "none.zip")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.9")
    with pytest.raises(DeviceError, match="pip install triton=="):
        info(path, device="cuda")


# choosing the device


def test_missing_packages_are_named_with_the_command_that_brings_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    usable, reason = gpu.available()
    assert not usable and reason.startswith("the GPU packages are not installed (")
    assert reason.endswith("pip install 'qvl-runtime[gpu]'")


def test_names_of_the_package():
    assert gpu.CudaOps is CudaOps
    with pytest.raises(AttributeError):
        _ = gpu.nothing
