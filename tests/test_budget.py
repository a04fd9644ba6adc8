"""Will it fit: the sizes told beforehand are those of the arrays that are made."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from qvl_kernels.ops import DeviceError
from qvl_runtime.blob import Blob
from qvl_runtime.budget import budget, cache_bytes, remedies
from qvl_runtime.cli.info import fit
from qvl_runtime.devices import check_fit
from qvl_runtime.errors import QvlError


@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
def test_cache_is_as_large_as_told(model, kv_cache):
    model = model("tiny-vl", device="cpu", bits=16)
    c = model.config
    store = model.ops.kv_cache(c.num_hidden_layers, c.num_attention_heads, c.head_dim, 512, kv_cache)
    assert store.nbytes == cache_bytes(c, 512, kv_cache)


def test_weights_are_the_file_without_its_tokenizer(blob):
    path = blob("tiny-vl", bits=4)
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
    monkeypatch.setattr(info, "device_memory", lambda device: ("cpu", memory["total"] - 1))
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


def test_a_gpu_is_asked_for_room_before_anything_is_loaded(blob):
    opened = Blob(blob("tiny-vl", bits=4))

    def gpu(free: int) -> SimpleNamespace:
        return SimpleNamespace(name="cuda", driver=SimpleNamespace(memory=lambda: (free, free)))

    check_fit(gpu(1 << 40), opened, None, "fp16", vision=True)
    with pytest.raises(DeviceError, match=r"GB needed .* GB free; what fits|nothing would") as error:
        check_fit(gpu(300 << 20), opened, 8192, "fp16", vision=True)
    assert "\n" not in str(error.value)
    check_fit(SimpleNamespace(name="cpu"), opened, 8192, "fp16", vision=True)
