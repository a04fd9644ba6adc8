"""The public Python API: every form of prompt and image, chat, sampling, and clear errors."""

from __future__ import annotations

import inspect
import json
import re
from typing import get_type_hints

import numpy as np
import pytest
from helpers import linked
from PIL import Image, ImageOps

import qvl_runtime as qvl
from qvl_runtime.backends import backend
from qvl_runtime.options import AnswerOptions

IMAGE = "images/rgb_odd.png"
QUESTION = "What is this? Answer:!"


@pytest.fixture
def tiny(model, in_golden):
    return model("tiny-vl", device="cpu", bits=16)


def test_every_form_of_prompt_gives_the_same_answer(tiny):
    text = f"Picture 1: <img>{IMAGE}</img>\n{QUESTION}"
    wanted = tiny.generate(text, max_new_tokens=6)
    given = tiny.generate(QUESTION, [IMAGE], max_new_tokens=6)
    ids = tiny.generate(tiny.tokenizer.encode(text), [IMAGE], max_new_tokens=6)
    assert wanted.token_ids == given.token_ids == ids.token_ids
    assert wanted.prompt_tokens == len(tiny.tokenizer.encode(text))
    message = [{"role": "user", "content": text}]
    listed = tiny.generate([{"image": IMAGE}, {"text": QUESTION}], max_new_tokens=6)
    assert listed.token_ids == tiny.generate(message, max_new_tokens=6).token_ids, (
        "a list is a chat model's user's turn"
    )


def test_the_type_checker_knows_the_options_of_generate():
    others = ("self", "prompt", "images", "n")
    names = [name for name in inspect.signature(qvl.Model.generate).parameters if name not in others]
    hints = get_type_hints(qvl.Model.generate)
    assert get_type_hints(AnswerOptions) == {name: hints[name] for name in names}


def test_every_form_of_image_gives_the_same_features(tiny, golden):
    path = golden / IMAGE
    picture = Image.open(path).convert("RGB")
    wanted = tiny.encode_image(str(path))
    for form in (path, path.read_bytes(), picture, np.asarray(picture)):
        assert np.array_equal(tiny.encode_image(form), wanted)


def test_images_fill_their_slots_in_order(tiny):
    both = tiny.logits("a<img></img>b<img></img>c", [IMAGE, "images/rgba.png"])
    swapped = tiny.logits("a<img></img>b<img></img>c", ["images/rgba.png", IMAGE])
    named = tiny.logits(f"a<img>{IMAGE}</img>b<img>images/rgba.png</img>c")
    assert np.array_equal(both, named)
    assert np.abs(both - swapped).max() > 0.01


def test_stream_equals_generate(tiny):
    pieces = list(tiny.stream(QUESTION, max_new_tokens=12))
    result = tiny.generate(QUESTION, max_new_tokens=12, stop=None)
    assert "".join(p.text for p in pieces) == result.text
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == result.finish_reason
    assert pieces[-1].timings.new_tokens == len(result.token_ids)


def test_golden_conversations(tiny, golden):
    """`chat` against the published one, greedy. It drops the last token of an answer without stop token; we do not."""
    for case in json.loads((golden / "lm" / "behaviour.json").read_text())["chat"]:
        history = [tuple(turn) for turn in case["history"]]
        answer = tiny.chat(case["query"], history, temperature=0, max_new_tokens=case["max_new_tokens"])
        stops = [i for i, t in enumerate(case["generated"]) if t in tiny.stop_ids]
        assert answer.token_ids == case["generated"][: stops[0] if stops else None]
        assert answer.history[:-1] == history
        assert answer.history[-1] == (case["query"], answer.text)
        if stops:
            assert answer.text == case["response"].strip()


def test_golden_repetition_penalty(tiny, golden):
    behaviour = json.loads((golden / "lm" / "behaviour.json").read_text())
    prompt = behaviour["stop_words"][0]["input_ids"]
    wanted = behaviour["repetition_penalty_1.3"]["generated"]
    answer = tiny.generate(prompt, max_new_tokens=len(wanted), repetition_penalty=1.3)
    assert answer.token_ids == wanted


