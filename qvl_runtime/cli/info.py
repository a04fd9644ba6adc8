"""`qvl info`: describe a file."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn

from qvl_runtime.backends import check_device, device_memory, gpu_facts
from qvl_runtime.blob import Blob
from qvl_runtime.budget import DEFAULT_WINDOW, KV_CACHES, VISION_PARTS, budget, remedies
from qvl_runtime.cli.loading import ModelFile
from qvl_runtime.cli.progress import progress_bar
from qvl_runtime.cli.text import printable, size
from qvl_runtime.errors import QvlError
from qvl_runtime.families.specs import PARTS


def info(
    model: ModelFile,
    check: Annotated[bool, typer.Option("--check", help="Verify the hash of every tensor.")] = False,
    context: Annotated[
        int | None, typer.Option(help="Check the memory for this many tokens of prompt and answer.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="With --context: auto, cpu or reference. cuda: describe the GPU, too.")
    ] = "auto",
    kv_cache: Annotated[str, typer.Option(help="With --context: fp16 or int8.")] = "fp16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Describe a .qvl file, and whether it fits in memory.

    \b
    Examples:
      qvl info qwen-vl-chat.qvl
      qvl info qwen-vl-chat.qvl --check
      qvl info qwen-vl-chat.qvl --context 8192 --kv-cache int8
    """
    check_device(device)
    _check_cache(kv_cache)
    blob = Blob(model)
    if check:
        _check(blob)
    facts = describe(blob) | ({"check": "passed"} if check else {})
    if context is not None:
        facts["memory"] = fit(blob, context, device, kv_cache)
    if device == "cuda":
        facts["device"] = gpu_facts()
    print(json.dumps(facts, ensure_ascii=False) if as_json else _text(facts))


def describe(blob: Blob) -> dict[str, Any]:
    """Describe a file in JSON types.

    Parameters
    ----------
    blob : Blob

    Returns
    -------
    dict
        `file`, `bytes`, `model`, `decoder` (its shape and window), `vision` (as text; None if the model takes no
        pictures), `parts` (label, bytes, bits, group size and method of each), `source`, `config` and
        `generation_config`.
    """

    def made(part: str) -> dict[str, Any]:
        said = blob.metadata["quantization"].get(part)
        return {key: said.get(key) if isinstance(said, dict) else None for key in ("bits", "group_size", "method")}

    config = blob.config
    return {
        "file": str(blob.path),
        "bytes": blob.path.stat().st_size,
        "model": blob.title,
        "decoder": {
            "layers": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "tokens": config.vocab_size,
            "window": config.max_position_embeddings,
            "default_window": min(config.max_position_embeddings, DEFAULT_WINDOW),
        },
        "vision": _vision(blob) if config.sees else None,
        "parts": {
            part: {"label": PARTS[part], "bytes": size, **made(part)} for part, size in blob.part_sizes().items()
        },
        "source": blob.metadata["source"],
        "config": config.to_dict(),
        "generation_config": blob.generation_config.to_dict(),
    }


def _vision(blob: Blob) -> str:
    try:
        return blob.family.describe_vision(blob.config, blob.metadata["preprocessing"])
    except QvlError as error:
        raise QvlError(f"{blob.path}: {error}") from None


def fit(blob: Blob, context: int, device: str, kv_cache: str) -> dict[str, Any]:
    """Compare the memory of a model with a cache of `context` tokens with that of a device; list remedies.

    Returns
    -------
    dict
        `device`, `context`, `kv_cache`; bytes of `weights`, `vision` (part of `weights`), `cache`,
        `workspace`, `reserve` (a GPU driver's), `total` and `free` (None if unknown); `fits`; and
        `remedies`.

    Raises
    ------
    QvlError, DeviceError
        For an unknown device or cache, a context beyond the model's window, or "cuda" without a GPU.
    """
    window = blob.config.max_position_embeddings
    if not 1 <= context <= window:
        raise QvlError(f"--context is {context}; the model's window is {window} tokens: choose 1 to {window}")
    _check_cache(kv_cache)
    backend, name, free = device_memory(device)
    needed = budget(blob, context, kv_cache, backend)
    fits = free is None or needed.total <= free
    return {
        "device": name,
        "context": context,
        "kv_cache": kv_cache,
        "weights": needed.weights,
        "vision": sum(needed.parts.get(part, 0) for part in VISION_PARTS),
        "cache": needed.cache,
        "workspace": needed.workspace,
        "reserve": needed.reserve,
        "total": needed.total,
        "free": free,
        "fits": fits,
        "remedies": [] if free is None or fits else remedies(blob, context, kv_cache, free, backend),
    }


