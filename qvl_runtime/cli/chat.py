"""`qvl chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.cli.conversation import Conversation
from qvl_runtime.cli.loading import load_shown
from qvl_runtime.cli.screen import Screen


def chat(
    model: Annotated[Path, typer.Argument(help="A .qvl file of a chat model.")],
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="A picture to begin with.")] = None,
    system: Annotated[str | None, typer.Option(help="What the assistant is told about itself.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or reference.")] = "auto",
    kv_cache: Annotated[str, typer.Option(help="fp16, or int8 for half the memory.")] = "fp16",
    activations: Annotated[str, typer.Option(help="On the CPU: auto, int16 (exact) or int8 (fast).")] = "auto",
    context: Annotated[int | None, typer.Option(help="Tokens of prompt and answer to make room for.")] = None,
    vision_device: Annotated[str | None, typer.Option(help="Another device for the pictures, such as cpu.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep what was seen of pictures here, for later.")] = None,
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
