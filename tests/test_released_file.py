"""A file that the first released version made answers as it did there."""

from __future__ import annotations

import json

import pytest
from conftest import BACKENDS, GOLDEN

import qvl_runtime as qvl

FOLDER = GOLDEN / "released"
CASES = json.loads((FOLDER / "answers.json").read_text())["cases"]


@pytest.fixture(scope="module", params=BACKENDS)
def released(request) -> qvl.Model:
    return qvl.load(FOLDER / "0.1.0.qvl", device=request.param, check=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_released_file_answers_as_it_did(case, released, in_golden):
    """24 tokens of text, a picture, sampling, a prompt beyond the trained length, and a chat."""
    ask = released.chat if case["call"] == "chat" else released.generate
    result = ask(case["prompt"], max_new_tokens=24, **case["options"])
    assert (result.token_ids, result.text) == (case["ids"], case["text"])