def _check_cache(kv_cache: str) -> None:
    if kv_cache not in KV_CACHES:
        raise QvlError(f"--kv-cache is {kv_cache!r}; choose one of {', '.join(KV_CACHES)}")


def _fit_text(memory: dict[str, Any]) -> list[str]:
    def needs(key: str) -> str:
        return size(memory[key])

    vision = f" (vision {needs('vision')})" if memory["vision"] else ""
    free = "an unknown amount is free" if memory["free"] is None else f"{needs('free')} free"
    lines = [
        f"  with {memory['context']} tokens on {memory['device']}, {memory['kv_cache']} cache: "
        f"{needs('total')} needed, {free}",
        f"    weights {needs('weights')}{vision}, cache {needs('cache')}, "
        f"work space {needs('workspace')}" + (f", driver {needs('reserve')}" if memory["reserve"] else ""),
    ]
    if not memory["fits"]:
        remedies = " or ".join(memory["remedies"])
        lines.append(f"    it does not fit; {'what fits: ' + remedies if remedies else 'nothing makes it fit'}")
    return lines


def _text(facts: dict[str, Any]) -> str:
    decoder, lines = facts["decoder"], []
    lines.append(f"{facts['file']}: {facts['model']}, {size(facts['bytes'])}")
    source = facts["source"]
    files = source.get("files")
    adapters = sorted({name.partition("/")[0] for name in files if "/" in name} if isinstance(files, dict) else ())
    merged = f" with the adapter {', '.join(adapters)}" if adapters else ""
    lines.append(f"  made from    {source.get('name')}{merged} by {source.get('made_by')}")
    shared = "" if decoder["kv_heads"] == decoder["heads"] else f" ({decoder['kv_heads']} of keys and values)"
    wider = "" if decoder["window"] == decoder["default_window"] else f" (--context: up to {decoder['window']})"
    lines.append(
        f"  decoder      layers {decoder['layers']}, width {decoder['width']}, heads {decoder['heads']}{shared}, "
        f"vocabulary {decoder['tokens']}, window {decoder['default_window']}{wider}"
    )
    if facts["vision"]:
        lines.append(f"  vision       {facts['vision']}")
    for part in facts["parts"].values():
        bits, group_size, method = part["bits"], part["group_size"], part["method"]
        kind = "fp16" if bits == 16 else f"int{bits}, groups of {group_size}, {method}"
        lines.append(f"  {part['label']:<12} {size(part['bytes']):>10}  {kind}")
    if "device" in facts:
        found = facts["device"]
        version = f"compute capability {found['capability']}, driver for CUDA {found['driver']}"
        lines.append(f"  GPU          {found['gpu']}, {version}")
        lines.append(f"  GPU kernels  {found['kernels']}")
    if "memory" in facts:
        lines += _fit_text(facts["memory"])
    if "check" in facts:
        lines.append("  every hash is right")
    # A name in the file may have line ends, which would make lines of their own.
    return "\n".join(printable(line.replace("\n", " ")) for line in lines)


def _check(blob: Blob) -> None:
    with progress_bar("checking", BarColumn(), DownloadColumn()) as bar:
        task = bar.add_task("", total=blob.path.stat().st_size)
        blob.check(lambda done: bar.advance(task, done))
