"""Saved conversations are untrusted files: read correctly, or refused in one line."""

from __future__ import annotations

import json

import pytest

from qvl_runtime.cli.saved_chat import FORMAT, read_saved
from qvl_runtime.errors import QvlError

GOOD = {
    "format": FORMAT,
    "system": "You are.",
    "settings": {"temperature": 0.5, "seed": 3, "max_new_tokens": 9},
    "history": [["Hi", "Hello"], [[{"image": "a.png"}, {"ref": "it", "box": [1, 2, 3, 4]}, {"text": "?"}], None]],
}
VIDEO = {"type": "video", "video": ["a.png", "b.png"], "times": [0, 0.5]}


def test_what_was_saved_is_read(tmp_path):
    path = tmp_path / "x.json"
    good = GOOD | {"history": [*GOOD["history"], [[VIDEO, {"video": ["a.png"], "fps": 2}], "a cat"]]}
    path.write_text(json.dumps(good))
    saved = read_saved(path)
    assert saved.settings == GOOD["settings"] and saved.system == GOOD["system"]
    assert [list(turn) for turn in saved.history] == good["history"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "no conversation saved"),
        ({"system": 7}, "'system'"),
        ({"system": ["x"]}, "'system'"),
        ({"settings": []}, "'settings'"),
        ({"settings": {"temperature": float("inf")}}, "temperature is inf"),
        ({"settings": {"temperature": float("nan")}}, "temperature is nan"),
        ({"settings": {"temperature": -1}}, "temperature is -1"),
        ({"settings": {"temperature": 10**400}}, "temperature"),
        ({"settings": {"top_k": 2.5}}, "top_k is 2.5; expected a whole number"),
        ({"settings": {"top_k": float("inf")}}, "top_k is inf"),
        ({"settings": {"seed": -1}}, "seed is -1"),
        ({"settings": {"seed": "1"}}, "seed is '1'"),
        ({"settings": {"seed": True}}, "seed is True"),
        ({"settings": {"max_new_tokens": -1}}, "max_new_tokens is -1"),
        ({"settings": {"max_new_tokens": 0}}, "max_new_tokens is 0; expected 1 or more"),
        ({"settings": {"on_piece": 1}}, "on_piece is no setting"),
        ({"settings": {"max_new_tokens": None}}, "max_new_tokens is None"),
        ({"history": None}, "'history'"),
        ({"history": {"a": "b"}}, "'history'"),
        ({"history": ["ab"]}, "turn 1 is no pair"),
        ({"history": [["a", "b"], ["a"]]}, "turn 2 is no pair"),
        ({"history": [[1, "b"]]}, "question of turn 1"),
        ({"history": [[["a"], "b"]]}, "question of turn 1"),
        ({"history": [[[{}], "b"]]}, "question of turn 1"),
        ({"history": [[[{"image": 7}], "b"]]}, "question of turn 1"),
        ({"history": [[[{"open": "/etc/passwd"}], "b"]]}, "question of turn 1"),
        ({"history": [[[{"video": "a.mp4"}], "b"]]}, "question of turn 1"),
        ({"history": [[[VIDEO | {"video": [7]}], "b"]]}, "question of turn 1"),
        ({"history": [[[VIDEO | {"times": ["0"]}], "b"]]}, "question of turn 1"),
        ({"history": [[[{"video": ["a.png"], "fps": "2"}], "b"]]}, "question of turn 1"),
        ({"history": [[[{"video": ["a.png"], "fps": 10**400}], "b"]]}, "question of turn 1"),
        ({"history": [[[VIDEO | {"times": [0, 10**400]}], "b"]]}, "question of turn 1"),
        ({"history": [[[VIDEO | {"times": [0, float("inf")]}], "b"]]}, "question of turn 1"),
        ({"history": [["a", 7]]}, "answer of turn 1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(QvlError) as caught:
        read_saved(path)
    assert message in str(caught.value) and str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"9" * 5000])
def test_what_is_no_json_object(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(QvlError, match=r"x\.json"):
        read_saved(tmp_path / "x.json")
