"""`qvl batch`: answer many rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from qvl_runtime.backends import backend
from qvl_runtime.batch.folder import PictureFolder
from qvl_runtime.batch.job import Computed, Job, Progress, Runner, Task, Worker
from qvl_runtime.batch.options import ModelSpec, Options
from qvl_runtime.batch.processes import on_this_machine
from qvl_runtime.batch.records import Record
from qvl_runtime.batch.rows import Source
from qvl_runtime.batch.sources import open_source
from qvl_runtime.cli.loading import Activations, AllowUrls, ContextTokens, Device, KVCache, MaxPixels, ModelFile
from qvl_runtime.cli.progress import progress_bar
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
from qvl_runtime.engine.scheduler import MAX_BATCH
from qvl_runtime.errors import QvlError


def batch(
    model: ModelFile,
    rows: Annotated[Path, typer.Argument(metavar="INPUT", help="A .jsonl, .parquet or .tar file, or a folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the answers, one file a block.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt of rows that have none.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures.  [default: that of INPUT]")] = None,
    draw: Annotated[Path | None, typer.Option(help="Folder for pictures with the boxes of their answers.")] = None,
    form: Annotated[str, typer.Option("--format", help="Format of the answers: jsonl or parquet.")] = "jsonl",
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Answer failed rows again.")] = False,
    max_failures: Annotated[float, typer.Option(help="Stop when more than this share of the rows failed.")] = 0.1,
    block: Annotated[int, typer.Option(help="Rows per output file.", min=1)] = 64,
    max_batch: Annotated[
        int, typer.Option(help="Rows that a process computes concurrently.", min=1, max=MAX_BATCH)
    ] = 16,
    status: Annotated[bool, typer.Option("--status", help="Print a line of JSON after every block.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of tokens of an answer.")] = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    seed: Annotated[int, typer.Option(help="The seed of a row derives from this and its id.")] = 0,
    stop: Stop = None,
    schema: SchemaFile = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Compute on this Ray cluster; local starts one here.")
    ] = None,
    ship_model: Annotated[bool, typer.Option("--ship-model", help="Send the model's file to Ray's machines.")] = False,
    device: Device = "auto",
    kv_cache: KVCache = "fp16",
    activations: Activations = "auto",
    context: ContextTokens = None,
    max_pixels: MaxPixels = None,
    allow_urls: AllowUrls = False,
) -> None:
    """Answer many rows, and resume an interrupted run.

    A row has an id, a prompt, and an image or images; or it is a line of OpenAI's batch format. A folder of pictures
    has one row per picture. Every block of rows becomes one file; existing files are not computed again. The last
    line of standard output is JSON.

    \b
    Examples:
      qvl batch qwen-vl-chat.qvl photos/ captions/ --prompt "Describe the picture."
      qvl batch qwen-vl-chat.qvl questions.jsonl answers/ --images photos/
      qvl batch qwen-vl-chat.qvl questions.jsonl answers/ --images photos/ --retry-failed
    """
    if not 0 <= max_failures <= 1:
        raise QvlError(f"--max-failures is {max_failures:g}; it must be a share from 0 to 1")
    if ship_model and ray is None:
        raise QvlError("--ship-model needs --ray: without it no model is sent")
    if draw is not None and rows.is_dir() and draw.resolve().is_relative_to(rows.resolve()):
        raise QvlError(f"--draw {draw}: is in the input, whose pictures it would add to; take another folder")
    source = open_source(rows, images)
    if isinstance(source, PictureFolder) and prompt is None:
        raise QvlError(f"{rows}: is a folder of pictures; say what to ask about each with --prompt")
    generate = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "stop": stop or [],
    }
    options = Options(prompt, generate, seed, max_batch, allow_urls, read_schema(schema), images)
    spec = ModelSpec(
        model,
        {
            "device": device,
            "kv_cache": kv_cache,
            "activations": activations,
            "context": context,
            "max_pixels": max_pixels,
        },
    )
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    bar = progress_bar(*columns)
    shown = bar.add_task("loading", total=len(source))

    def on_record(record: Record) -> None:
        bar.advance(shown)

    def on_progress(progress: Progress) -> None:
        told = progress.status()
        rates = f"{told['rows_per_second']:.2f} rows/s, {told['tokens_per_second']:.1f} tokens/s"
        failed = f", {progress.failed} failed" if progress.failed else ""
        bar.update(shown, completed=progress.rows, description=rates + failed)
        if status:
            print(json.dumps(told), flush=True)

    # Before the job: without the device or Ray no folder is made.
    runner = _runner(spec, source, options, on_record, device, ray, ship_model)
    job = Job(spec, source, out, options, block=block, form=form, max_failures=max_failures, drawings=draw)
    with bar:
        done = job.run(runner, retry_failed=retry_failed, on_progress=on_progress)
    if done.failed:
        print(f"qvl: {done.failed} of {done.total} rows failed; --retry-failed answers them again", file=sys.stderr)
    print(json.dumps(done.status()))


def _runner(
    spec: ModelSpec,
    source: Source,
    options: Options,
    on_record: Callable[[Record], None],
    device: str,
    ray: str | None,
    ship_model: bool,
) -> Runner:
    if ray is not None:
        from qvl_runtime.batch.on_ray import on_ray, ray_package

        ray_package()
        return partial(on_ray, ray, ship_model, spec, source, options)
    if backend(device)[0] == "cpu":
        return partial(on_this_machine, spec, source, options, on_record)

    def in_this_process(tasks: Sequence[Task], on_computed: Callable[[Computed], None]) -> None:
        Worker(spec, source, options)(tasks, on_computed, on_record)

    return in_this_process