def test_a_seed_repeats_an_answer(tiny):
    options = {"temperature": 1.0, "max_new_tokens": 12}
    one, two, other = (tiny.generate(QUESTION, seed=seed, **options).token_ids for seed in (7, 7, 8))
    assert one == two != other


def test_an_answer_does_not_outgrow_the_window(checkpoint, tmp_path, in_golden):
    from qvl_convert.convert import convert

    folder = linked(checkpoint("tiny-vl"), tmp_path / "short", max_position_embeddings=40)
    convert(folder, tmp_path / "short.qvl", bits=16)
    model = qvl.load(tmp_path / "short.qvl", device="cpu")
    ids = model.tokenizer.encode("Hello, world! Hello, world!")
    answer = model.generate(ids, max_new_tokens=500)
    assert len(ids) + len(answer.token_ids) == 40
    assert answer.finish_reason == "length"
    with pytest.raises(qvl.QvlError, match="window is 40"):
        model.generate(ids * 3)


def test_a_text_model_sees_nothing(model, in_golden):
    model = model("tiny-q7-gptq-asym", device="cpu")
    assert len(model.generate("Hello", max_new_tokens=3).token_ids) <= 3
    with pytest.raises(qvl.QvlError, match="vision"):
        model.encode_image(IMAGE)
    with pytest.raises(qvl.QvlError):
        model.generate("Hello", [IMAGE])


def test_a_base_model_does_not_chat(checkpoint, tmp_path):
    from qvl_convert.convert import convert

    folder = linked(checkpoint("tiny-vl"), tmp_path / "base", "generation_config.json")
    (folder / "generation_config.json").write_text('{"chat_format": "raw", "eos_token_id": 400}')
    convert(folder, tmp_path / "base.qvl", bits=16)
    model = qvl.load(tmp_path / "base.qvl", device="reference")
    with pytest.raises(qvl.QvlError, match="generate"):
        model.chat("Hello")


class Pydantic:
    """An object with the attributes of pydantic's models."""

    @classmethod
    def model_json_schema(cls):
        return {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(""), "empty"),
        (lambda m: m.generate("<img>never closed"), "unclosed"),
        (lambda m: m.generate("<img>nowhere.png</img>x"), "nowhere.png"),
        (lambda m: m.generate("x", ["nowhere.png"]), "nowhere.png"),
        (lambda m: m.generate("<img></img><img></img>", [IMAGE]), "2"),
        (lambda m: m.generate("x", max_new_tokens=-1), "max_new_tokens"),
        (lambda m: m.generate("x", temperature=-1), "temperature"),
        (lambda m: m.generate("x", ["http://example.com/a.png"]), "URL"),
        (lambda m: m.generate([10**9]), "1000000000"),
        (lambda m: m.generate(3.5), "prompt"),
        (lambda m: m.generate("x", max_new_tokens=True), "max_new_tokens is True; expected a whole number"),
        (lambda m: m.generate("x", max_new_tokens=2.0), "max_new_tokens is 2.0; expected a whole number"),
        (lambda m: m.generate("x", max_tokens=3), "no option 'max_tokens'; use max_new_tokens"),
        (lambda m: m.generate("x", do_sample=True), "use temperature (0 is greedy)"),
        (lambda m: m.stream("x", image=IMAGE), "use images, a list"),
        (lambda m: m.generate("x", form=qvl.Grounding()), "no option 'form'; use constraint"),
        (lambda m: m.generate(messages=[{"role": "user", "content": "x"}]), "no option 'messages'; use prompt"),
        (lambda m: m.chat([{"role": "user", "content": "x"}]), "pass messages to generate"),
        (lambda m: m.chat("x", system=5), "system is 5; expected a str"),
        (lambda m: m.chat("x", n=2), "chat() has no option 'n'"),
        (lambda m: m.generate("x", constraint="yes|no"), "expected qvl.Regex(...)"),
        (lambda m: m.generate("x", constraint=range(3)), "expected qvl.Regex(...)"),
        (lambda m: m.generate("x", constraint=qvl.Regex), "is the class Regex; pass an object"),
        (lambda m: m.generate("x", constraint=Pydantic), "pass qvl.JsonSchema(Pydantic.model_json_schema())"),
        (lambda m: m.generate("x", n=129, max_new_tokens=0), "n is 129; a request has at most 128 answers, so make"),
        (lambda m: m.generate("x", stop=[1]), "stop is [1]; expected a str or a list of str"),
        (lambda m: m.generate("x", stop=np.array([["a"], ["b"]])), "stop is array([['a'], ['b']]"),
        (lambda m: m.generate("x", temperature=np.zeros((2, 2))), "temperature is array([[0., 0.], [0., 0.]])"),
        (lambda m: m.generate("x", max_new_tokens=np.zeros((2, 2))), "max_new_tokens is array([[0., 0.], [0., 0.]])"),
        (lambda m: m.generate("x", max_new_tokens=-(10**400)), "0...; expected 0 or more"),
    ],
)
def test_bad_requests_say_what_is_wrong(tiny, call, message):
    with pytest.raises(qvl.QvlError, match=re.escape(message)) as error:
        call(tiny)
    assert "\n" not in str(error.value)


