"""`qvl demo`: convert the small model that ships with the package, and ask it about a fresh picture."""

from __future__ import annotations

import itertools
import shlex
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from qvl_convert.convert import convert
from qvl_runtime.cli.loading import Device
from qvl_runtime.demo import checkpoint_folder
from qvl_runtime.demo.conversations import SINGLE, Exchange
from qvl_runtime.demo.scenes import Scene, draw, random_scene
from qvl_runtime.demo.scoring import is_right
from qvl_runtime.drawing import draw_boxes
from qvl_runtime.loading import load
from qvl_runtime.model import Model
from qvl_runtime.results import Result

QUESTIONS = (
    ("ground", "en"), ("count", "en"), ("color", "zh"), ("find", "zh"), ("position", "en"), ("present", "zh"),
    ("read", "en"), ("second", "en"),
)  # fmt: skip
SIDE = 448


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the picture and the boxes.")] = Path("qvl-demo"),
    seed: Annotated[int | None, typer.Option(help="Draw this picture again; a fresh one if not given.")] = None,
    device: Device = "auto",
) -> None:
    """Try the small model that comes with the package.

    Converts it to 4 bits, draws a picture that nobody has seen, asks about it in English and Chinese, and saves the
    picture with the boxes of the answers. Everything stays in one folder, which may be deleted afterwards.

    Examples:

      qvl demo

      qvl demo --seed 7 --out /tmp/demo
    """
    began = time.perf_counter()
    source, blob = checkpoint_folder(), out / "demo.qvl"
    out.mkdir(parents=True, exist_ok=True)
    print("1. The model: the package's own small Qwen-VL, converted to 4 bits")
    print(f"   $ qvl convert {shlex.quote(str(source))} {shlex.quote(str(blob))} --force")
    convert(source, blob, force=True)
    before = (source / "model.safetensors").stat().st_size
    print(f"   {before / 1e6:.1f} MB in bf16 -> {blob.stat().st_size / 1e6:.1f} MB ({_since(began)})")

    seed = int(time.time()) % 1_000_000 if seed is None else seed
    rng = np.random.default_rng(seed)
    scene = fresh_scene(rng)
    picture = draw(scene, SIDE)
    picture.save(out / "picture.png")
    print(f"\n2. A fresh picture: {out / 'picture.png'} (draw it again with --seed {seed})")

    start = time.perf_counter()
    model = load(blob, device)
    print(f"\n3. Questions, answered on {model.ops.name} (loading took {_since(start)})")
    results = [_ask(model, exchange, picture) for exchange in questions(rng, scene)]

    boxes = [box for result in results for box in result.boxes]
    legend = draw_boxes(picture, boxes, out / "boxes.png").legend
    print(f"\n4. The boxes of the answers: {out / 'boxes.png'}")
    for number, label in legend.items():
        print(f"   {number}: {label}")
    spent = [result.timings for result in results]
    prompts, answers = (
        sum(getattr(t, count) for t in spent) / max(sum(getattr(t, seconds) for t in spent), 1e-9)
        for count, seconds in (("prompt_tokens", "prefill"), ("new_tokens", "decode"))
    )
    picture_time = sum(t.image for t in spent) / len(spent)
    print(f"\n   picture {picture_time * 1000:.1f} ms, prompt {prompts:,.0f} tokens/s, answer {answers:,.0f} tokens/s")
    print(f"   all in {_since(began)}. Go on by yourself:")
    asked = f"qvl generate {shlex.quote(str(blob))} 'Describe the picture.' --image"
    print(f"   $ {asked} {shlex.quote(str(out / 'picture.png'))}")
    print(f"   $ qvl chat {shlex.quote(str(blob))}")


def fresh_scene(rng: np.random.Generator) -> Scene:
    """A picture of three or four shapes and a printed number."""
    while True:
        scene = random_scene(rng, text_share=1.0)
        if len(scene.things) == 3 and scene.text and len(scene.text.lines) == 1:
            return scene


def questions(rng: np.random.Generator, scene: Scene) -> list[Exchange]:
    """One question for each of QUESTIONS that the scene allows."""
    asked = []
    for skill, language in QUESTIONS:
        tries = (SINGLE[skill][0](rng, language, scene) for _ in range(20))
        asked += list(itertools.islice((e for e in tries if e), 1))
    return asked


def _ask(model: Model, exchange: Exchange, picture: Image.Image) -> Result:
    """Put the turns of a conversation one after the other and show the answers as they come; the last result."""
    messages = []
    for question, truth in exchange.turns:
        slot = "" if messages else "Picture 1: <img></img>\n"
        messages.append({"role": "user", "content": slot + question})
        print(f"\n   > {question}\n   ", end="")
        answer = model.stream(messages, [picture], max_new_tokens=160)
        for piece in answer:
            print(piece.text, end="", flush=True)
        result = answer.result()
        print("" if is_right(result.text, truth) else f"      [wrong: {truth}]")
        messages.append({"role": "assistant", "content": result.text})
    return result


def _since(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"
