"""Helpers of the tests of the server's page, on a playwright page."""

from __future__ import annotations

import base64
import json

ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic", "--no-first-run"]
CONTROLLED = """() => {
    window.fetch = (path, {body, signal}) => {
        window.sent = JSON.parse(body);
        const stream = new ReadableStream({start: (control) => {
            window.feed = (text) => control.enqueue(new TextEncoder().encode(text));
            signal.addEventListener("abort", () => control.error(signal.reason));
        }});
        return Promise.resolve(new Response(stream));
    };
}"""
"""Puts the stream of an answer into the test's hands."""

DROP = """([name, type, content]) => {
    const data = new DataTransfer();
    const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
    data.items.add(new File([bytes], name, {type}));
    for (const event of ["dragover", "drop"]) {
        document.querySelector("#stage").dispatchEvent(
            new DragEvent(event, {bubbles: true, cancelable: true, dataTransfer: data}));
    }
}"""


def drop_file(page, content: bytes, name: str, kind: str) -> None:
    """Drop a file on the page, as from a file manager."""
    page.evaluate(DROP, [name, kind, base64.b64encode(content).decode()])


def drop(page, content: bytes, name: str = "scene.png", kind: str = "image/png") -> None:
    """Drop a picture, and wait until the page has it."""
    attached = page.locator("#attached li")
    before = attached.count()
    drop_file(page, content, name, kind)
    attached.nth(before).wait_for()


def ask(page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def answers(page) -> list[str]:
    return page.locator(".answer .text").all_inner_texts()


def chunk(text: str = "", **delta) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text, **delta}}]})}\n\n"


def canned(page, text: str, boxes: list | None = None) -> list[dict]:
    """Answer every question with `text`; the list of requests grows as they arrive."""
    requests: list[dict] = []

    def fulfil(route):
        requests.append(json.loads(route.request.post_data))
        body = f": ping\n\n{chunk(text)}{chunk(boxes=boxes or [])}data: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", fulfil)
    return requests


def corners(rect) -> list[float]:
    """A rectangle of the overlay in pixels of the picture."""
    x, y, width, height = (float(rect.get_attribute(name)) for name in ("x", "y", "width", "height"))
    return [x, y, x + width, y + height]


def classes(page, selector: str) -> list[str]:
    """The class of each matching element."""
    return page.locator(selector).evaluate_all("all => all.map((e) => e.getAttribute('class'))")
