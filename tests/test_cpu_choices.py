"""Block sizes follow from the machine's caches, the prefetch distance from a measurement; no result follows either."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

import qvl_runtime as qvl
from qvl_kernels import cache_folder
from qvl_kernels.cpu import CpuOps, batched, bundle, cache, cache_sizes, choices, features, tiles, tuning
from qvl_kernels.cpu.choices import AHEAD, Choices
from qvl_kernels.ops import DeviceError
from qvl_kernels.packing import pack
from qvl_runtime import backends
from qvl_runtime.benchmark import Speeds
from qvl_runtime.cli.bench import _table

USUAL = choices.built_in().ahead
OTHER = 4096


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache folder, after the kernels were loaded from the usual one."""
    for part in bundle.KNOWN:
        cache.prepare(part)
    monkeypatch.delenv("QVL_TUNE", raising=False)
    monkeypatch.setenv("QVL_CACHE_DIR", str(tmp_path / "kept"))
    yield tmp_path / "kept"
    cache_folder._find.cache_clear()


# ------------------------------------------------------------------------------------------------ sizes of caches
def _level2(root, monkeypatch, number: int = 2, **files: str | bytes) -> int:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 5, 6, 7}, raising=False)
    monkeypatch.setattr(cache_sizes.sys, "platform", "linux")
    for name, content in {"level": str(number), "type": "Unified", "shared_cpu_list": "4", **files}.items():
        path = root / "cpu4" / "cache" / f"index{number}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return cache_sizes.level2(root)


@pytest.mark.parametrize(("files", "want"), [
    ({"size": "1024K\n"}, 1024),
    ({"size": "2048K", "shared_cpu_list": "4-5"}, 1024),
    ({"size": "4096K", "shared_cpu_list": "0-7"}, 1024),  # of which four are this process's
    ({"size": "128K"}, 256),
    ({"size": "9999999K"}, 2048),
    ({"size": "1024K", "type": "Instruction"}, 512),
    ({"size": "1024K", "level": "3"}, 512),
    ({"size": "0K"}, 512),
    ({"size": "-1K"}, 512),
    ({"size": "1" * 5000 + "K"}, 512),
    ({"size": "x"}, 512),
    ({"size": b"\xff\xfe"}, 512),
    ({"size": "1024K", "shared_cpu_list": "0-99999999999"}, 512),
    ({"size": "1024K", "shared_cpu_list": "4,x"}, 512),
    ({"size": "1024K", "shared_cpu_list": ""}, 1024),
    ({}, 512),
])  # fmt: skip
def test_level_2_of_linux(files, want, tmp_path, monkeypatch):
    assert _level2(tmp_path, monkeypatch, **files) == want << 10


def test_other_systems(tmp_path, monkeypatch):
    known = {"hw.perflevel0.l2cachesize": 12 << 20, "hw.perflevel0.cpusperl2": 6}
    cache_sizes.level2.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(cache_sizes.sys, "platform", "darwin")
        patch.setattr(cache_sizes, "_number_of_macos", lambda name: known.get(name, 0))
        assert cache_sizes.level2(tmp_path / "a") == 2 << 20
        known.clear()  # an Intel Mac
        assert cache_sizes.level2(tmp_path / "b") == 512 << 10
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # Windows
    assert (cache_sizes.level2(tmp_path / "c"), cache_sizes.level3(tmp_path / "c")) == (512 << 10, 32 << 20)


