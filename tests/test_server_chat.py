"""Answers over HTTP: OpenAI's client, and the answers that the Python API gives."""

from __future__ import annotations

import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from serving import QUESTION, events, image_part, picture, png, serving

import qvl_runtime as qvl


def content(seed: int = 3, text: str = QUESTION) -> list[dict]:
    return [image_part(png(picture(seed))), {"type": "text", "text": text}]


def direct(model: qvl.Model, scene: int = 3, text: str = QUESTION, **options) -> qvl.Result:
    """The Python API's answer to the same request."""
    message = {"role": "user", "content": [{"image": png(picture(scene))}, {"text": text}]}
    return model.generate([message], **options)


def test_an_answer_has_its_text_boxes_and_usage(served, demo_model):
    expected = direct(demo_model, max_new_tokens=200)
    answer = served.openai().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": content()}], max_completion_tokens=200
    )
    choice = answer.choices[0]
    assert choice.message.content == expected.text and choice.finish_reason == "stop"
    assert len(choice.message.boxes) == len(expected.boxes) == 3
    for box, own in zip(choice.message.boxes, expected.boxes):
        assert box == {
            "ref": own.ref,
            "numbers": [own.x1, own.y1, own.x2, own.y2],
            "pixels": list(own.to_pixels(448, 448)),
            "image": 0,
        }
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)
    assert answer.object == "chat.completion" and answer.model == "demo" and answer.id.startswith("chatcmpl-")


def test_a_stream_has_openais_chunks(served, demo_model):
    expected = direct(demo_model, max_new_tokens=200)
    response = served.chat(content(), max_tokens=200, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    first, *middle, boxes, last, usage = events(response)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in middle) == expected.text
    assert [box["ref"] for box in boxes["choices"][0]["delta"]["boxes"]] == [box.ref for box in expected.boxes]
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(expected.token_ids)
    chunks = [first, *middle, boxes, last]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])


def test_answers_beside_others_are_those_alone(served, demo_model):
    asked = [(i % 4, f"{QUESTION}{' ' * (i // 4)}", None if i % 2 else i) for i in range(16)]

    def over_http(case: tuple) -> str:
        seed, text, sampled = case
        options = {} if sampled is None else {"temperature": 0.8, "seed": sampled, "top_p": 0.95}
        return served.chat(content(seed, text), max_tokens=8, **options).json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(over_http, asked))
    for (seed, text, sampled), answer in zip(asked, together):
        options = {} if sampled is None else {"temperature": 0.8, "seed": sampled, "top_p": 0.95}
        assert answer == direct(demo_model, seed, text, max_new_tokens=8, **options).text


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_have_consecutive_seeds(served, demo_model, stream):
    response = served.chat("Say something", n=3, seed=5, temperature=1.5, top_p=1, max_tokens=8, stream=stream)
    expected = demo_model.generate(
        [{"role": "user", "content": "Say something"}], n=3, seed=5, temperature=1.5, max_new_tokens=8
    )
    if stream:
        texts = ["", "", ""]
        for chunk in events(response):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content") or ""
    else:
        assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2]
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
        assert response.json()["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in expected)
    assert texts == [one.text for one in expected] and len(set(texts)) == 3


def test_seed_0_follows_seed_minus_1(served, demo_model):
    fields = {"temperature": 1.5, "top_p": 1, "max_tokens": 8}
    several = served.chat("Say something", n=2, seed=-1, **fields).json()["choices"]
    alone = [served.chat("Say something", seed=seed, **fields).json()["choices"][0] for seed in (-1, 0)]
    texts = [choice["message"]["content"] for choice in alone]
    assert [choice["message"]["content"] for choice in several] == texts and texts[0] != texts[1]
    message, options = [{"role": "user", "content": "Say something"}], {"temperature": 1.5, "max_new_tokens": 8}
    offline = demo_model.generate_batch(
        [{"prompt": message, "n": 2, "seed": (1 << 64) - 1, **options}]
    )  # as in batches
    assert [answer.text for answer in offline[0]] == texts


def test_several_answers_are_computed_side_by_side(served, demo_model, monkeypatch):
    schema = {"type": "array", "minItems": 6, "maxItems": 6, "items": {"type": "integer", "minimum": 0, "maximum": 99}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = [{"role": "user", "content": "Say six numbers"}]
    options = {"temperature": 1.5, "max_new_tokens": 99, "constraint": qvl.JsonSchema(json.dumps(schema))}
    alone = [demo_model.generate(message, seed=5 + i, **options) for i in range(4)]
    begin, begun, all_begun = demo_model.stream, [], threading.Event()

    def beginning(*given, **fields):
        begun.append(begin(*given, **fields))
        if len(begun) == 4:
            all_begun.set()
        return begun[-1]

    monkeypatch.setattr(demo_model, "stream", beginning)
    fields = {"n": 4, "seed": 5, "temperature": 1.5, "top_p": 1, "max_tokens": 99, "response_format": form}
    with ThreadPoolExecutor(1) as pool:
        with demo_model._scheduler.gate, demo_model._scheduler.device:  # nothing is computed
            asked = pool.submit(served.chat, "Say six numbers", stream=True, **fields)
            assert all_begun.wait(30), "no answer waits for another to end"
        choices = [chunk["choices"][0] for chunk in events(asked.result())]
    texts = ["".join(c["delta"].get("content") or "" for c in choices if c["index"] == i) for i in range(4)]
    assert texts == [one.text for one in alone] and len(set(texts)) == 4
    order = [choice["index"] for choice in choices[4:]]
    ends = [place for place, choice in enumerate(choices[4:]) if choice["finish_reason"]]
    assert len(ends) == 4 and set(order[: ends[0]]) == {0, 1, 2, 3}, "all have begun before one ends"


def test_boxes_are_in_pixels_of_the_picture_as_it_is_shown(demo_model):
    """A model that turns photos as their EXIF orientation says answers in pixels of the turned one."""
    sideways, out = picture(3).resize((448, 224)), io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    sideways.save(out, "JPEG", exif=exif)
    for turns, (width, height) in ((False, (448, 224)), (True, (224, 448))):
        with serving(qvl.load(demo_model.blob.path, device="cpu", exif=turns)) as server:
            parts = [image_part(out.getvalue()), {"type": "text", "text": "?"}]
            boxes = server.chat(parts, grounding=True, max_tokens=60).json()["choices"][0]["message"]["boxes"]
        assert boxes
        for box in boxes:
            sides = (width, height, width, height)
            assert box["pixels"] == [int(n / 1000 * side) for n, side in zip(box["numbers"], sides)]


def test_a_box_is_on_the_last_of_several_pictures(served):
    parts = [image_part(png(picture(1, 112))), image_part(png(picture(2, 224))), {"type": "text", "text": "?"}]
    boxes = served.chat(parts, grounding=True, max_tokens=60).json()["choices"][0]["message"]["boxes"]
    assert boxes and all(box["image"] == 1 for box in boxes)
    assert boxes[0]["pixels"] == [int(n / 1000 * 224) for n in boxes[0]["numbers"]]
