"""The model that ships with the package: its folder, its skills at 4 bits, and the verb that shows it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qvl_runtime as qvl
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.convert import convert
from qvl_runtime.blob import DEMO, Blob
from qvl_runtime.cli.demo import demo, fresh_scene, questions
from qvl_runtime.demo import checkpoint_folder

COUNT = 6
"""Questions a skill and language: few, so the bars lie far under the scores in MODEL_CARD.md."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> qvl.Model:
    out = tmp_path_factory.mktemp("demo") / "demo.qvl"
    convert(checkpoint_folder(), out)
    return qvl.load(out, device="cpu")


@pytest.fixture
def skills(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import skills

    return skills


def test_folder_is_small_and_complete():
    folder = checkpoint_folder()
    assert sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) < 14e6
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "qwen.tiktoken", "training.log"):
        assert (folder / name).stat().st_size > 0
    config = json.loads((folder / "config.json").read_text())
    ranks = (folder / "qwen.tiktoken").read_bytes().splitlines()
    assert config["visual"]["image_start_id"] == len(ranks) + 214


def test_it_is_not_called_like_the_published_model(model, blob):
    assert Checkpoint(checkpoint_folder()).fingerprint() == DEMO
    assert model.blob.title == "Demo model" and "Demo model" in repr(model)
    assert Blob(blob("tiny-vl")).title == "Qwen-VL-Chat"


def test_vocabulary_holds_both_languages(model):
    for text in (
        "How many red circles are there?",
        "图中有几个红色圆形？",
        "<ref>星形</ref><box>(10,20),(300,400)</box>",
    ):
        ids = model.tokenizer.encode(text)
        assert model.tokenizer.decode(ids) == text
        assert len(ids) < len(text.encode()) / 2


@pytest.mark.parametrize(
    ("skill", "language", "bar"),
    [
        ("present", "zh", 0.8),
        ("absent", "zh", 0.8),
        ("color", "en", 0.8),
        ("shape", "zh", 0.8),
        ("size", "en", 0.8),
        ("count", "en", 0.7),
        ("find", "en", 0.7),
        ("position", "zh", 0.8),
        ("compare 2", "zh", 0.8),
        ("read digits", "en", 0.5),
    ],
)
def test_skill(model, skills, skill, language, bar):
    test = [c for c in skills.cases(77, COUNT, [skill], "digits") if c.exchange.language == language]
    score = skills.run(model, test)[skill, language]
    assert len(score.right) == COUNT
    assert np.mean(score.right) >= bar


def test_scoring_is_strict(skills):
    case = skills.Case("find", skills.Exchange("find", "en", (("?", "<ref>a</ref><box>(0,0),(100,100)</box>"),)), [])
    answers = {
        "<ref>a</ref><box>(0,0),(100,100)</box>": 1.0,
        "<ref>a</ref><box>(0,0),(100,60)</box>": 1.0,
        "<ref>a</ref><box>(0,0),(100,40)</box>": 0.0,
        "<ref>b</ref><box>(0,0),(100,100)</box>": 0.0,
        "<ref>a</ref><box>(100,100),(0,0)</box>": 0.0,
        "<ref>a</ref><box>(0,0),(100,100)</box><ref>b</ref><box>(0,0),(9,9)</box>": 0.0,
        "": 0.0,
    }
    for answer, right in answers.items():
        skills.mark(case, answer, score := skills.Score())
        assert score.right == [right], answer
    word = skills.Case("count", skills.Exchange("count", "en", (("?", "3"),)), [])
    for answer, right in {"3": 1.0, " 3": 1.0, "30": 0.0, "": 0.0}.items():
        skills.mark(word, answer, score := skills.Score())
        assert score.right == [right], answer


def test_test_sets_depend_on_the_seed_alone(skills):
    first, again, other = (
        [(c.exchange, c.pictures[0].tobytes()) for c in skills.cases(seed, 2, ["count", "compare 2"], "digits")]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other))


def test_demo_leaves_what_it_names(tmp_path, capsys, monkeypatch):
    out = tmp_path / "a demo"
    monkeypatch.setattr("shutil.which", lambda name: name)
    demo(out=out, seed=3, device="cpu")
    text = capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == {"demo.qvl", "picture.png", "boxes.png"}
    assert Image.open(out / "picture.png").size == Image.open(out / "boxes.png").size == (448, 448)
    for word in ("qvl convert", "qvl generate", "qvl chat", "--seed 3", "MB", "tokens/s"):
        assert word in text
    assert any("\u4e00" <= c <= "\u9fff" for c in text) and "?" in text
    monkeypatch.setattr("shutil.which", lambda name: None)
    demo(out=out, seed=3, device="cpu")
    assert f"{shlex.quote(sys.executable)} -m qvl_runtime generate" in capsys.readouterr().out
    (out / "demo.qvl").write_bytes(b"a file of the user")
    with pytest.raises(qvl.QvlError, match=r"demo\.qvl: exists"):
        demo(out=out, seed=3, device="cpu")
    assert (out / "demo.qvl").read_bytes() == b"a file of the user"
    (out / "demo.qvl").unlink()
    with pytest.raises(qvl.QvlError, match=r"picture\.png: exists"):
        demo(out=out, seed=3, device="cpu")
    with pytest.raises(qvl.QvlError, match="is a file"):
        demo(out=out / "picture.png", seed=3, device="cpu")


def test_demo_asks_an_ascii_terminal_in_english():
    scene = fresh_scene(np.random.default_rng(5))
    asked = questions(np.random.default_rng(5), scene, ("en",))
    assert len(asked) >= 6 and all(exchange.language == "en" for exchange in asked)


def test_demo_draws_the_same_picture_for_the_same_seed():
    first, again, other = (fresh_scene(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first == again != other
    assert len(questions(np.random.default_rng(5), first)) >= 6
