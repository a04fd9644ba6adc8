"""The server's page in a real browser: what it shows, what it sends, and that it sends nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from browsing import ARGS, CONTROLLED, answers, ask, canned, chunk, classes, corners, drop, drop_file
from PIL import Image
from serving import QUESTION, picture, png, serving

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("the page is tested in Debian's chromium: apt-get install chromium", allow_module_level=True)
KEY = "a-key-of-22-characters"
WANTED = re.compile(r"^Failed to load resource: (net::ERR_FAILED|the server responded with a status of (400|401|429) )")
"""Console messages of the errors that tests cause."""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, served):
    """``open_page(**options of the context)``: the page; errors and requests elsewhere fail the test at the end."""
    contexts, problems = [], []

    def opened(url: str = served.url, **options):
        context = browser.new_context(**{"viewport": {"width": 1366, "height": 768}, "locale": "en-US", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        # Chromium logs violations of the Content-Security-Policy, too.
        page.on("console", lambda line: WANTED.search(line.text) or problems.append(line.text))
        page.on("request", lambda sent: sent.url.startswith((url, "blob:", "data:")) or problems.append(sent.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def test_boxes_are_drawn_where_the_model_sees_things(open_page, demo_model):
    image = picture(3, 448).resize((640, 448))
    expected = demo_model.generate(
        [{"role": "user", "content": [{"image": png(image)}, {"text": QUESTION}]}], max_new_tokens=200
    )
    page = open_page()
    drop(page, png(image))
    ask(page, QUESTION)
    page.wait_for_selector(".answer.done")
    assert page.locator(".answer .phrase").all_inner_texts() == [box.ref for box in expected.boxes]
    rects = page.locator("#overlay rect.box").all()
    assert [corners(rect) for rect in rects] == [list(box.to_pixels(640, 448)) for box in expected.boxes]
    assert len(rects) > 1

    for size in ({"width": 1366, "height": 768}, {"width": 390, "height": 844}):
        page.set_viewport_size(size)
        shown = page.locator("#shown").bounding_box()
        assert shown["width"] / shown["height"] == pytest.approx(640 / 448, rel=0.01)
        for rect, box in zip(rects, expected.boxes):
            drawn = rect.evaluate("e => { const r = e.getBoundingClientRect(); return [r.x, r.y, r.right, r.bottom] }")
            scale = shown["width"] / 640
            x1, y1, x2, y2 = (v * scale for v in box.to_pixels(640, 448))
            left, top = shown["x"], shown["y"]
            # The rectangle of an element has its stroke around it.
            assert drawn == pytest.approx([left + x1, top + y1, left + x2, top + y2], abs=3)

    page.set_viewport_size({"width": 1366, "height": 768})
    page.locator(".answer .phrase").nth(1).hover()
    assert "lit" in classes(page, "#overlay rect.box")[1] and "dim" in classes(page, "#overlay rect.box")[0]
    shown, box = page.locator("#shown").bounding_box(), expected.boxes[0].to_pixels(640, 448)
    scale = shown["width"] / 640
    page.mouse.move(shown["x"] + (box[0] + 3) * scale, shown["y"] + (box[1] + 3) * scale)
    assert "lit" in classes(page, ".answer .phrase")[0]


def test_a_dragged_box_is_asked_about(open_page, demo_model):
    image = picture(3)
    page = open_page()
    drop(page, png(image))
    shown = page.locator("#shown").bounding_box()
    scale = shown["width"] / 448
    page.mouse.move(shown["x"] + 40 * scale, shown["y"] + 300 * scale)
    page.mouse.down()
    page.mouse.move(shown["x"] + 200 * scale, shown["y"] + 520 * scale, steps=3)  # beyond the lower edge
    page.mouse.up()
    assert page.input_value("#question") == "What is in [box 1]?"
    with page.expect_request("**/v1/chat/completions") as sent:
        page.press("#question", "Enter")
    before, box, after = json.loads(sent.value.post_data)["messages"][0]["content"][1:]
    assert (before["text"], after["text"]) == ("What is in ", "?") and box["image"] == 0
    assert box["pixels"] == pytest.approx([40, 300, 200, 448], abs=1)
    page.wait_for_selector(".answer.done")
    mark = demo_model.blob.family.grounding.mark(box["pixels"], SimpleNamespace(size=(448, 448)))
    content = [{"image": png(image)}, {"text": f"What is in {mark}?"}]
    expected = demo_model.generate([{"role": "user", "content": content}])
    assert page.locator(".answer .text").text_content() == expected.text.replace("<ref>", "").replace("</ref>", "")


def test_a_box_can_be_made_with_keys(open_page):
    page = open_page()
    requests = canned(page, "a heart")
    drop(page, png(picture(3)))
    page.focus("#frame")
    for key in ("b", "ArrowLeft", "ArrowUp", "Shift+ArrowRight", "Shift+ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer.done")
    step = round(448 / 50)
    part = requests[0]["messages"][0]["content"][2]
    assert part == {"type": "box", "image": 0, "pixels": [134 - step, 134 - step, 314, 314]}


def test_hostile_answers_stay_text(open_page):
    hostile = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'><ref><b onclick=alert(1)>x</b></ref>"
    page = open_page()
    canned(page, hostile, [{"ref": "<i>r</i>", "numbers": [1, 2, 3, 4], "pixels": [10, 20, 30, 40], "image": 0}])
    drop(page, png(picture(3)), name="<b>.png")
    ask(page, "<img src=x onerror='window.hit = 1'>")
    page.wait_for_selector(".answer.done")
    assert answers(page) == [hostile.replace("<ref>", "").replace("</ref>", "")]
    assert page.locator("#tags .tag").inner_text() == "<i>r</i>"
    assert page.locator("#log :is(script, b, i, img[onerror]), #tags i").count() == 0
    assert page.evaluate("window.hit") is None


NOTATIONS = [
    ("two <ref>a cat</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>!",
     ["two ", ["a cat", [[1, 2, 3, 4], [5, 6, 7, 8]]], "!"]),
    ("<|object_ref_start|>猫<|object_ref_end|><|box_start|>(1, 2), (3,4)<|box_end|>", [["猫", [[1, 2, 3, 4]]]]),
    ("<box>(1,2),(3,4)</box>", [["", [[1, 2, 3, 4]]]]),
    ("<box>(1,2),(3)</box> <ref>open", ["<box>(1,2),(3)</box> <ref>open"]),
    ("<ref> <ref>b</ref>", ["<ref> ", ["b", []]]),
    ('```json\n[\n\t{"bbox_2d": [1, 2, 3.5, 4], "label": "a {b}"},\n\t{"bbox_2d": [5, 6, 7, 8]}\n]\n``` end',
     [["a {b}", [[1, 2, 3.5, 4]]], " ", ["", [[5, 6, 7, 8]]], " end"]),
    ('{"a": 1} x {"bbox_2d": [1, 2]} [1]', ['{"a": 1} x {"bbox_2d": [1, 2]} [1]']),
]  # fmt: skip


def test_notations_of_every_family_become_phrases(open_page):
    page = open_page()
    read = """async (text) => (await (await import("/notation.js")).pieces(text))
        .map((piece) => piece.text ?? [piece.phrase, piece.numbers])"""
    assert [page.evaluate(read, text) for text, _ in NOTATIONS] == [found for _, found in NOTATIONS]
    # However a stream cuts them, no half of a tag is shown.
    seen = """async (text) => {
        const {pieces} = await import("/notation.js");
        return Array.from(text, (_, end) => pieces(text.slice(0, end), true).map((p) => p.text ?? p.phrase).join(""));
    }"""
    for text in (NOTATIONS[0][0], NOTATIONS[1][0], NOTATIONS[5][0]):
        assert not [shown for shown in page.evaluate(seen, text) if set(shown) & set('<>|[]()`"')]


def test_an_answer_streams_and_can_be_stopped(open_page):
    page = open_page()
    page.wait_for_selector("#model:not(:empty)")
    page.evaluate(CONTROLLED)
    ask(page, "hello")
    assert page.locator(".answer.waiting").count() == 1 and not page.is_visible("#send")
    page.evaluate("text => feed(text)", ": ping\n\n" + chunk("first 一") + chunk(" sec")[:-9])
    page.wait_for_selector(".answer.streaming")
    page.evaluate("text => feed(text)", chunk(" sec")[-9:] + ": ping\n\n")
    sync_api.expect(page.locator(".answer .text")).to_have_text("first 一 sec")
    page.click("#stop")
    page.wait_for_selector(".answer.failed")
    assert answers(page) == ["first 一 sec"] and page.locator(".actions small").inner_text() == "Stopped"

    # What was stopped is part of the conversation; an error in the middle of a stream is shown.
    ask(page, "more")
    sent = page.evaluate("window.sent.messages")
    assert sent[1] == {"role": "assistant", "content": "first 一 sec"} and len(sent) == 3
    page.evaluate("text => feed(text)", chunk("half") + 'data: {"error": {"message": "out of luck"}}\n\n')
    assert page.locator(".answer .error b").inner_text() == "out of luck"
    page.click(".actions >> text=Retry")
    assert page.evaluate("window.sent.messages") == sent
    page.evaluate("text => feed(text)", chunk(reasoning_content="<i>hm"))
    assert page.locator(".reasoning p").inner_text() == "<i>hm"
    page.evaluate("text => feed(text)", chunk("whole") + "data: [DONE]\n\n")
    page.wait_for_selector(".turn:nth-child(2) .answer.done")
    assert answers(page) == ["first 一 sec", "whole"] and not page.is_visible(".reasoning p")


def test_undo_takes_a_question_back_and_new_forgets_all(open_page):
    page = open_page()
    requests = canned(page, "<ref>x</ref><box>(1,2),(3,4)</box>")
    drop(page, png(picture(3)))
    ask(page, "one")
    page.wait_for_selector(".answer.done")
    drop(page, png(picture(4)))
    ask(page, "two")
    page.wait_for_selector(".turn:nth-child(2) .answer.done")
    assert [len([p for p in m["content"] if p["type"] == "image_url"]) for m in requests[1]["messages"][::2]] == [1, 1]
    assert requests[1]["messages"][1]["content"] == "<ref>x</ref><box>(1,2),(3,4)</box>"
    page.click("text=Undo")
    assert page.input_value("#question") == "two" and page.locator(".turn").count() == 1
    assert page.locator("#attached li").count() == 1
    page.click("#attached .remove")
    ask(page, "three")
    page.wait_for_selector(".turn:nth-child(2) .answer.done")
    assert [part["type"] for part in requests[2]["messages"][2]["content"]] == ["text"]
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.is_visible("#empty")
    page.click("#toast button")
    assert page.locator(".turn").count() == 2 and page.is_visible("#view")


def test_settings_hold_for_every_question(open_page):
    page = open_page()
    requests = canned(page, "yes")
    ask(page, "one")
    page.wait_for_selector(".answer.done")
    page.click("#settings")
    page.fill("#set-system", " Be brief. ")
    page.fill("#set-temperature", "0.5")
    page.fill("#set-longest", "7")
    page.check("#set-grounding")
    page.press("#set-longest", "Enter")
    page.reload()
    page.wait_for_selector("#model:not(:empty)")
    assert classes(page, "#settings") == ["quiet round on"]
    ask(page, "two")
    page.wait_for_selector(".answer.done")
    for leave in ("#set-cancel", "#settings-form .primary"):  # only what is saved holds
        page.click("#settings")
        page.click("#set-defaults")
        page.click(leave)
        page.click(".actions >> text=Retry")
        page.wait_for_selector(".answer.done")
    plain, system = {"role": "user", "content": [{"type": "text", "text": "two"}]}, {"role": "system"}
    known = ("temperature", "max_tokens", "grounding")
    assert [[request.get(name) for name in known] for request in requests] == [
        [None, None, None], [0.5, 7, True], [0.5, 7, True], [None, None, None]
    ]  # fmt: skip
    assert [request["messages"] for request in requests[1:]] == [
        [system | {"content": "Be brief."}, plain], [system | {"content": "Be brief."}, plain], [plain]
    ]  # fmt: skip
    assert classes(page, "#settings") == ["quiet round"]


def test_keys_take_a_question_back_and_begin_anew(open_page):
    page = open_page()
    canned(page, "yes")
    ask(page, "one")
    page.wait_for_selector(".answer.done")
    page.press("#question", "ArrowUp")
    assert page.input_value("#question") == "one" and page.locator(".turn").count() == 0
    page.press("#question", "ArrowUp")  # moves in a text
    page.press("#question", "Enter")
    page.wait_for_selector(".answer.done")
    page.keyboard.press("Control+Shift+O")
    assert page.locator(".turn").count() == 0 and page.input_value("#question") == ""
    page.click("#toast button")
    assert answers(page) == ["yes"]


def test_an_answer_tells_its_speed_and_the_room_left(open_page):
    page = open_page()
    page.wait_for_selector("#model:not(:empty)")
    page.evaluate(CONTROLLED)
    ask(page, "one")
    page.wait_for_selector(".answer.waiting")
    page.evaluate("text => feed(text)", chunk("many words"))
    page.wait_for_selector(".answer.streaming")
    page.wait_for_timeout(60)
    usage = {"prompt_tokens": 7000, "completion_tokens": 100}
    page.evaluate("text => feed(text)", f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n")
    page.wait_for_selector(".answer.done")
    assert re.fullmatch(r"[\d.]+ s · 100 tokens · \d+ tokens/s", page.locator(".actions small").inner_text())
    assert "7,100 of 8,192 tokens" in page.locator("#device.full").inner_text()
    # What arrives at once says nothing about the speed.
    ask(page, "two")
    page.wait_for_selector(".answer.waiting")
    page.evaluate(
        "text => feed(text)",
        f"{chunk('many words')}data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n",
    )
    page.wait_for_selector(".turn:nth-child(2) .answer.done")
    assert re.fullmatch(r"[\d.]+ s · 100 tokens", page.locator(".turn:nth-child(2) .actions small").inner_text())


def test_enter_of_an_input_method_does_not_send(open_page):
    page = open_page(locale="zh-CN")
    requests = canned(page, "好")
    page.wait_for_selector("#model:not(:empty)")
    assert (
        page.get_attribute("html", "lang") == "zh-CN" and page.get_attribute("#question", "placeholder") == "想问什么…"
    )
    page.fill("#question", "ni hao")
    press = "(e, more) => e.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...more}))"
    for more in ({"isComposing": True}, {"keyCode": 229}, {"shiftKey": True}):
        page.locator("#question").evaluate(press, more)
    assert requests == [] and page.input_value("#question") == "ni hao"
    page.press("#question", "Enter")
    page.wait_for_selector(".answer.done")
    assert len(requests) == 1


def test_a_turned_photo_is_sent_as_it_is_shown(open_page):
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("red", (0, 0, 32, 32))
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # its left side is shown on top
    image.save(out, "JPEG", exif=exif, quality=95)
    page = open_page()
    requests = canned(page, "ok")
    drop(page, out.getvalue(), "photo.jpg", "image/jpeg")
    assert page.locator("#caption").inner_text() == "Picture 1: 32 × 64 pixels"
    drop(page, png(image))
    ask(page, "x")
    page.wait_for_selector(".answer.done")
    turned, same = (p["image_url"]["url"] for p in requests[0]["messages"][0]["content"][:2])
    assert base64.b64decode(same.partition(",")[2]) == png(image)  # otherwise the file's own bytes
    sent = Image.open(io.BytesIO(base64.b64decode(turned.partition(",")[2])))
    assert sent.size == (32, 64) and sent.getexif().get(0x0112, 1) == 1
    assert sent.getpixel((16, 8))[0] > 200 and sent.getpixel((16, 56))[2] > 200


def test_the_picture_is_saved_with_its_boxes(open_page, tmp_path):
    page = open_page()
    box = {"ref": "x", "numbers": [1, 2, 3, 4], "pixels": [100, 200, 300, 260], "image": 0}
    canned(page, "x", [box])
    drop(page, png(Image.new("RGB", (400, 300), "black")), "photo.one.jpg")
    assert not page.is_visible("#download")
    ask(page, "x")
    page.wait_for_selector(".answer.done")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "photo.one-boxes.png"
    saved = Image.open(download.value.path())
    assert saved.size == (400, 300) and saved.getpixel((200, 230))[:3] == (0, 0, 0)
    tone = Image.new(
        "RGB", (1, 1), page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--tone-0')")
    )
    assert {saved.getpixel(at)[:3] for at in ((200, 260), (300, 230), (100, 240))} == {tone.getpixel((0, 0))}


def test_problems_say_what_to_do(open_page):
    page = open_page()
    error = {"error": {"message": "64 requests wait already", "type": "rate_limit_error"}}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, json=error),
    )
    page.wait_for_selector("#model:not(:empty)")
    ask(page, "x")
    assert page.locator(".answer .error").inner_text().split("\n") == [
        "64 requests wait already", "Many are asking at the moment. Retry in 7 s."
    ]  # fmt: skip
    error = {"error": {"message": "the prompt takes 9 tokens", "code": "context_length_exceeded"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json=error))
    page.click(".actions >> text=Retry")
    sync_api.expect(page.locator(".answer .error")).to_contain_text("Undo a turn, or start a new conversation.")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click(".actions >> text=Retry")
    sync_api.expect(page.locator(".answer .error")).to_contain_text("qvl serve")
    canned(page, "back")
    ask(page, "y")
    page.wait_for_selector(".answer.done")
    assert page.locator(".question p").all_inner_texts() == ["y"]  # the one without an answer is gone
    drop_file(page, b"no picture", "x.txt", "text/plain")
    assert "x.txt is not a picture" in page.locator("#toast").inner_text()


def test_a_key_is_asked_for_and_stays_out_of_addresses(open_page, demo_model):
    with serving(demo_model, api_keys=[KEY]) as guarded:
        page = open_page(guarded.url)
        page.click("#key-cancel")
        assert "needs a key" in page.locator("#log .error").inner_text()
        page.click("#log >> text=Retry")
        for key, state in (("wrong", "hidden"), (KEY, "visible")):
            page.wait_for_selector("#key-wrong", state=state)
            page.fill("#ask-key[open] #key", key)
            page.press("#key", "Enter")
        page.wait_for_selector("#model:not(:empty)")
        assert not page.is_visible("#ask-key")
        with page.expect_request("**/v1/chat/completions") as sent:
            ask(page, "hello")
        assert sent.value.headers["authorization"] == f"Bearer {KEY}" and KEY not in sent.value.url
        page.wait_for_selector(".answer.done")
        page.reload()
        page.wait_for_selector("#model:not(:empty)")
        assert KEY not in page.url and page.evaluate("localStorage.length") == 0


def test_it_fits_a_phone(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, color_scheme="dark")
    canned(page, "a very-long-word" * 40)
    page.wait_for_selector("#draw:visible")
    page.tap("#draw")
    page.wait_for_selector(".chip")
    page.tap(".chip >> nth=0")
    page.wait_for_selector(".answer.done")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for name in ("#shown", "#question", "#send", "#new", "#theme"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844, name
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.tap("#theme")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark, light) == ("rgb(23, 22, 20)", "rgb(246, 244, 239)")


def test_files_of_the_page_are_short_and_load_nothing():
    folder = Path(__file__).parents[1] / "qvl_runtime" / "server" / "page"
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert {"index.html", "style.css", "app.js"} <= set(texts)
    assert [name for name, text in texts.items() if text.count("\n") >= 400] == []
    for name, text in texts.items():
        bare = text.replace("http://www.w3.org/2000/svg", "")
        assert not [
            word
            for word in ("http:", "https:", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval(")
            if word in bare
        ], name
