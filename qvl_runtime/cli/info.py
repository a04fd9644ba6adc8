"""`qvl info`: what a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress

from qvl_runtime.architecture import PARTS
from qvl_runtime.blob import Blob


def info(
    model: Annotated[Path, typer.Argument(help="A .qvl file.")],
    check: Annotated[bool, typer.Option("--check", help="Verify the hash of every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Tell what a .qvl file holds.

    Examples:

      qvl info qwen-vl-chat.qvl

      qvl info qwen-vl-chat.qvl --check
    """
    blob = Blob(model)
    if check:
        _check(blob)
    facts = describe(blob) | ({"check": "passed"} if check else {})
    print(json.dumps(facts, ensure_ascii=False) if as_json else _text(facts))


def describe(blob: Blob) -> dict[str, Any]:
    """What a file holds, in JSON types.

    Parameters
    ----------
    blob : Blob

    Returns
    -------
    dict
        `file`, `bytes`, `model`, `parts` (label, bytes, bits, group size and method of each), `source`, `config` and
        `generation_config`.
    """
    chat = blob.generation_config.chat_format == "chatml"
    family = "Qwen-7B" if blob.config.visual is None else "Qwen-VL"

    def made(part: str) -> dict[str, Any]:
        said = blob.metadata["quantization"].get(part)
        return {key: said.get(key) if isinstance(said, dict) else None for key in ("bits", "group_size", "method")}

    return {
        "file": str(blob.path),
        "bytes": blob.path.stat().st_size,
        "model": f"{family}{'-Chat' if chat else ''}",
        "parts": {
            part: {"label": PARTS[part], "bytes": size, **made(part)} for part, size in blob.part_sizes().items()
        },
        "source": blob.metadata["source"],
        "config": blob.config.to_dict(),
        "generation_config": blob.generation_config.to_dict(),
    }


def _text(facts: dict[str, Any]) -> str:
    config, lines = facts["config"], []
    lines.append(f"{facts['file']}: {facts['model']}, {facts['bytes'] / 1e6:,.1f} MB")
    lines.append(f"  made from    {facts['source'].get('name')} by {facts['source'].get('made_by')}")
    lines.append(
        f"  decoder      {config['num_hidden_layers']} layers, width {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads, {config['vocab_size']} tokens, "
        f"window {config['max_position_embeddings']}"
    )
    if "visual" in config:
        visual = config["visual"]
        lines.append(
            f"  vision       {visual['layers']} layers, width {visual['width']}, {visual['heads']} heads, "
            f"pictures {visual['image_size']} x {visual['image_size']}, {visual['n_queries']} tokens each"
        )
    for part in facts["parts"].values():
        bits, group_size, method = part["bits"], part["group_size"], part["method"]
        kind = "fp16" if bits == 16 else f"int{bits}, groups of {group_size}, {method}"
        lines.append(f"  {part['label']:<12} {part['bytes'] / 1e6:10,.1f} MB  {kind}")
    if "check" in facts:
        lines.append("  every hash is right")
    return "\n".join(lines)


def _check(blob: Blob) -> None:
    console = Console(stderr=True)
    with Progress("checking", BarColumn(), DownloadColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=blob.path.stat().st_size)
        blob.check(lambda done: bar.advance(task, done))
