"""`qvl chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qvl_runtime.cli.conversation import Conversation
from qvl_runtime.cli.loading import (
    Activations,
    AllowUrls,
    ContextTokens,
    Device,
    KVCache,
    MaxPixels,
    VisionDevice,
    load_shown,
)
from qvl_runtime.cli.screen import Screen
from qvl_runtime.cli.text import standard_input


def chat(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A .qvl file of a chat model.")],
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", metavar="FILE", help="A picture for the first question.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    device: Device = "auto",
    kv_cache: KVCache = "fp16",
    activations: Activations = "auto",
    context: ContextTokens = None,
    vision_device: VisionDevice = None,
    max_pixels: MaxPixels = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Store the features of pictures in this folder (up to 2 GiB).")
    ] = None,
    allow_urls: AllowUrls = False,
) -> None:
    """Talk with a chat model; /help lists the commands.

    From a pipe it answers every line and prints only the answers. The exit status is 1 if a line failed.

    \b
    Examples:
      qvl chat qwen-vl-chat.qvl
      qvl chat qwen-vl-chat.qvl --image cat.jpg
      echo "Describe it." | qvl chat qwen-vl-chat.qvl -i cat.jpg
    """
    loaded = load_shown(
        model,
        device,
        kv_cache,
        activations=activations,
        context=context,
        vision_device=vision_device,
        max_pixels=max_pixels,
        cache_dir=cache_dir,
    )
    conversation = Conversation(loaded, Screen(), system=system, allow_urls=allow_urls)
    for source in image or ():
        conversation.attach(source)
    if sys.stdin is not None and sys.stdin.isatty():
        _talk(conversation)
        return
    for line in standard_input():
        conversation.take(line)
        if not conversation.open:
            break
    if conversation.failed:
        raise typer.Exit(1)


def _talk(conversation: Conversation) -> None:
    """Read lines with history and editing until the user quits; Ctrl-C only ends the current answer."""
    from prompt_toolkit import PromptSession

    conversation.greet()
    session: PromptSession[str] = PromptSession(enable_suspend=True)  # Ctrl-Z, as in other programs
    while conversation.open:
        try:
            conversation.take(session.prompt("> "))
        except KeyboardInterrupt:
            continue
        except EOFError:
            break