def test_bad_load_arguments(blob):
    path = blob("tiny-vl", bits=16)
    with pytest.raises(qvl.QvlError, match="device 'tpu'"):
        qvl.load(path, device="tpu")
    with pytest.raises(qvl.QvlError, match="kv_cache 'fp8'"):
        qvl.load(path, kv_cache="fp8")
    for device in ("cpu", "reference"):
        with pytest.raises(qvl.QvlError, match="activations 'int4' are unknown"):
            qvl.load(path, device=device, activations="int4")
    with pytest.raises(qvl.QvlError, match="no such file"):
        qvl.load("missing.qvl")
    with pytest.raises(qvl.QvlError, match="context is '100'; expected a whole number"):
        qvl.load(path, context="100")


def test_vision_may_run_elsewhere(blob, tiny):
    mixed = qvl.load(blob("tiny-vl", bits=16), device="cpu", vision_device="reference")
    prompt = f"<img>{IMAGE}</img>{QUESTION}"
    assert mixed.generate(prompt, max_new_tokens=8).token_ids == tiny.generate(prompt, max_new_tokens=8).token_ids


def test_a_shorter_context_is_kept_to(blob):
    model = qvl.load(blob("tiny-vl", bits=16), device="cpu", context=30)
    ids = model.tokenizer.encode("Hello, world!")
    assert len(ids) + len(model.generate(ids, max_new_tokens=500).token_ids) == 30
    with pytest.raises(qvl.QvlError, match="window is 30"):
        model.generate(ids * 4)
    with pytest.raises(qvl.QvlError, match="context"):
        qvl.load(blob("tiny-vl", bits=16), context=0)


def test_the_published_rule_decides_which_turns_stay(tiny, golden):
    """`chat` with a given window sees exactly the history the published code would give the model."""
    cases = json.loads((golden / "tok" / "chat.json").read_text())["cases"]
    checked = 0
    for case in next(c for c in cases if c["vocab"] == "tiny")["make_context"]:
        if case["max_window_size"] < 6144 and "a.png" not in case["raw_text"]:
            history = [tuple(turn) for turn in case["history"] or []]
            answer = tiny.chat(
                case["query"],
                history,
                system=case["system"],
                max_window_size=case["max_window_size"],
                temperature=0,
                max_new_tokens=1,
            )
            assert answer.prompt_tokens == case["n_tokens"]
            checked += 1
    assert checked >= 4


def test_another_gpu_is_chosen_by_the_environment():
    with pytest.raises(
        qvl.QvlError, match=r"'cuda:1' is unknown; .* for that GPU set CUDA_VISIBLE_DEVICES=1 and use cuda"
    ):
        backend("cuda:1")
    with pytest.raises(qvl.QvlError, match=r"choose one of auto, cpu, cuda, reference$"):
        backend("gpu")


@pytest.mark.parametrize("exif", [None, False, True])
def test_a_picture_is_turned_where_that_is_asked_for(blob, golden, exif):
    """The models of 2023 ignore the orientation by default."""
    model = qvl.load(blob("tiny-vl", bits=16), device="reference", exif=exif)
    path = golden / "images/exif6.jpg"
    picture = Image.open(path)
    turned = ImageOps.exif_transpose(picture) if exif else picture
    wanted = model.encode_image(np.asarray(turned.convert("RGB")))
    assert np.array_equal(model.encode_image(path), wanted)
