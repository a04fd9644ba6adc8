"""`qvl demo`: convert the small model of the package, and ask it about a new picture."""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from qvl_convert.convert import convert
from qvl_runtime.blob import Blob
from qvl_runtime.cli.loading import Device
from qvl_runtime.cli.text import duration, size
from qvl_runtime.demo import checkpoint_folder
from qvl_runtime.demo.conversations import LANGUAGES, SINGLE, Exchange
from qvl_runtime.demo.scenes import Scene, draw, random_scene
from qvl_runtime.demo.scoring import is_right
from qvl_runtime.drawing import draw_boxes
from qvl_runtime.errors import QvlError
from qvl_runtime.loading import load
from qvl_runtime.model import Model
from qvl_runtime.results import Result

QUESTIONS = (
    ("ground", "en"), ("count", "en"), ("color", "zh"), ("find", "zh"), ("position", "en"), ("present", "zh"),
    ("read", "en"), ("second", "en"),
)  # fmt: skip
SIDE = 448
FILES = ("demo.qvl", "picture.png", "boxes.png")
"""The files it writes, the model first."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the picture and the boxes.")] = Path("qvl-demo"),
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draw the picture of this seed; by default a new one.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Try the small model that comes with the package.

    Converts it to 4 bits, draws a picture that nobody has seen, asks about it in English and Chinese, and saves the
    picture with the boxes of the answers. Everything stays in one folder, which may be deleted afterwards.

    \b
    Examples:
      qvl demo
      qvl demo --seed 7 --out /tmp/demo
    """
    began = time.perf_counter()
    # An environment that is not activated has no qvl on the PATH.
    program = "qvl" if shutil.which("qvl") else f"{shlex.quote(sys.executable)} -m qvl_runtime"
    source, blob = checkpoint_folder(), out / "demo.qvl"
    _make_folder(out)
    print("1. The model: the package's own small Qwen-VL, converted to 4 bits")
    print(f"   $ {program} convert {shlex.quote(str(source))} {shlex.quote(str(blob))} --force")
    convert(source, blob, force=True)
    before = (source / "model.safetensors").stat().st_size
    print(f"   {size(before)} in bf16 -> {size(blob.stat().st_size)} ({_since(began)})")

    seed = int(time.time()) % 1_000_000 if seed is None else seed
    rng = np.random.default_rng(seed)
    scene = fresh_scene(rng)
    picture = draw(scene, SIDE)
    picture.save(out / "picture.png")
    print(f"\n2. A fresh picture: {out / 'picture.png'} (draw it again with --seed {seed})")

    start = time.perf_counter()
    model = load(blob, device)
    print(f"\n3. Questions, answered on {model.ops.name} (loading took {_since(start)})")
    # English only on a terminal that cannot show Chinese.
    languages = LANGUAGES if _can_print("中文") else ("en",)
    results = [_ask(model, exchange, picture) for exchange in questions(rng, scene, languages)]

    boxes = [box for result in results for box in result.boxes]
    note = draw_boxes(picture, boxes, out / "boxes.png").note
    print(f"\n4. The boxes of the answers: {out / 'boxes.png'}")
    if note:
        print(f"   {note}")
    spent = [result.timings for result in results]
    prompts, answers = (
        sum(getattr(t, count) for t in spent) / max(sum(getattr(t, seconds) for t in spent), 1e-9)
        for count, seconds in (("prompt_tokens", "prefill"), ("new_tokens", "decode"))
    )
    # The features of the picture are cached after the first question.
    print(f"\n   picture {duration(spent[0].image)}, prompt {prompts:,.0f} tokens/s, answer {answers:,.0f} tokens/s")
    print(f"   all in {_since(began)}. Go on by yourself:")
    asked = f"{program} generate --chat {shlex.quote(str(blob))} 'Describe the picture.' --image"
    print(f"   $ {asked} {shlex.quote(str(out / 'picture.png'))}")
    print(f"   $ {program} chat {shlex.quote(str(blob))}")


def fresh_scene(rng: np.random.Generator) -> Scene:
    """Create a picture of three or four shapes and a printed number."""
    while True:
        scene = random_scene(rng, text_share=1.0)
        if len(scene.things) == 3 and scene.text and len(scene.text.lines) == 1:
            return scene


def _make_folder(out: Path) -> None:
    """Create the folder; refuse to replace files that `qvl demo` did not write."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise QvlError(f"{out}: is a file; name a folder with --out") from None
    except OSError as error:
        raise QvlError(f"{out}: cannot be made ({error.strerror}); name another folder with --out") from None
    taken = [name for name in FILES if (out / name).exists()]
    if taken and not _is_demo_model(out / FILES[0]):
        raise QvlError(f"{out / taken[0]}: exists and is not of qvl demo; name another folder with --out")


def _is_demo_model(path: Path) -> bool:
    try:
        return Blob(path).metadata["source"].get("name") == checkpoint_folder().name
    except QvlError:
        return False


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def questions(rng: np.random.Generator, scene: Scene, languages: Sequence[str] = LANGUAGES) -> list[Exchange]:
    """Return a question for each of QUESTIONS that fits the scene, in its language or the first of `languages`."""
    asked = []
    for skill, wanted in QUESTIONS:
        language = wanted if wanted in languages else languages[0]
        tries = (SINGLE[skill][0](rng, language, scene) for _ in range(20))
        asked += list(itertools.islice((e for e in tries if e), 1))
    return asked


def _ask(model: Model, exchange: Exchange, picture: Image.Image) -> Result:
    """Ask the turns of a conversation, print the answers as they are generated, and return the last result."""
    messages: list[dict[str, str]] = []
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
    return duration(time.perf_counter() - start)
