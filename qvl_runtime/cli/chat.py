"""`qvl chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.cli.conversation import Conversation
from qvl_runtime.cli.loading import Activations, ContextTokens, Device, KVCache, VisionDevice, load_shown
from qvl_runtime.cli.screen import Screen


def chat(
    model: Annotated[Path, typer.Argument(help="A .qvl file of a chat model.")],
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="A picture to begin with.")] = None,
    system: Annotated[str | None, typer.Option(help="What the assistant is told about itself.")] = None,
    device: Device = "auto",
    kv_cache: KVCache = "fp16",
    activations: Activations = "auto",
    context: ContextTokens = None,
    vision_device: VisionDevice = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Keep what was seen of pictures here, for later (up to 2 GiB).")
    ] = None,
) -> None:
    """Talk with a chat model; /help inside lists what you can do.

    From a pipe it answers every line and prints the answers alone.

    Examples:

      qvl chat qwen-vl-chat.qvl

      qvl chat qwen-vl-chat.qvl --image cat.jpg

      echo "What is the capital of France?" | qvl chat qwen-vl-chat.qvl
    """
    loaded = load_shown(
        model,
        device,
        kv_cache,
        activations=activations,
        context=context,
        vision_device=vision_device,
        cache_dir=cache_dir,
    )
    conversation = Conversation(loaded, Screen(), system=system)
    for path in image or ():
        conversation.attach(path)
    if sys.stdin.isatty():
        _talk(conversation)
    else:
        for line in sys.stdin:
            conversation.take(line.rstrip("\n"))


def _talk(conversation: Conversation) -> None:
    """Read lines with history and editing until the user leaves."""
    from prompt_toolkit import PromptSession

    conversation.greet()
    session: PromptSession[str] = PromptSession()
    while conversation.open:
        try:
            line = session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            break
        conversation.take(line)
