"""A saved past continues as if it had stayed in memory; one that does not fit the model is refused."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file
from shards import safetensors_bytes

import qvl_runtime as qvl
from qvl_runtime.engine import kv_file
from qvl_runtime.engine.kv_file import _runs, _unrolled, identity
from qvl_runtime.errors import QvlError
from qvl_runtime.file.tensorfile import TensorFile

PICTURE = "images/rgb_odd.png"
GREEDY = {"temperature": 0, "max_new_tokens": 8, "logprobs": 2}


@pytest.fixture
def load(blob):
    """``load(kv_cache, variant, …)``: a model that was just loaded."""

    def make(kv_cache="fp16", variant="base", device="cpu", bits=16, **options):
        return qvl.load(blob("tiny-vl", variant, bits=bits), device=device, kv_cache=kv_cache, **options)

    return make


def _talk(model) -> list:
    history = model.chat(f"<img>{PICTURE}</img>What is this?", **GREEDY).history
    return model.chat("And where is it?", history, **GREEDY).history


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("kv_cache", ["fp16", "int8"])
@pytest.mark.parametrize("variant", ["base", "long"])
def test_a_loaded_past_goes_on_as_the_one_in_memory(load, in_golden, tmp_path, kv_cache, variant, device):
    """The variant "long" has an NTK factor other than 1."""
    model, file = load(kv_cache, variant, device), tmp_path / "past"
    history = _talk(model)
    saved = model.save_past(file, history)
    assert saved > 256 and file.stat().st_mode & 0o077 == 0
    other = load(kv_cache, variant, device)
    assert other.load_past(file) == saved
    answers = [m.chat("What else?", history, **GREEDY) for m in (model, other)]
    assert answers[0].token_ids == answers[1].token_ids and answers[0].logprobs == answers[1].logprobs
    assert answers[1].timings.cached_tokens >= saved and answers[1].timings.cached_images == 1
    if device == "cpu":
        fresh = load(kv_cache, variant, conversations=0).chat("What else?", history, **GREEDY)
        assert fresh.logprobs == answers[1].logprobs
    assert set(load_file(file)) > {"0.0", "1.0"}, "any safetensors tool opens it"


def test_only_what_belongs_to_the_conversation_is_saved(load, in_golden, tmp_path):
    model, file = load(), tmp_path / "past"
    history = _talk(model)
    (shorter,) = history[:1]
    saved = model.save_past(file, [shorter])
    assert saved < model.save_past(tmp_path / "whole", history)
    assert load().load_past(file) == saved
    assert "And where" not in model.tokenizer.decode([k for k in _keys(file) if isinstance(k, int)])
    assert load().save_past(tmp_path / "nothing", history) == 0
    assert not (tmp_path / "nothing").exists()


def _keys(file) -> list:
    return _unrolled(json.loads(TensorFile(file).metadata["keys"]))


def test_a_past_of_something_else_is_refused(load, in_golden, tmp_path):
    model, file = load(), tmp_path / "past"
    history = _talk(model)
    model.save_past(file, history)
    others = (
        load("int8"),
        load(device="reference"),
        load(activations="int8"),
        load(bits=4),
        load(variant="long"),
    )
    for other in others:
        with pytest.raises(QvlError, match=r"past: .* another model, device, cache type, or `activations`"):
            other.load_past(file)
        assert other.chat("What else?", history, **GREEDY).timings.cached_tokens == 0
    for text in (b"", b"no safetensors file"):
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(QvlError, match="bad: "):
            model.load_past(tmp_path / "bad")
    with pytest.raises(QvlError, match="holds no keys and values"):
        model.load_past(model.blob.path)
    with pytest.raises(QvlError, match="no such file"):
        model.load_past(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "named"),
    [(lambda facts: facts.update(made_by="qvl 0.1.0"), "'qvl 0.1.0'"), (lambda facts: facts.pop("made_by"), "earlier")],
)
def test_a_past_of_another_version_is_refused(saved, tmp_path, change, named):
    """Another version may compute other numbers; those of the first ones were not named."""
    model, file = saved
    forged(file, tmp_path / "old", lambda arrays, metadata: change(metadata))
    with pytest.raises(QvlError, match=rf"old: .* computed by .*{named}.*: continue without it"):
        model.load_past(tmp_path / "old")


def test_an_earlier_version_refuses_a_past_of_this_one(monkeypatch):
    """It compares the identity alone."""
    mine = identity("model")
    monkeypatch.setattr(kv_file, "PROGRAM", "qvl 0.1.0")
    assert identity("model") != mine


def test_every_byte_is_guarded(load, in_golden, tmp_path):
    model, file = load(), tmp_path / "past"
    history = model.chat("Hello", **GREEDY).history
    model.save_past(file, history)
    right, fresh = file.read_bytes(), load()
    for position in [*range(0, 2000, 97), *np.random.default_rng(0).integers(0, len(right), 40), len(right) - 1]:
        file.write_bytes(right[:position] + bytes([right[position] ^ 1]) + right[position + 1 :])
        with pytest.raises(QvlError, match="past: "):
            fresh.load_past(file)
    for length in (len(right) - 1, len(right) // 2, 9, 0):
        file.write_bytes(right[:length])
        with pytest.raises(QvlError, match="past: "):
            fresh.load_past(file)
    file.write_bytes(right)
    assert fresh.load_past(file) > 0
    assert load(conversations=0).load_past(file) == 0


def test_a_write_that_fails_leaves_the_older_file(load, in_golden, tmp_path, monkeypatch):
    model, file = load(), tmp_path / "past"
    history = model.chat("Hello", **GREEDY).history
    model.save_past(file, history)
    right = file.read_bytes()

    def full(*paths):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(QvlError, match=r"cannot be written .No space left"):
            model.save_past(file, history)
    assert file.read_bytes() == right and list(tmp_path.iterdir()) == [file]
    assert model.chat("And?", history, **GREEDY).timings.cached_tokens > 0, "the session is still there"
    with pytest.raises(QvlError, match="a path has no NUL character"):
        model.save_past("a\0b", history)
    for path in (tmp_path / "no" / "folder", tmp_path, ".", "/", ""):
        with pytest.raises(QvlError, match=r"cannot be written .*; name another file"):
            model.save_past(path, history)
    for path in (None, 5, b"x"):
        with pytest.raises(QvlError, match=f"expected a path, not {type(path).__name__}"):
            model.save_past(path, history)


def test_what_a_killed_write_has_left_goes(load, in_golden, tmp_path):
    model, left = load(), [tmp_path / f".past.0123456{digit}.partial" for digit in "78"]
    for file in left:
        file.write_bytes(b"half")
    os.utime(left[0], (0, 0))
    model.save_past(tmp_path / "past", _talk(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == [left[1].name, "past"]


def test_keys_are_written_in_runs():
    keys = [1, 1, 2, b"a" * 32, b"a" * 32, b"b" * 32, 3]
    assert len(_runs(keys)) == 6
    assert _unrolled(json.loads(json.dumps(_runs(keys)))) == keys


@pytest.fixture(scope="module")
def saved(blob, tmp_path_factory):
    """A model, and a past that it saved."""
    model = qvl.load(blob("tiny-vl", bits=16), device="cpu")
    file = tmp_path_factory.mktemp("past") / "right"
    assert model.save_past(file, model.chat("Hello", **GREEDY).history)
    return model, file


def forged(file, out, change) -> None:
    """A copy after ``change(arrays, metadata)``, with a correct digest."""
    found = TensorFile(file)
    arrays = {name: np.array(found.array(name)) for name in found.entries if name != "digest"}
    metadata = dict(found.metadata)
    change(arrays, metadata)
    head = safetensors_bytes({**arrays, "digest": np.zeros(32, np.uint8)}, metadata)[:-32]
    out.write_bytes(head + hashlib.sha256(head).digest())


def _set(**values):
    return lambda arrays, metadata: metadata.update(values)


def _runs_are(*runs):
    return _set(keys=json.dumps(runs))


def _larger(*runs):
    """The file is so large that it may hold them, as a sparse file is without taking any room."""

    def apply(arrays, metadata):
        arrays["x"] = np.zeros(1 << 20, np.uint8)
        metadata["keys"] = json.dumps(runs)

    return apply


def _first(change):
    def apply(arrays, metadata):
        arrays["0.0"] = change(arrays["0.0"])

    return apply


def _not_a_number(array):
    array = array.copy()
    array.reshape(-1)[7] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, metadata: metadata.pop("keys"), "list of keys"),
        (lambda arrays, metadata: metadata.pop("alpha"), "NTK factor"),
        (_set(alpha="-3"), "NTK factor '-3'"),
        (_set(alpha="0"), "NTK factor"),
        (_set(alpha="2"), "NTK factor"),
        (_set(alpha="9" * 400), "NTK factor"),
        (_set(alpha="1.0"), "NTK factor"),
        (_set(keys="{}"), "list of keys"),
        (_set(keys="[" * 100_000), "nested too deeply"),
        (_runs_are(), "claims 0 positions"),
        (_runs_are(-1), "tokens and pictures"),
        (_runs_are(True), "tokens and pictures"),
        (_runs_are(1.5), "tokens and pictures"),
        (_runs_are(10**400), "tokens and pictures"),
        (_runs_are(["ab" * 32, -5]), "tokens and pictures"),
        (_runs_are(["ab" * 32, 10**9]), "claims 1000000000 positions"),
        (_larger(["ab" * 32, 10**6]), "claims 1000000 positions, more than the window of "),
        (_runs_are(["ab" * 32, 1e9]), "tokens and pictures"),
        (_runs_are(["ab" * 31, 5]), "tokens and pictures"),
        (_runs_are(["xy" * 32, 5]), "tokens and pictures"),
        (_runs_are(["ab" * 32]), "tokens and pictures"),
        (_runs_are(1, 2, 3), "another shape"),
        (_runs_are(["ab" * 32, 5000]), "another shape"),
        (_first(_not_a_number), "not finite"),
        (_first(lambda a: a[:1]), "another shape"),
        (_first(lambda a: a.astype(np.float32)), "another shape"),
        (lambda arrays, metadata: arrays.pop("0.0"), "another shape"),
        (lambda arrays, metadata: arrays.update({"0.9": arrays.pop("0.0")}), "another shape"),
        (lambda arrays, metadata: arrays.update(x=np.zeros(3, np.uint8)), "another shape"),
        (lambda arrays, metadata: arrays.clear(), ""),
    ],
)
def test_a_forged_past_is_refused_however_right_its_digest(saved, tmp_path, change, message):
    model, file = saved
    forged(file, tmp_path / "forged", change)
    with pytest.raises(QvlError) as caught:
        model.load_past(tmp_path / "forged")
    assert message in str(caught.value) and "forged: " in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("continue without it")


def test_a_forgery_that_changes_nothing_is_taken(saved, tmp_path):
    model, file = saved
    forged(file, tmp_path / "same", lambda arrays, metadata: None)
    assert model.load_past(tmp_path / "same") == model.load_past(file)
