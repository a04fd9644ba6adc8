"""`qvl generate` on the command line: prompts from a pipe, pictures, drawn boxes, and notes on short answers."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from PIL import Image

from qvl_runtime.cli.main import main
from qvl_runtime.engine.generation import Piece, Timings
from qvl_runtime.engine.job import Job
from qvl_runtime.results import Stream, collected

GREY = "#808080"


@pytest.fixture
def generate(blob, in_golden, capfd):
    """``generate(*arguments)`` -> (status, standard output, standard error) with the tiny chat model."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["generate", str(blob("tiny-vl", bits=16)), *map(str, arguments), "--device", "cpu"])
        return (caught.value.code or 0, *capfd.readouterr())

    return run


def test_standard_input_loses_its_last_line_end(generate, monkeypatch):
    wanted = generate("Hello", "--max-new-tokens", 4, "--json")
    for text in ("Hello", "Hello\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        found = generate("-", "--max-new-tokens", 4, "--json")
        assert json.loads(found[1])["token_ids"] == json.loads(wanted[1])["token_ids"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n"))
    assert json.loads(generate("-", "--json")[1])["prompt_tokens"] > json.loads(wanted[1])["prompt_tokens"]


@pytest.mark.parametrize("stdin", [None, io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8")])
def test_standard_input_that_cannot_be_read_is_one_line(generate, monkeypatch, stdin):
    monkeypatch.setattr("sys.stdin", stdin)
    status, out, err = generate("-")
    assert (status, out, err.count("\n")) == (1, "", 1) and "standard input" in err


def test_a_url_keeps_its_slashes(generate, monkeypatch):
    status, out, err = generate("x", "--image", "http://example.com/a.png")
    assert (status, out, err.count("\n")) == (1, "", 1) and "http://example.com/a.png" in err


def test_every_sampling_option_arrives(generate, monkeypatch):
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 3,
    }
    seen = {}

    def stream(self, prompt, images, **given):
        seen.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr("qvl_runtime.model.Model.stream", stream)
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert generate("x", *flags)[0] == 130
    assert options.items() <= seen.items()


def test_boxes_are_drawn_on_the_last_picture(generate, tmp_path, monkeypatch):
    first, last = tmp_path / "first.png", tmp_path / "last.png"
    Image.new("RGB", (60, 40), GREY).save(first)
    Image.new("RGB", (120, 90), GREY).save(last)
    drawn = tmp_path / "drawn.png"
    for arguments in (
        ("What?", "-i", first, "-i", last),
        (f"<img>{first}</img><img>{last}</img>What?",),
        (f"<img>{first}</img><img></img>What?", "-i", last),
    ):
        drawn.unlink(missing_ok=True)
        assert generate(*arguments, "--max-new-tokens", 2, "--draw", drawn)[0] == 0
        assert Image.open(drawn).size == (120, 90)


def test_a_drawing_without_boxes_says_so(generate, tmp_path):
    out = tmp_path / "a.png"
    status, _, err = generate("x", "-i", "images/rgb_odd.png", "--max-new-tokens", 1, "--draw", out)
    assert status == 0 and out.exists() and "no boxes" in err


def test_draw_is_refused_before_the_answer(generate, tmp_path):
    for arguments, message in (
        (("x", "--draw", tmp_path / "a.png"), "--image"),
        (("x", "-i", "images/rgb_odd.png", "--draw", tmp_path / "a.xyz"), ".xyz"),
        (("x", "-i", "images/rgb_odd.png", "--draw", tmp_path / "a.psd"), "a.psd: cannot be written (no image format"),
        (("x", "-i", "images/rgb_odd.png", "--draw", tmp_path / "no" / "a.png"), "in a folder that exists"),
        (("x", "-i", "nowhere.png", "--draw", tmp_path / "a.png"), "nowhere.png"),
    ):
        status, out, err = generate(*arguments)
        assert (status, out, err.count("\n")) == (1, "", 1) and message in err


def test_draw_does_not_overwrite_what_is_read(generate, tmp_path):
    own = tmp_path / "own.png"
    shutil.copy("images/rgb_odd.png", own)
    before = own.read_bytes()
    for arguments in (("x", "-i", own), (f"<img>{own}</img>x",), ("x", "-i", f"file://{own}")):
        status, out, err = generate(*arguments, "--draw", own)
        assert (status, out) == (1, "") and f"{own}: is read here and would be overwritten; name another" in err
    assert own.read_bytes() == before


def test_an_answer_cut_by_the_context_says_so(generate):
    status, out, err = generate("Hello", "--context", 12)
    assert status == 0 and out.strip()
    assert "context of 12 tokens" in err and "--context" in err and err.count("\n") == 1
    assert generate("Hello", "--context", 12, "--max-new-tokens", 2)[2] == ""
    status, out, err = generate("Hello", "--context", 10**6)
    assert (status, out, err.count("\n")) == (1, "", 1) and "window" in err


def test_an_empty_answer_of_a_chat_model_says_so(generate, monkeypatch):
    last = Piece("", (), "stop", Timings(prompt_tokens=1))
    job = Job((piece for piece in [last]), 1, 0, None)
    job.advance()
    stream = Stream(job, lambda seen: collected(seen, lambda text: []))
    monkeypatch.setattr("qvl_runtime.model.Model.stream", lambda self, *a, **k: stream)
    status, out, err = generate("Hello")
    assert (status, out) == (0, "\n") and "--chat" in err
    assert generate("Hello", "--chat")[2] == "qvl: the model ended its answer at once\n"


def test_reasoning_that_leaves_no_room_says_so(generate, monkeypatch):
    pieces = [Piece("Let me", (1, 2), reasoning=True), Piece("", (), "length", Timings(prompt_tokens=1))]
    job = Job((piece for piece in pieces), 1, 0, None)
    job.advance()
    stream = Stream(job, lambda seen: collected(seen, lambda text: []))
    monkeypatch.setattr("qvl_runtime.model.Model.stream", lambda self, *a, **k: stream)
    status, out, err = generate("Hello", "--max-new-tokens", 2)
    assert (status, out) == (0, "\n") and "reasoning took all 2 tokens" in err and "--max-new-tokens" in err


def test_a_chat_turn_is_that_of_chat(generate, model, monkeypatch):
    few = ("--max-new-tokens", 8, "-i", "images/rgb_odd.png")
    found = json.loads(generate("What is it?", "--chat", "--json", *few)[1])
    wanted = model("tiny-vl", device="cpu", bits=16).chat(
        "What is it?", images=["images/rgb_odd.png"], max_new_tokens=8, temperature=0, top_k=0, top_p=1.0
    )
    assert (found["token_ids"], found["prompt_tokens"]) == (wanted.token_ids, wanted.prompt_tokens)
    assert json.loads(generate("What is it?", "--json", *few)[1])["prompt_tokens"] < wanted.prompt_tokens
    monkeypatch.setattr("qvl_runtime.model.Model.is_chat", False)
    status, out, err = generate("What is it?", "--chat")
    assert (status, out, err.count("\n")) == (1, "", 1) and "base model" in err


def test_an_answer_follows_a_schema(generate, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps({"enum": ["yes", "no"]}))
    assert json.loads(generate("Is it?", "--json-schema", path)[1]) in ("yes", "no")
    for wrong in ("[]", '{"type": "strin"}', '{"$ref": "#"}'):
        path.write_text(wrong)
        status, out, err = generate("Is it?", "--json-schema", path)
        assert (status, out, err.count("\n")) == (1, "", 1) and err.startswith(f"qvl: {path}")
