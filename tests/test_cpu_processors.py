"""Threads are for the performance cores of a hybrid machine."""

from __future__ import annotations

import os

import pytest

from qvl_kernels.cpu import processors, runner
from qvl_kernels.cpu.processors import performance_processors


@pytest.fixture
def mine(monkeypatch):
    """Processors 0 to 7 are available without a limit, and no variable sets the number of threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(processors, "processor_limit", lambda: None)
    for name in ("QVL_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


def _capacities(system, *capacities):
    for n, capacity in enumerate(capacities):
        folder = system / "system" / "cpu" / f"cpu{n}"
        folder.mkdir(parents=True)
        (folder / "cpu_capacity").write_text(f"{capacity}\n")


@pytest.mark.parametrize(("capacities", "count"), [
    ((1024,) * 8, 8),
    ((1024, 1024, 1024, 1024, 460, 460, 460, 460), 4),
    ((290, 290, 290, 290, 760, 760, 760, 1024), 4),
    ((1024,) * 4, 8),  # the others have no number
])  # fmt: skip
def test_slow_processors_do_not_count(mine, tmp_path, capacities, count):
    _capacities(tmp_path, *capacities)
    assert performance_processors(tmp_path) == count


@pytest.mark.parametrize(("listed", "count"), [("0-3\n", 4), ("0,2,12-15\n", 2), ("8-15\n", 8), ("\n", 8), ("x", 8)])
def test_intel_names_its_performance_cores(mine, tmp_path, listed, count):
    (tmp_path / "cpu_core").mkdir()
    (tmp_path / "cpu_core" / "cpus").write_text(listed)
    assert performance_processors(tmp_path) == count


def test_all_processors_count_where_the_system_says_nothing(mine, tmp_path):
    assert performance_processors(tmp_path) == 8


@pytest.mark.parametrize(("limit", "count"), [(0.25, 1), (1.0, 1), (2.9, 2), (8.0, 8), (64.0, 8)])
def test_a_container_has_threads_for_whole_processors(mine, monkeypatch, tmp_path, limit, count):
    monkeypatch.setattr(processors, "processor_limit", lambda: limit)
    assert performance_processors(tmp_path) == count


def test_the_number_of_threads_is_theirs(mine, monkeypatch):
    monkeypatch.setattr(runner, "performance_processors", lambda: 5)
    assert runner.default_threads() == 5
