"""`qvl bench`: measure the speed of a file."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from qvl_runtime.benchmark import Speeds, measure, to_json
from qvl_runtime.cli.loading import Activations, Device, KVCache, ModelFile, load_shown
from qvl_runtime.cli.screen import console
from qvl_runtime.cli.text import duration, one_line, size
from qvl_runtime.errors import QvlError


def bench(
    model: ModelFile,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens of the answer.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Number of measurements; medians are shown.", min=1)] = 3,
    device: Device = "auto",
    kv_cache: KVCache = "fp16",
    activations: Activations = "auto",
) -> None:
    """Measure the speed of a .qvl file, and its share of the machine's limits.

    Prints a table, then one JSON document as the last line. QVL_THREADS sets the number of threads.

    \b
    Examples:
      qvl bench qwen-vl-chat.qvl
      QVL_THREADS=1 qvl bench qwen-vl-chat.qvl --prompt-tokens 8000 --kv-cache int8
    """
    loaded = load_shown(model, device, kv_cache, activations=activations)
    window = loaded.config.max_position_embeddings
    if prompt_tokens + new_tokens > window:
        raise QvlError(
            f"{model}: a prompt of {prompt_tokens} tokens and an answer of {new_tokens} exceed its window of {window}; "
            "lower --prompt-tokens or --new-tokens"
        )
    speeds = measure(loaded, kv_cache=kv_cache, prompt_tokens=prompt_tokens, new_tokens=new_tokens, rounds=rounds)
    conditions = {
        "file": model.name,
        "device": loaded.ops.name,
        "threads": getattr(loaded.ops, "threads", None),
        "kv_cache": kv_cache,
        "activations": activations,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
    }
    console().print(_table(speeds, conditions))
    print(json.dumps(to_json(speeds, **conditions)))


def _table(speeds: Speeds, conditions: dict) -> Table:
    threads = f", threads: {conditions['threads']}" if conditions["threads"] else ""
    # as text: a part of a file's name in brackets is no style
    title = Text(one_line(f"{conditions['file']} on {conditions['device']}{threads}"))
    table = Table(title=title, title_justify="left")
    for heading in ("", "measured", "of the machine's limit"):
        table.add_column(heading, justify="right" if heading else "left")
    if speeds.image is not None:
        table.add_row("one picture", duration(speeds.image), "")
    prompt, answer = (f"{conditions[name]} tokens" for name in ("prompt_tokens", "new_tokens"))
    table.add_row(f"prompt of {prompt}", f"{speeds.prefill:.1f} tokens/s", _share(speeds.prefill_share, "int8 peak"))
    table.add_row(f"answer of {answer}", f"{speeds.decode:.2f} tokens/s", _share(speeds.decode_share, "bandwidth"))
    table.add_row("read per answer token", size(speeds.bytes_per_token), "")
    if speeds.bandwidth is not None and speeds.int8_peak is not None:
        table.add_row("memory bandwidth", f"{size(int(speeds.bandwidth))}/s", "")
        table.add_row("int8 peak", f"{speeds.int8_peak / 1e9:.0f} GOP/s", "")
    if speeds.peak_memory is not None:
        table.add_row("peak memory with file", size(speeds.peak_memory), "")
    if speeds.level2 is not None and speeds.ahead is not None:
        table.add_row("L2 cache per thread", f"{speeds.level2 >> 10} KiB", "")
        table.add_row("prefetch distance", _ahead(speeds.ahead, speeds.ahead_times), "")
    return table


def _ahead(ahead: int, times: dict[int, float]) -> str:
    """The prefetch distance, and the time of others relative to it, if they were measured."""
    others = [f"{other}: {time / times[ahead]:.2f}" for other, time in times.items() if other != ahead]
    return f"{ahead} bytes ({', '.join(others)} of its time)" if others else f"{ahead} bytes (not measured)"


def _share(share: float | None, limit: str) -> str:
    return "" if share is None else f"{share:.0%} of {limit}"