def test_parts_fit_the_cache_and_serve_all_threads(monkeypatch):
    fitting = {}
    for size in (256 << 10, 512 << 10, 2 << 20):
        monkeypatch.setattr(cache_sizes, "level2", lambda size=size: size)
        for rows, n, k, bits in ((17, 32, 128, 4), (1024, 4096, 4096, 4), (1024, 1152, 4304, 8), (5000, 64, 100, 4)):
            value = 2 if bits == 8 and features.selected().words else 1
            parts = batched.row_parts(rows, n, k, bits, 1)
            largest = math.ceil(math.ceil(rows / tiles.TOKENS) / parts)
            assert 1 <= largest <= tiles.HELD_TILES
            a_tile = min(-(-k // 128) * 128, tiles.PIECE) * tiles.TOKENS * value
            assert largest * a_tile <= size - tiles.unpacked_bytes(bits)
            fitting[size, rows, n] = parts
    assert fitting[256 << 10, 1024, 4096] > fitting[512 << 10, 1024, 4096] > fitting[2 << 20, 1024, 4096] == 2
    assert batched.row_parts(1024, 1152, 4096, 4, 16) == 4 and batched.row_parts(64, 1152, 4096, 4, 16) == 1


# ------------------------------------------------------------------------------------------------ the measurement
def _times(seed: int = 0, rounds: int = 15, **shares: float) -> dict[int, np.ndarray]:
    """Times by distance, noisy; the median of `a4096` is that share of the built-in one's, for example."""
    noise = np.random.default_rng(seed).normal(1, 0.02, (len(AHEAD), rounds))
    return {ahead: noise[i] * shares.get(f"a{ahead}", 1.1 if ahead != USUAL else 1) for i, ahead in enumerate(AHEAD)}


def test_only_a_clear_winner_replaces_the_built_in_choice():
    assert tuning.choose(_times(a4096=0.9)).ahead == 4096
    assert tuning.choose(_times(a4096=0.9, a1024=0.8)).ahead == 1024
    for share, want in ((0.98, USUAL), (0.96, 4096)):
        assert tuning.choose({ahead: np.full(9, share if ahead == 4096 else 1) for ahead in AHEAD}).ahead == want
    assert tuning.choose(_times(a4096=0.5, rounds=4)) is None
    disturbed = _times(a4096=0.9)
    disturbed[4096][:6] *= 3  # faster in most rounds, but not in three of four
    assert tuning.choose(disturbed).ahead == USUAL
    found = tuning.choose(_times(a4096=0.9))
    assert found.times[USUAL] == 1 and found.times[4096] == pytest.approx(0.9, abs=0.02)


def test_measurement_ends_in_time_and_leaves_the_choice(monkeypatch):
    monkeypatch.setattr(tuning, "SIZE", 256)
    monkeypatch.setattr(cache_sizes, "level3", lambda: 64 << 10)
    monkeypatch.setattr(tuning, "SECONDS", 600)
    monkeypatch.setattr(tuning, "MOST", 3)
    ops = CpuOps(threads=2)
    before = ops.choices
    found = tuning.measure(ops)
    assert list(found) == list(AHEAD) and {len(times) for times in found.values()} == {3}
    assert all((times > 0).all() for times in found.values()) and ops.choices is before
    monkeypatch.setattr(tuning, "SECONDS", 0)
    assert {len(times) for times in tuning.measure(ops).values()} == {0}


@pytest.fixture
def measured(monkeypatch):
    """A list with an entry for each measurement, in which `OTHER` is fastest."""
    calls: list[CpuOps] = []

    def measure(ops: CpuOps) -> dict[int, np.ndarray]:
        calls.append(ops)
        return _times(**{f"a{OTHER}": 0.8})

    monkeypatch.setattr(tuning, "measure", measure)
    return calls


def _file(folder):
    (found,) = folder.glob("cpu-choices-*")
    return found


def test_measured_once(folder, measured):
    ops = CpuOps(threads=1)
    assert ops.choices == choices.built_in()
    for _ in range(2):
        tuning.tune_once(ops)
        assert ops.choices.ahead == CpuOps(threads=1).choices.ahead == OTHER and len(measured) == 1
    assert _file(folder).stat().st_mode & 0o777 == 0o600 or os.name == "nt"
    assert CpuOps(threads=1).choices == ops.choices


def test_off(folder, measured, monkeypatch):
    tuning.tune_once(CpuOps(threads=1))
    monkeypatch.setenv("QVL_TUNE", "0")
    ops = CpuOps(threads=1)
    _file(folder).unlink()
    tuning.tune_once(ops)
    assert ops.choices == choices.built_in() and len(measured) == 1 and not list(folder.iterdir())
    monkeypatch.setenv("QVL_TUNE", "off")
    with pytest.raises(DeviceError, match="QVL_TUNE=off: expected 0 or 1"):
        CpuOps(threads=1)


def test_not_measured_at_every_start(measured, monkeypatch):
    """Without a folder nothing could be kept."""
    monkeypatch.setenv("QVL_CACHE_DIR", "/dev/null/qvl")
    ops = CpuOps(threads=1)
    tuning.tune_once(ops)
    assert ops.choices == choices.built_in() and not measured


def test_a_busy_machine_is_measured_later(folder, monkeypatch):
    monkeypatch.setattr(tuning, "measure", lambda ops: _times(a4096=0.5, rounds=4))
    ops = CpuOps(threads=1)
    tuning.tune_once(ops)
    assert ops.choices == choices.built_in() and not list(folder.iterdir())


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff", b"[" * 4000, b"7" * 5000, {"ahead": 7}, {"ahead": False}, {"ahead": 2048.0},
    {"ahead": [0]}, {"ahead": None}, {"times": None}, {"times": {"x": 1}}, {"times": {"0": "x"}},
    {"key": "of other kernels"},
    {"more": "x" * 5000}, "others may write",
])  # fmt: skip
def test_damaged_or_foreign_file_is_measured_again(content, folder, measured):
    tuning.tune_once(CpuOps(threads=1))
    path = _file(folder)
    whole = path.read_bytes()
    if content == "others may write":
        path.chmod(0o666)
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(json.loads(whole) | content).encode())
    assert choices.kept() is None
    tuning.tune_once(CpuOps(threads=1))
    assert len(measured) == 2 and path.read_bytes() == whole and choices.kept() is not None


