"""`qvl convert`: convert a Hugging Face folder to one file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from qvl_convert.convert import convert as run
from qvl_convert.progress import Progress as Tensors
from qvl_convert.progress import Report
from qvl_convert.writer import partial_path
from qvl_runtime.backends import backend
from qvl_runtime.cli.progress import progress_bar
from qvl_runtime.cli.text import one_line, size

SECONDS = 60
"""How often a long conversion says how far it is if standard error is no terminal."""


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the model: config, tokenizer and weights.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .qvl file to write.")],
    bits: Annotated[
        int | None,
        typer.Option(help="3, 4, 8 or 16: of the decoder's layers; 16 applies to all parts not named.  [default: 4]"),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Columns per scale: 32 (not with 3 bits), 64 or 128.")] = 128,
    vision_bits: Annotated[int | None, typer.Option(help="For ViT and adapter.  [default: 8]")] = None,
    head_bits: Annotated[int | None, typer.Option(help="For embedding and output head.  [default: 8]")] = None,
    method: Annotated[str, typer.Option(help="rtn rounds to nearest; gptq calibrates.")] = "rtn",
    target_size: Annotated[
        str | None,
        typer.Option(help="Largest size of the file, such as 5.5GB: chooses the bits of each layer by its error."),
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="Folder of a LoRA adapter (PEFT) to merge into the model.")] = None,
    calibration: Annotated[
        str, typer.Option(help="'builtin', fine-tuning JSON, JSON lines, or a folder of pictures. (*)")
    ] = "builtin",
    calibration_samples: Annotated[int, typer.Option(help="Number of conversations to calibrate with.")] = 32,
    device: Annotated[str, typer.Option(help="For calibration and --verify: auto, cpu or cuda.")] = "auto",
    spill: Annotated[bool, typer.Option("--spill", help="Store activations on disk, not in memory. (*)")] = False,
    verify: Annotated[
        int | None,
        typer.Option(
            min=0, help="Conversations to compare with the original afterwards.  [default: 2 with gptq, else 0]"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted conversion.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT, complete or partial, if it exists.")] = False,
) -> None:
    """Make a .qvl file out of a Hugging Face model.

    Reads Qwen3-VL, Qwen2.5-VL, Qwen2-VL, Qwen-VL and Qwen-7B from safetensors or PyTorch files. AutoGPTQ and AWQ
    versions are imported unchanged, FP8 versions are converted. No code of the model is run. --method gptq and
    --target-size calibrate; options with (*) are refused without either.

    \b
    Examples:
      qvl convert Qwen-VL-Chat qwen-vl-chat.qvl
      qvl convert Qwen-VL-Chat small.qvl --vision-bits 4 --head-bits 4
      qvl convert Qwen-VL-Chat best.qvl --method gptq --calibration my.json
      qvl convert Qwen-VL-Chat mine.qvl --lora my-fine-tune
      qvl convert Qwen-VL-Chat reference.qvl --bits 16
    """
    if verify is None:
        verify = 2 if method == "gptq" else 0
    if verify:
        backend(device)  # a missing GPU is found before the conversion, not after it
    try:
        with _bar(by_effort=method == "gptq") as (tensors, effort):
            run(
                src,
                out,
                bits=bits,
                group_size=group_size,
                vision_bits=vision_bits,
                head_bits=head_bits,
                method=method,
                target_size=target_size,
                lora=lora,
                calibration_data=calibration,
                calibration_samples=calibration_samples,
                device=device,
                spill=spill,
                resume=resume,
                force=force,
                progress=tensors,
                effort=effort,
            )
    except KeyboardInterrupt:
        if (partial := partial_path(out)).exists():
            print(one_line(f"qvl: interrupted; {partial} is unfinished: --resume continues it"), file=sys.stderr)
        raise
    print(one_line(f"{out}: {size(out.stat().st_size)}"))
    if verify:
        from qvl_runtime.cli.verify import verify as compare

        compare(out, reference=src, lora=lora, samples=verify, max_new_tokens=0, device=device)


@contextmanager
def _bar(*, by_effort: bool) -> Iterator[tuple[Tensors, Report]]:
    """Show a progress bar on a terminal, a line every `SECONDS` elsewhere.

    A calibration's bar and the time that remains go by its work, not by the bytes that are written.
    """
    name = TextColumn("{task.description}")
    amount: ProgressColumn = TaskProgressColumn() if by_effort else DownloadColumn()
    columns = (name, BarColumn(), amount, TimeRemainingColumn())
    # the speed is that since the beginning: steps differ, and take minutes
    with progress_bar(*columns, transient=True, speed_estimate_period=1e9) as bar:
        task, said = bar.add_task("reading", total=None), time.monotonic()

        def say() -> None:
            nonlocal said
            if not bar.disable or time.monotonic() - said < SECONDS:
                return
            said, shown = time.monotonic(), bar.tasks[task]
            left = f", {shown.time_remaining / 60:.0f} min to go" if shown.time_remaining is not None else ""
            print(f"qvl: {shown.description}: {shown.percentage:.0f}% done{left}", file=sys.stderr, flush=True)

        def tensors(name: str, done: int, total: int) -> None:
            if by_effort:
                bar.update(task, description=name)
            else:
                bar.update(task, description=name, completed=done, total=total)
            say()

        def effort(done: float, whole: float) -> None:
            if by_effort:
                bar.update(task, completed=done, total=whole)

        yield tensors, effort
