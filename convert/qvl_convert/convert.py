"""Converts a published checkpoint to a `.qvl` file, one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qvl_convert import calibration
from qvl_convert.allocation import allocate, parse_size
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.lora import Merged
from qvl_convert.plan import MatrixPlan, Recipe, Source
from qvl_convert.progress import Progress, Report
from qvl_convert.writer import BlobWriter, Layout
from qvl_kernels.packing import Matrix
from qvl_runtime import __version__
from qvl_runtime.backends import check_device
from qvl_runtime.blob import FORMAT, RANKS, VERSION
from qvl_runtime.errors import QvlError
from qvl_runtime.families.specs import PARTS, VectorSpec
from qvl_runtime.file.opening import as_path
from qvl_runtime.saving import check_no_input


def convert(
    src: str | os.PathLike,
    out: str | os.PathLike,
    *,
    bits: int | None = None,
    group_size: int = 128,
    vision_bits: int | None = None,
    head_bits: int | None = None,
    method: str = "rtn",
    target_size: str | None = None,
    lora: str | os.PathLike | None = None,
    calibration_data: str | os.PathLike = calibration.BUILTIN,
    calibration_samples: int = 32,
    device: str = "auto",
    spill: bool = False,
    resume: bool = False,
    force: bool = False,
    progress: Progress = lambda name, done, total: None,
    effort: Report = lambda done, whole: None,
) -> None:
    """Convert the folder of a Hugging Face model into one file.

    Parameters
    ----------
    src : path
        Folder of the model. Quantized AutoGPTQ and AWQ models are imported unchanged.
    out : path
        The file to write; its temporary name is ``OUT.partial``.
    bits, vision_bits, head_bits : int, optional
        3, 4, 8 or 16: for the decoder's linear layers (default 4); for ViT and adapter; for embedding and output head.
        The defaults of the last two are 16 with ``bits=16``, else 8.
    group_size : int
        Columns per scale: 32, 64 or 128.
    method : str
        "rtn", or "gptq" (calibrated) for the decoder's linear layers and other 4-bit matrices except the embedding.
    target_size : str, optional
        File size such as "5.5GB": bits are chosen for each layer (`allocation`), so none of the three may be given.
    lora : path, optional
        Folder of a PEFT adapter to merge into the (unquantized) model.
    calibration_data : path
        "builtin", or a file or folder in a format of `qvl_convert.calibration`.
    calibration_samples : int
        Number of conversations.
    device : str
        Device of the layers during calibration.
    spill : bool
        Store the activations of calibration on disk (in the folder for temporary files), not in memory.
    resume : bool
        Resume an unfinished conversion of the same model with the same settings.
    force : bool
        Replace `out` if it exists, and discard an unfinished conversion.
    progress : callable
        Called with the name of each finished tensor, the finished bytes of the file, and its size.
    effort : callable
        Called with the work of the calibration that is done and all of it, estimated in seconds on some machine.

    Raises
    ------
    QvlError
        If the source or the settings are invalid. No file is left then.
    DeviceError
        If a calibration is to run on a GPU and none is usable.
    """
    out = as_path(out)
    # also where nothing is calibrated: an error that appears with another method alone is found late
    check_device(device)
    calibration.check_count(calibration_samples)
    if method != "gptq" and target_size is None:
        if calibration_data != calibration.BUILTIN:
            raise QvlError(
                f"calibration data {calibration_data} are for method gptq or a target size: give either, or leave out "
                "the data"
            )
        if spill:
            raise QvlError("spill is for method gptq or a target size: give either, or leave it out")
    if target_size is not None and (bits, vision_bits, head_bits) != (None, None, None):
        raise QvlError("a target size chooses the bits: leave out bits, vision_bits and head_bits, or the target size")
    default = 16 if bits == 16 else 8
    recipe = Recipe(
        bits=4 if bits is None else bits,
        group_size=group_size,
        vision_bits=default if vision_bits is None else vision_bits,
        head_bits=default if head_bits is None else head_bits,
        method=method,
    )
    source = Source(Checkpoint(src) if lora is None else Merged(src, lora))
    check_no_input(out, _files(src, calibration_data, *(() if lora is None else (lora,))))
    vectors = [spec for spec in source.specs if isinstance(spec, VectorSpec)]
    chosen = None
    if target_size is not None:
        target = parse_size(target_size)
        chosen = allocate(
            source,
            _samples(source, calibration_data, calibration_samples, parts=set(PARTS)),
            target,
            group_size=group_size,
            size_of=lambda plans: _upper_size(_layout(source, plans, vectors)),
            device=device,
        )
    plans = source.plan(recipe, chosen)
    layout = _layout(source, plans, vectors)
    metadata = _metadata(source, plans)
    calibrated = None
    if parts := {plan.spec.part for plan in plans if plan.method == "gptq"}:
        samples = _samples(source, calibration_data, calibration_samples, parts=parts)
        from qvl_convert.quantize_model import Calibrated  # imports Numba

        calibrated = Calibrated(samples, device=device, spill=spill, report=effort)
        used = {"data": Path(calibration_data).name, "samples": len(samples), "hash": calibration.digest(samples)}
        metadata["calibration"] = json.dumps(used)
    writer = BlobWriter(out, layout, metadata, resume=resume, force=force)
    with writer:

        def finished(plan: MatrixPlan) -> Matrix:
            return plan.matrix({name.rpartition(".")[2]: writer.read(name) for name in plan.layout()})

        def report(name: str) -> None:
            progress(name, writer.written, writer.size)

        pending = [p for p in plans if not all(writer.done(name) for name in p.layout())]
        made: Iterator[tuple[MatrixPlan, Matrix]] = ((plan, source.matrix(plan)) for plan in pending)
        if calibrated is not None:
            made = calibrated(source, plans, pending, finished)
        for plan, matrix in made:
            writer.write_matrix(plan.spec.name, matrix)
            report(plan.spec.name)
            # An embedding is large: free it before the next matrix is produced.
            del matrix
        for spec in vectors:
            if not writer.done(spec.name):
                writer.write(spec.name, source.checkpoint.vector(spec.name))
        if not writer.done(RANKS):
            writer.write(RANKS, np.frombuffer(source.checkpoint.ranks, np.uint8))
        writer.finish()
        report(RANKS)


def _files(*inputs: str | os.PathLike) -> Iterator[Path]:
    """Return the files that are read, but not the `.qvl` files among them, which may be replaced."""
    for source in map(Path, inputs):
        for path in source.iterdir() if source.is_dir() else (source,):
            if path.suffix != ".qvl":
                yield path


def _samples(source: Source, data: str | os.PathLike, count: int, *, parts: set[str]) -> list[calibration.Sample]:
    """Load calibration data for these parts of the model."""
    samples = calibration.load(data, source.checkpoint, count=count)
    sees = source.checkpoint.config.sees and not parts.isdisjoint(("vision", "adapter"))
    if sees and not any(sample.slots for sample in samples):
        raise QvlError(f"{data}: no sample has a picture, which calibrating the ViT takes; add samples with pictures")
    return samples


def _layout(source: Source, plans: list[MatrixPlan], vectors: list[VectorSpec]) -> Layout:
    layout: Layout = {}
    for plan in plans:
        layout |= plan.layout()
    layout |= {spec.name: (spec.shape, np.dtype(np.float32)) for spec in vectors}
    layout[RANKS] = ((len(source.checkpoint.ranks),), np.dtype(np.uint8))
    return layout


def _upper_size(layout: Layout) -> int:
    """Return an upper bound of the file size: tensors, and a header with every name, shape and hash."""
    return (64 << 10) + sum(512 + int(np.prod(shape)) * dtype.itemsize for shape, dtype in layout.values())


def _metadata(source: Source, plans: list[MatrixPlan]) -> dict[str, str]:
    checkpoint = source.checkpoint
    parts: dict[str, list[MatrixPlan]] = {}
    for plan in plans:
        parts.setdefault(plan.spec.part, []).append(plan)
    values = {
        "config": checkpoint.config.to_dict(),
        "generation_config": checkpoint.generation_config.to_dict(),
        "preprocessing": checkpoint.preprocessing,
        "quantization": {part: _made(parts[part]) for part in PARTS if part in parts},
        "source": {
            "name": checkpoint.folder.resolve().name,
            "files": checkpoint.fingerprint(),
            "made_by": f"qvl {__version__}",
        },
    }
    return {"format": FORMAT, "version": VERSION, **{key: json.dumps(value) for key, value in values.items()}}


def _made(plans: list[MatrixPlan]) -> dict[str, int | str]:
    """Describe the quantization of a part; several values are listed, such as ``"4/8"`` bits."""
    kinds = {key: sorted({getattr(plan, key) for plan in plans}) for key in ("bits", "group_size", "method")}
    return {key: found[0] if len(found) == 1 else "/".join(map(str, found)) for key, found in kinds.items()}