def test_only_large_files_are_measured_for(demo_model, measured, monkeypatch):
    path = demo_model.blob.path
    assert qvl.load(path, device="cpu").ops.choices == choices.built_in() and not measured
    monkeypatch.setattr(backends, "TUNED_BYTES", 1)
    assert qvl.load(path, device="reference").ops.name == "reference" and not measured
    assert qvl.load(path, device="cpu").ops.choices.ahead == OTHER and len(measured) == 1


def test_bench_reports_the_choice(capsys):
    from rich.console import Console

    def shown(file: str = "a", **chosen) -> str:
        speeds = Speeds(None, 1, 1, 1, None, None, None, None, None, **chosen)
        conditions = {"file": file, "device": "cpu", "threads": 2, "prompt_tokens": 1, "new_tokens": 1}
        Console(width=200).print(_table(speeds, conditions))
        return capsys.readouterr().out

    assert "prefetch" not in shown()
    assert shown("a[bold]\x1b[2J.qvl").startswith("a[bold]\ufffd[2J.qvl on cpu")
    assert "512 KiB" in (text := shown(level2=512 << 10, ahead=2048)) and "2048 bytes (not measured)" in text
    text = shown(level2=512 << 10, ahead=1024, ahead_times={0: 1.2, 1024: 0.8, 2048: 1.0})
    assert "1024 bytes (0: 1.50, 2048: 1.25 of its time)" in text


# ------------------------------------------------------------------------------------------------ what kernels get
def test_instructions_carry_the_choices(monkeypatch):
    ops = CpuOps(threads=1, activations="int8")
    monkeypatch.setattr(batched, "row_parts", lambda *_: 77)
    ops.choices = Choices(1024)
    w = ops.weight(pack(np.ones((32, 128), np.uint8), np.ones((32, 1)), 4, 128))
    for rows, number, want in ((1, -1, 1024), (3, -1, 1024), (40, -4, 77)):
        x, out = np.ones((rows, 128), np.float32), np.empty((rows, 32), np.float32)
        replay = ops.capture(lambda x=x, out=out: ops.linear(x, w, out=out))
        assert replay.program._rows[-1][number] == want
