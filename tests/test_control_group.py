"""The limits of a container, as both versions of Linux' control groups show them."""

from __future__ import annotations

import pytest

from qvl_kernels.control_group import available_memory, processor_limit
from qvl_runtime import backends


@pytest.fixture
def groups(tmp_path):
    """Write files of control groups, and return what `processor_limit` and `available_memory` take."""

    def write(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "own", tmp_path / "root"

    return write


STAT = "anon 5\nfile 900\nactive_file 300\ninactive_file 100\ntotal_active_file 500\ntotal_inactive_file 100\n"


@pytest.mark.parametrize(("own", "files", "limit"), [
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/\n", {}, None),
    ("0::/a/b\n", {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 0.5),
    ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 3.0),
    ("0::/outside/name\n", {"cpu.max": "200000 100000\n"}, 2.0),  # the root is the container's group
    ("4:cpuacct,cpu:/d/x\n0::/\n", {"cpu/d/x/cpu.cfs_quota_us": "200000\n", "cpu/d/x/cpu.cfs_period_us": "50000"}, 4.0),
    ("4:cpu:/d\n", {"cpu/cpu.cfs_quota_us": "70000", "cpu/cpu.cfs_period_us": "100000"}, 0.7),
    ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "5", "cpu/cpu.cfs_period_us": "0"}, None),
    ("4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "5", "cpu/cpu.cfs_period_us": "10"}, None),
    ("0::/\n", {"cpu.max": "nonsense\n"}, None),
])  # fmt: skip
def test_limit_of_processors(groups, own, files, limit):
    assert processor_limit(*groups(own, files)) == limit


@pytest.mark.parametrize(("own", "files", "left"), [
    ("0::/\n", {"memory.max": "2000\n", "memory.current": "1500\n", "memory.stat": STAT}, 900),
    ("0::/\n", {"memory.max": "max\n", "memory.current": "1500\n", "memory.stat": STAT}, None),
    ("0::/\n", {"memory.max": "1000\n", "memory.current": "1500\n", "memory.stat": STAT}, 0),
    ("0::/\n", {"memory.max": "2000\n", "memory.current": "300\n", "memory.stat": STAT}, 2000),
    ("0::/a\n", {"memory.max": "9000\n", "memory.current": "8900\n", "memory.stat": STAT,
                 "a/memory.max": "2000\n", "a/memory.current": "1500\n", "a/memory.stat": STAT}, 500),
    ("3:memory:/d\n", {"memory/d/memory.limit_in_bytes": "2000", "memory/d/memory.usage_in_bytes": "1500\n",
                       "memory/d/memory.stat": STAT}, 1100),
    ("0::/\n", {"memory.max": "2000\n", "memory.current": "1500\n", "memory.stat": "file 5\n"}, None),
    ("0::/\n", {"memory.max": "2000\n"}, None),
    ("no such line", {"memory.max": "2000\n"}, None),
])  # fmt: skip
def test_memory_that_is_left(groups, own, files, left):
    assert available_memory(*groups(own, files)) == left


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert processor_limit(tmp_path / "none", tmp_path) is None
    assert available_memory(tmp_path / "none", tmp_path) is None


@pytest.mark.parametrize(("left", "expected"), [(None, 5000), (9000, 5000), (700, 700), (0, 0)])
def test_free_memory_is_that_of_the_container(monkeypatch, left, expected):
    monkeypatch.setattr(backends, "_machine_memory", lambda: 5000)
    monkeypatch.setattr(backends, "available_memory", lambda: left)
    assert backends.free_memory() == expected
