"""Specifics of the CPU backend: instruction sets, the cache of compiled kernels, threads, bad arguments."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_ops import matrix, random

from qvl_kernels.cpu import CpuOps, bundle, cache, features, runner
from qvl_kernels.ops import DeviceError, Norm
from qvl_kernels.packing import Matrix, packed_shapes
from qvl_runtime.loading import load

TESTS = Path(__file__).parent
CHECK = """
import sys
import test_ops
from qvl_kernels.cpu import CpuOps
ops = CpuOps(activations="int16", threads=2)
bad = []
for index in range(0, len(test_ops.CASES), 9):
    found, allowed = test_ops.error(ops, index)
    if not found <= allowed:
        bad.append(f"{test_ops.CASES[index].label}: {found:.2g}")
print("numba" in sys.modules, *bad, sep="\\n")
"""


def start(level: str, **environment: str) -> subprocess.Popen:
    variables = {**os.environ, "QVL_CPU": level, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", CHECK], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[list[str], str]:
    out, err = process.communicate(timeout=570)
    assert process.returncode == 0, err
    return out.split("\n")[:-1], err


def has(level: str) -> bool:
    return features.host_features().issuperset(features.LEVELS[level].needs)


@pytest.fixture(scope="module")
def first_starts(tmp_path_factory):
    """Two processes start at once on the level "plain" with an empty cache: its folder, and what each printed."""
    folder = tmp_path_factory.mktemp("first")
    return folder, [finish(one) for one in [start("plain", QVL_CACHE_DIR=str(folder)) for _ in range(2)]]


def test_two_first_starts_and_a_second_one(first_starts):
    """One of the two compiles each part, the other waits for it; the third finds the kernels. None imports Numba."""
    if bundle.shipped("plain"):
        pytest.skip("this checkout has compiled kernels")
    folder, first = first_starts
    assert [lines for lines, _ in first] == [["False"], ["False"]]
    said = [line for _, err in first for line in err.splitlines()]
    compiling = [line for line in said if line.startswith("qvl: compiling the ")]
    assert set(said) - set(compiling) <= {"qvl: waiting for another process that is compiling kernels"}
    lines, err = finish(start("plain", QVL_CACHE_DIR=str(folder)))
    assert lines == ["False"] and err == ""
    kept = sorted(folder.iterdir())
    # no product of these is large
    assert [path.name.rpartition("-")[2] for path in kept] == ["common.bin", "rare.bin"] and len(compiling) == 2
    assert all(path.name.startswith("cpu-kernels-") and path.stat().st_mode & 0o777 == 0o600 for path in kept)


@pytest.mark.parametrize("level", [level for level in features.LEVELS if level not in ("i8mm", "neon")])
def test_every_operation_on_a_forced_level(level, request):
    """The table of operations, and products and attention of many rows, each kind and shape once."""
    if not has(level) or features.selected().name == level:
        pytest.skip(f"{level} is not there, or is what all other tests run on")
    environment = {**os.environ, "QVL_CPU": level}
    if level == "plain":
        environment["QVL_CACHE_DIR"] = str(request.getfixturevalue("first_starts")[0])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    files = [str(TESTS / name) for name in ("test_ops.py", "test_cpu_gemm.py")]
    chosen = "not 1-thread and not 3-threads and not larger_than_caches"
    done = subprocess.run([*command, *files, "-k", chosen], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_first_answer_of_a_small_model_needs_the_common_kernels_only(blob, rng, monkeypatch):
    names, address = set(), cache.address
    monkeypatch.setattr(cache, "address", lambda name: names.add(name) or address(name))
    picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
    model = load(blob("tiny-vl-bin"), "cpu")
    model.generate([{"image": picture}, {"text": "What is this?"}], max_new_tokens=4, min_new_tokens=4)
    assert len(names) > 10 and {bundle.part_of(name) for name in names} == {"common"}


def test_kernels_of_many_rows_are_loaded_with_the_first_large_weight(monkeypatch):
    parts, ops = [], CpuOps(threads=1)
    monkeypatch.setattr(cache, "prepare", parts.append)
    for n, expected in ((1000, []), (1024, ["large"])):
        ops.weight(Matrix(n, 1024, 4, 128, *(np.zeros(*array) for array in packed_shapes(n, 1024, 4).values())))
        assert parts == expected


def test_every_kernel_is_in_the_part_that_it_is_known_by():
    assert {part: bundle.part_of(name) for part, name in bundle.KNOWN.items()} == {part: part for part in bundle.PARTS}


ARM = """
import re
import sys
import llvmlite.binding as llvm
from qvl_kernels.cpu import build, features
level = features.LEVELS[sys.argv[1]]
features.compile_for(sys.argv[1])
features.target = lambda: ("", "")
build.prepare()
from qvl_kernels.cpu.registry import KERNELS
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
machine = target.create_target_machine(cpu=level.cpu, features=level.features, opt=3)
for name in ("gemv4_128", "gemv8_128", "gemm4", "gemm8", "attention_int8_128"):
    _, text = build._library(KERNELS[name])
    text = re.sub(r'target (triple|datalayout) = ".*"', "", text)
    module = llvm.parse_assembly(text)
    module.triple = "aarch64-unknown-linux-gnu"
    print(name, *(len(re.findall(rf"\\b{product}\\b", machine.emit_assembly(module))) for product in sys.argv[2:]))
