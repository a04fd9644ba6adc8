"""Memory budgets: the announced sizes are those of the arrays that are allocated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import qvl_runtime as qvl
from qvl_kernels.cpu import CpuOps
from qvl_kernels.ops import DeviceError
from qvl_kernels.reference import ReferenceOps
from qvl_runtime.backends import check_fit
from qvl_runtime.blob import Blob
from qvl_runtime.budget import budget, cache_bytes, remedies, sizes_of
from qvl_runtime.cli.info import fit
from qvl_runtime.errors import QvlError


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
def test_cache_is_as_large_as_told(model, kv_cache):
    model = model("tiny-vl", device="cpu", bits=16)
    c = model.config
    for backend, ops in (("cpu", model.ops), ("reference", ReferenceOps())):
        for capacity, head_dim in ((512, c.head_dim), (500, c.head_dim), (17, 72), (3, 6)):
            store = ops.kv_cache(c.num_hidden_layers, c.num_attention_heads, head_dim, capacity, kv_cache)
            shape = (c.num_hidden_layers, c.num_attention_heads, head_dim, capacity)
            assert store.nbytes == sizes_of(backend).kv_cache(*shape, kv_cache)
    store = model.ops.kv_cache(c.num_hidden_layers, c.num_attention_heads, c.head_dim, 512, kv_cache)
    assert store.nbytes == cache_bytes(c, 512, kv_cache)


@pytest.mark.parametrize("name", ["tiny-vl", "tiny-q7-gptq-actorder"])
def test_weights_are_the_file_without_its_tokenizer(blob, name):
    """Also where every layer has a bias, zero points and an order of its columns."""
    path = blob(name, bits=4)
    opened = Blob(path)
    rest = opened.file.entries["tokenizer.ranks"]
    header = min(entry.start for entry in opened.file.entries.values())
    assert budget(opened, 1, "fp16").weights == path.stat().st_size - header - (rest.stop - rest.start)


def test_remedies_are_tried_mildest_first(blob):
    opened = Blob(blob("tiny-vl", bits=4))
    whole, int8 = (budget(opened, 8192, cache).total for cache in ("fp16", "int8"))
    assert remedies(opened, 8192, "fp16", int8)[0] == "--kv-cache int8"
    (shorter,) = remedies(opened, 8192, "fp16", int8 - 1)
    tokens = int(shorter.removeprefix("--context "))
    assert budget(opened, tokens, "fp16").total <= int8 - 1 < budget(opened, tokens + 256, "fp16").total
    assert remedies(opened, 8192, "int8", 1000) == []
    assert whole > int8


def test_info_says_whether_it_fits(blob, monkeypatch, capsys):
    from qvl_runtime.cli import info

    path = blob("tiny-vl", bits=4)
    memory = fit(Blob(path), 1024, "cpu", "fp16")
    assert memory["total"] == memory["weights"] + memory["cache"] + memory["workspace"]
    monkeypatch.setattr(info, "device_memory", lambda device: ("cpu", "cpu", memory["total"] - 1))
    info.info(path, context=1024, as_json=True)
    told = json.loads(capsys.readouterr().out)["memory"]
    assert not told["fits"]
    assert told["remedies"][0] == "--kv-cache int8"
    info.info(path, context=1024)
    assert "what fits: --kv-cache int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("context", "device", "cache", "message"),
    [(0, "cpu", "fp16", "window"), (9000, "cpu", "fp16", "8192"), (10, "tpu", "fp16", "tpu"), (10, "cpu", "q4", "q4")],
)
def test_impossible_questions_are_refused(blob, context, device, cache, message):
    with pytest.raises(QvlError, match=message):
        fit(Blob(blob("tiny-vl", bits=4)), context, device, cache)


@pytest.mark.parametrize(("option", "message"), [({"device": "tpu"}, "device 'tpu'"), ({"kv_cache": "q4"}, "is 'q4'")])
def test_options_without_a_use_are_checked(blob, option, message):
    from qvl_runtime.cli import info

    with pytest.raises(QvlError, match=f"{message}.*; choose one of"):
        info.info(blob("tiny-vl", bits=4), **{"device": "auto", "kv_cache": "fp16", **option})


def test_a_gpu_is_asked_for_room_before_anything_is_loaded(blob):
    opened = Blob(blob("tiny-vl", bits=4))

    def gpu(free: int) -> SimpleNamespace:
        return SimpleNamespace(name="cuda", driver=SimpleNamespace(memory=lambda: (free, free)))

    check_fit(gpu(1 << 40), opened, None, "fp16", vision=True)
    with pytest.raises(DeviceError, match=r"GB needed .* GB free; what fits|nothing would") as error:
        check_fit(gpu(300 << 20), opened, 8192, "fp16", vision=True)
    assert "\n" not in str(error.value)
    check_fit(SimpleNamespace(name="cpu"), opened, 8192, "fp16", vision=True)


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
def test_a_gpu_is_told_of_in_its_own_sizes(blob, monkeypatch, kv_cache):
    """`info` says that a model fits exactly if it can be loaded."""
    from qvl_runtime.cli import info

    opened, memory = Blob(blob("tiny-vl", bits=4)), {}

    def device_memory(device):
        return "cuda", "Some GPU", memory["free"]

    def loads(free: int) -> bool:
        ops = SimpleNamespace(name="cuda", driver=SimpleNamespace(memory=lambda: (free, free)))
        try:
            check_fit(ops, opened, 4096, kv_cache, vision=True)
        except DeviceError:
            return False
        return True

    monkeypatch.setattr(info, "device_memory", device_memory)
    memory["free"] = 1 << 40
    needed = fit(opened, 4096, "cuda", kv_cache)["total"]
    assert needed > budget(opened, 4096, kv_cache).total
    for free, fits in ((needed, True), (needed - 1, False)):
        memory["free"] = free
        assert fit(opened, 4096, "cuda", kv_cache)["fits"] is fits
        assert loads(free) is fits


def test_one_backend_serves_both_parts(blob, monkeypatch):
    """Two names of one backend share a pool of threads."""
    from qvl_runtime import loading

    made = []

    def make_ops(device, *options):
        made.append(device)
        return CpuOps()

    path = blob("tiny-vl", bits=4)
    monkeypatch.setattr(loading, "make_ops", make_ops)
    monkeypatch.setattr(loading, "backend", lambda device: ("cpu" if device == "auto" else device, ""))
    for vision_device, count in ((None, 1), ("cpu", 1), ("auto", 1), ("reference", 2)):
        made.clear()
        qvl.load(path, vision_device=vision_device)
        assert len(made) == count


@pytest.mark.parametrize(
    ("variable", "value", "verb", "arguments"),
    [
        ("QVL_THREADS", "abc", "generate", ["Hi"]),
        ("QVL_CPU", "sse9", "generate", ["Hi"]),
        ("QVL_CPU", "sse9", "info", ["--context", "100"]),
    ],
)
def test_a_bad_variable_is_one_line(blob, variable, value, verb, arguments):
    command = [sys.executable, "-m", "qvl_runtime", verb, str(blob("tiny-vl", bits=4)), *arguments]
    environment = os.environ | {variable: value}
    done = subprocess.run([*command, "--device", "cpu"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"qvl: {variable}={value}: expected ") and done.stderr.count("\n") == 1
