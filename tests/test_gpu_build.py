"""Every GPU kernel compiles for every architecture, within its shared memory and without spills; and the bundle."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
from fakes.compiled import compiled

from qvl_kernels.gpu import build, signatures, turing
from qvl_kernels.gpu.build import compile_kernel, source_hash

TRITON = importlib.util.find_spec("triton")
if TRITON is None:
    pytest.skip("triton is not installed", allow_module_level=True)

SHARED_LIMIT = {75: 64 << 10, 80: 99 << 10, 90: 227 << 10, 120: 99 << 10}
"""What a block may use (CUDA C programming guide, technical specifications). Code for 80 runs on 86 and 89, too."""

BUNDLE_LIMIT = 6e6


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    """The whole bundle, of kernels that other tests compile or have compiled, too."""
    path = tmp_path_factory.mktemp("gpu") / "kernels.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "compile_kernel", compiled)
        assert build.main([str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def manifest(bundle):
    with zipfile.ZipFile(bundle) as archive:
        return json.loads(archive.read("manifest.json"))


@pytest.fixture(scope="session")
def resources(bundle, tmp_path_factory):
    """``{architecture: {kernel: {"REG": …, "STACK": …, "SHARED": …, "LOCAL": …}}}`` as the compiler reports them."""
    folder = tmp_path_factory.mktemp("cubins")
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(folder)
    dump = Path(TRITON.origin).parent / "backends/nvidia/bin/cuobjdump"
    found: dict[int, dict[str, dict[str, int]]] = {}
    for cubin in sorted(folder.glob("sm_*/*.cubin")):
        report = subprocess.run([dump, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
        found.setdefault(int(cubin.parent.name.removeprefix("sm_")), {})[cubin.stem] = usage
    return found


@pytest.mark.parametrize("architecture", signatures.ARCHITECTURES)
def test_every_kernel_fits(architecture, manifest, resources):
    assert set(resources[architecture]) == set(signatures.names(architecture))
    for name, usage in resources[architecture].items():
        shared = manifest["kernels"][name][str(architecture)]["shared"] + usage["SHARED"]
        assert shared <= SHARED_LIMIT[architecture], f"{name}: {shared} bytes of shared memory"
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"


@pytest.mark.parametrize("architecture", signatures.ARCHITECTURES)
def test_products_use_the_tensor_cores(architecture, bundle, tmp_path):
    """Triton silently replaces them with ordinary multiplications where it cannot use them."""
    for name in ("linear.int4.rows16", "linear.int8.rows64", "linear.int4.rows32", "attention.104"):
        assert re.search(r"\b(HMMA|HGMMA|QGMMA)\b", _instructions(bundle, name, architecture, tmp_path)), name


def test_products_on_hopper_do_not_wait_for_each_other(bundle, tmp_path):
    """The compiler may let each wait for the one before it, which takes a tenth longer; it only prints a remark."""
    for name in signatures.names(90, "linear"):
        code = _instructions(bundle, name, 90, tmp_path)
        products, waits = code.count("HGMMA"), code.count("WARPGROUP.DEPBAR")
        assert waits <= products // 2, f"{name}: {waits} waits for {products} products"


def _instructions(bundle, name, architecture, folder):
    disassembler = Path(TRITON.origin).parent / "backends/nvidia/bin/nvdisasm"
    with zipfile.ZipFile(bundle) as archive:
        cubin = archive.extract(f"sm_{architecture}/{name}.cubin", folder)
    return subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout


def test_the_bundle_says_what_it_holds(bundle, manifest):
    assert bundle.stat().st_size < BUNDLE_LIMIT
    assert manifest["sources"] == source_hash()
    with zipfile.ZipFile(bundle) as archive:
        held = set(archive.namelist())
        for name, entries in manifest["kernels"].items():
            for architecture, entry in entries.items():
                assert entry["cubin"] in held
                assert archive.read(entry["cubin"])[:4] == b"\x7fELF"
                assert ("ptx" in entry) == (architecture in ("75", "80"))
                assert entry["constants"] == signatures.constants(name, int(architecture))
        ptx = archive.read(manifest["kernels"]["linear.int4.rows16"]["80"]["ptx"]).decode()
    assert ".version 7.5" in ptx and ".target sm_80" in ptx


def test_a_launch_takes_the_listed_arguments_and_two_null_pointers(bundle, manifest):
    """The order of arguments is the launcher's contract with the compiler: read it in the code itself."""
    widths = {"i32": "u32", "fp32": "f32"}
    with zipfile.ZipFile(bundle) as archive:
        for name in signatures.names(80):
            ptx = archive.read(manifest["kernels"][name]["80"]["ptx"]).decode()
            header = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
            found = re.findall(r"\.param \.(\w+)", header)
            expected = [widths.get(kind, "u64") for kind in signatures.types(name).values()]
            assert [t.replace("b32", "u32") for t in found] == [*expected, "u64", "u64"], name


def test_a_signature_in_another_order_is_refused(monkeypatch):
    """Arguments are passed by position: an exchange of two would go unnoticed."""
    kernel = signatures.KERNELS["add"]
    first, second, *rest = kernel.arguments
    swapped = dataclasses.replace(kernel, arguments=(second, first, *rest))
    monkeypatch.setitem(signatures.KERNELS, "add", swapped)
    with pytest.raises(TypeError, match="takes"):
        compile_kernel("add.any", 80)


def test_a_turing_product_is_two_halves():
    whole = (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{ %f5, %f6, %f7, %f8 }, { %r1, %r2, %r3, %r4 }, { %r5, %r6 }, { %f1, %f2, %f3, %f4 };"
    )
    first, second = turing.split_mma(whole).split(";")[:2]
    assert "{ %f5, %f6, %f7, %f8 }, { %r1, %r2 }, { %r5 }, { %f1, %f2, %f3, %f4 }" in first
    assert "{ %f5, %f6, %f7, %f8 }, { %r3, %r4 }, { %r6 }, { %f5, %f6, %f7, %f8 }" in second
    assert "m16n8k16" not in first + second