"""


OTHER = """
import sys
from qvl_kernels.cpu import build, features
features.compile_for(sys.argv[1])
build.prepare()
level = features.LEVELS[sys.argv[1]]
modules = [sys.modules[f"qvl_kernels.cpu.{name}"] for name in ("gemm_pack", "gemm_tile", "gemv", "gemv_planes")]
value_bytes = sys.modules["qvl_kernels.cpu.tiles"].value_bytes
unpacks = sys.modules["qvl_kernels.cpu.gemm"].UNPACKS
print({module.WORDS for module in modules} == {level.words} == {value_bytes(8) == 2}, unpacks == level.unpacks)
"""


@pytest.mark.parametrize("level", ["avx512", "avx2"])
def test_kernels_for_another_level_do_not_take_after_this_one(level):
    """What ships is compiled on one machine for all: here at least one of the two is another one's."""
    command = [sys.executable, "-c", OTHER, level]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout == "True True\n"


@pytest.mark.parametrize("level", ["neon", "i8mm"])
def test_arm_assembly_has_the_products_of_bytes(level):
    done = subprocess.run(
        [sys.executable, "-c", ARM, level, "sdot", "smmla"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {
        name: tuple(int(count) >= 8 for count in counts) for name, *counts in map(str.split, done.stdout.splitlines())
    }
    many = (False, True) if level == "i8mm" else (True, False)
    assert found == {
        "gemv4_128": (True, False),
        "gemv8_128": (True, False),
        "gemm4": many,
        "gemm8": many,
        "attention_int8_128": (True, False),
    }


@pytest.mark.parametrize("words, level", [({}, "plain"), ({16: 1 << 20}, "neon"), ({16: 1 << 20, 26: 1 << 13}, "i8mm")])
def test_levels_of_arm_processors(monkeypatch, words, level):
    class Library:
        @staticmethod
        def getauxval(index):
            return words.get(index.value, 0) | 1

    monkeypatch.delenv("QVL_CPU", raising=False)
    monkeypatch.setattr(features.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(features.platform, "system", lambda: "Linux")
    monkeypatch.setattr(features.ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(features.llvm, "get_host_cpu_features", dict)
    monkeypatch.setattr(features, "host_features", features.host_features.__wrapped__)
    assert features.selected.__wrapped__().name == level


def test_key_depends_on_processor_and_parts(monkeypatch):
    before = cache.key()
    assert before == cache.key()
    with monkeypatch.context() as patch:
        patch.setattr(features, "target", lambda: ("another", "+processor"))
        assert cache.key() != before
    monkeypatch.setitem(bundle.PARTS, "rare", re.compile("nothing"))
    assert cache.key() != before


def test_unknown_or_missing_instruction_set(monkeypatch):
    for name, message in (("sse9", "expected one of"), ("neon", "lacks dotprod, neon"), ("avx512", "lacks")):
        monkeypatch.setenv("QVL_CPU", name)
        monkeypatch.setattr(features, "host_features", lambda: frozenset({"sse2"}))
        with pytest.raises(DeviceError, match=message):
            features.selected.__wrapped__()


def test_thread_count(monkeypatch):
    monkeypatch.delenv("QVL_THREADS", raising=False)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    assert runner.default_threads() == 3
    monkeypatch.setenv("QVL_THREADS", "5")
    assert runner.default_threads() == 5
    for wrong in ("0", "257", "abc", "-1", "²", " 2"):
        monkeypatch.setenv("QVL_THREADS", wrong)
        with pytest.raises(DeviceError, match=f"QVL_THREADS={wrong}: expected a number from 1 to 256"):
            runner.default_threads()


@pytest.fixture(scope="module")
def ops():
    return CpuOps(activations="int16", threads=2)


# ------------------------------------------------------------------------------------------------ bad arguments
def bad_calls(ops):
    f32 = np.float32
    rng = random("bad")
    w, x, out = ops.weight(matrix(rng, 64, 128, 4)), np.zeros((2, 128), f32), np.zeros((2, 64), f32)
    norm, kv = Norm(np.ones(128, f32), None, 1e-6), ops.kv_cache(2, 2, 8, 32, "fp16")
    qkv, rope, logn = np.zeros((2, 48), f32), np.zeros((32, 8), f32), np.zeros(32, f32)
    mixed, start = np.zeros((2, 16), f32), np.zeros(1, np.int32)
    packed = matrix(rng, 64, 128, 4)
    return {
        "columns": lambda: ops.linear(x[:, :64].copy(), w, out=out),
        "rows": lambda: ops.linear(x, w, out=out[:1]),
        "dtype": lambda: ops.linear(x.astype(np.float64), w, out=out),
        "strides": lambda: ops.linear(np.zeros((2, 256), f32)[:, ::2], w, out=out),
        "not an array": lambda: ops.linear([[0.0] * 128] * 2, w, out=out),
        "residual": lambda: ops.linear(x, w, out=out, residual=out[:1]),
        "norm": lambda: ops.linear(x, w, out=out, norm=Norm(np.ones(64, f32), None, 1e-6)),
        "gate and up": lambda: ops.gate_up(x, w, ops.weight(matrix(rng, 32, 128, 4)), out=out, norm=norm),
        "scales": lambda: ops.weight(Matrix(64, 128, 4, 128, packed.weight, packed.scales[:1])),
        "no scales": lambda: ops.weight(Matrix(64, 128, 4, 128, packed.weight)),
        "weight": lambda: ops.weight(Matrix(96, 128, 4, 128, packed.weight, packed.scales)),
        "perm": lambda: ops.weight(Matrix(64, 128, 16, 128, np.zeros((64, 128), np.float16), perm=np.zeros(128, "i4"))),
        "ids": lambda: ops.embed(np.zeros(2, np.int64), w, out=x),
        "copy": lambda: ops.copy(x, out),
        "copy of integers": lambda: ops.copy(start, start.copy()),
        "copy of integers to numbers": lambda: ops.copy(start, start.astype(np.float32)),
        "heads": lambda: ops.vision_attention(np.zeros((3, 50), f32), 2, out=np.zeros((3, 16), f32)),
        "keys": lambda: ops.cross_attention(mixed, mixed, mixed[:1], 2, out=mixed.copy()),
        "cache dtype": lambda: ops.kv_cache(2, 2, 8, 32, "int4"),
        "layer": lambda: ops.cached_attention(qkv, kv, 2, start, out=mixed),
        "full": lambda: ops.rope_append(qkv, rope=rope, logn=logn, cache=kv, layer=0, start=np.array([31], np.int32)),
        "start": lambda: ops.rope_append(qkv, rope=rope, logn=logn, cache=kv, layer=0, start=np.zeros(1, np.int64)),
        "rope": lambda: ops.rope_append(qkv, rope=rope[:8], logn=logn, cache=kv, layer=0, start=start),
        "resized": lambda: kv.resized(8, 9),
        "argmax": lambda: ops.argmax(out, out=np.zeros(3, np.int32)),
        "activations": lambda: CpuOps(activations="int4"),
    }


@pytest.mark.parametrize("name", bad_calls(CpuOps()))
def test_bad_arguments_are_refused(ops, name):
    with pytest.raises(ValueError):
        bad_calls(ops)[name]()


def test_int8_keys_and_values_near_zero_keep_their_signs():
    """Their scale is subnormal in fp16, and may be rounded to half of what it should be."""
    ops, d, tops = CpuOps(), 16, np.geomspace(1e-5, 2e-3, 208, dtype=np.float32)
    rng = np.random.default_rng(5)
    cache, qkv = ops.kv_cache(1, 1, d, len(tops), "int8"), rng.standard_normal((len(tops), 3, d)).astype(np.float32)
    qkv *= tops[:, None, None] / np.abs(qkv).max(axis=2, keepdims=True)
    want = qkv[:, 1:].copy()
    rope = np.repeat(np.float32([[1, 0]]), d // 2, axis=1).repeat(len(tops), 0)  # no rotation
    rows = qkv.reshape(len(tops), 3 * d)
    ops.rope_append(rows, rope=rope, logn=None, cache=cache, layer=0, start=np.zeros(1, np.int32))
    stored = cache.keys.view(np.uint8).reshape(-1, d // 4, 16, 4).transpose(0, 2, 1, 3)
    keys = stored.reshape(len(tops), d).astype(np.int32) - 128
    for found, vectors in ((keys, want[:, 0]), (cache.values.reshape(len(tops), d).astype(np.int32), want[:, 1])):
        large = np.abs(vectors) > 0.6 * tops[:, None]
        assert np.array_equal(np.sign(found)[large], np.sign(vectors)[large])


def test_the_hash_of_the_sources_covers_what_is_compiled_in(monkeypatch, tmp_path):
    other = tmp_path / "packing.py"
    other.write_text("SYMMETRIC_ZERO = {}")
    monkeypatch.setattr(bundle.packing, "__file__", str(other))
    assert bundle.source_hash.__wrapped__() != bundle.source_hash()
