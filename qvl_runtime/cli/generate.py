"""`qvl generate`: answer one prompt."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.cli.loading import (
    Activations,
    AllowUrls,
    ContextTokens,
    Device,
    KVCache,
    MaxPixels,
    ModelFile,
    VisionDevice,
    load_shown,
)
from qvl_runtime.cli.sampling import (
    FrequencyPenalty,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    SchemaFile,
    Stop,
    Temperature,
    TopK,
    TopP,
    read_schema,
)
from qvl_runtime.cli.text import one_line, printable, standard_input
from qvl_runtime.drawing import draw_boxes
from qvl_runtime.engine.generation import Piece
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.image_tags import split_images
from qvl_runtime.inputs.images import ImageSource, decode_image, image_label, load_image, read_image
from qvl_runtime.model import Model
from qvl_runtime.results import Result
from qvl_runtime.saving import check_no_input, check_path


def generate(
    model: ModelFile,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from standard input.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", metavar="FILE", help="A picture; repeat for several.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in a chat turn, as `qvl chat` does, but greedy by default.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens of the answer.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Stop = None,
    schema: SchemaFile = None,
    draw: Annotated[Path | None, typer.Option(help="File for the last picture with the answer's boxes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
    device: Device = "auto",
    kv_cache: KVCache = "fp16",
    activations: Activations = "auto",
    context: ContextTokens = None,
    vision_device: VisionDevice = None,
    max_pixels: MaxPixels = None,
    allow_urls: AllowUrls = False,
) -> None:
    """Answer a prompt, with pictures if the model supports them.

    The prompt is raw text; with --chat it is the user's turn of a chat, which chat models need for most questions. The
    last line end of standard input is removed.

    \b
    Examples:
      qvl generate qwen-vl.qvl "Describe the image in English:" -i cat.jpg
      qvl generate qwen-vl.qvl "<img>cat.jpg</img><ref>the cat</ref><box>" --draw found.png
      qvl generate qwen3-vl.qvl --chat "What is on the table?" -i table.jpg
      qvl generate qwen3-vl.qvl --chat "Read the receipt." -i receipt.jpg --json-schema receipt.json
      qvl generate qwen-vl.qvl - --json < prompt.txt
    """
    constraint = read_schema(schema)
    text = "".join(standard_input()).removesuffix("\n") if prompt == "-" else prompt
    picture: ImageSource | None = None
    if draw is not None:
        check_path(draw)
        check_no_input(draw, [model, *(image or ()), *split_images(text)[1::2]])
        source = _last_picture(text, image)
        picture = read_image(source, allow_urls=allow_urls)
        decode_image(picture, image_label(source))
    loaded = load_shown(
        model,
        device,
        kv_cache,
        activations=activations,
        context=context,
        vision_device=vision_device,
        max_pixels=max_pixels,
    )
    if chat and not loaded.is_chat:
        raise QvlError(f"{model}: is a base model and has no chat turns; leave out --chat")
    pieces = loaded.stream(
        [*({"image": source} for source in image or ()), {"text": text}] if chat else text,
        None if chat else image,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or (),
        constraint=constraint,
        allow_urls=allow_urls,
    )
    if not as_json:
        _show(pieces)
    result = pieces.result()
    print(json.dumps(to_json(result), ensure_ascii=False) if as_json else "")
    if picture is not None:
        upright = loaded.pictures is not None and loaded.pictures.reader.upright
        seen = load_image(picture, exif=upright)
        if numbers := draw_boxes(seen, result.boxes, draw).note:
            print(f"qvl: {numbers}", file=sys.stderr)
        if not result.boxes:
            print(one_line(f"qvl: the answer has no boxes: {draw} is the picture alone"), file=sys.stderr)
    if note := _note(loaded, result, max_new_tokens, chat):
        print(f"qvl: {note}", file=sys.stderr)


def _last_picture(prompt: str, images: list[str] | None) -> ImageSource:
    named = split_images(prompt)[1::2]
    if named and named[-1]:
        return named[-1]
    if images:
        return images[-1]
    raise QvlError("--draw needs a picture to draw on; name one with --image")


def _note(model: Model, result: Result, max_new_tokens: int, chat: bool) -> str | None:
    """Explain an answer that ended early."""
    if result.finish_reason == "length" and len(result.token_ids) < max_new_tokens:
        window = model.config.max_position_embeddings
        remedy = f"--context may be up to {window}" if model.window < window else "shorten the prompt"
        return f"the answer was cut: prompt and answer fill the context of {model.window} tokens; {remedy}"
    if result.finish_reason == "length" and result.reasoning and not result.text.strip():
        return f"the reasoning took all {max_new_tokens} tokens and left none for the answer: raise --max-new-tokens"
    if not result.text.strip() and result.finish_reason == "stop":
        remedy = "; this is a chat model: --chat asks it in a chat turn" if model.is_chat and not chat else ""
        return f"the model ended its answer at once{remedy}"
    return None


def _show(pieces: Iterator[Piece]) -> None:
    """Print the pieces of an answer; control characters are escaped, and only a terminal gets reasoning."""
    show = printable if sys.stdout.isatty() else str
    for piece in pieces:
        if not piece.reasoning:
            print(show(piece.text), end="", flush=True)
        elif sys.stderr.isatty():
            print(printable(piece.text), end="", file=sys.stderr, flush=True)


def to_json(result: Result) -> dict:
    """Return a result and its speeds as JSON types."""
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    document = dataclasses.asdict(result)
    document["timings"] |= {name: round(getattr(result.timings, name), 3) for name in rates}
    return document
