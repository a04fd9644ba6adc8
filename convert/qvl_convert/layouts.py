"""Detection of the layout of quantized linear layers."""

from __future__ import annotations

import os

from qvl_convert import fp8
from qvl_convert.autogptq import AutoGptq
from qvl_convert.awq import Awq
from qvl_convert.checkpoint import Checkpoint
from qvl_convert.imports import REMEDY, Import
from qvl_runtime.errors import QvlError
from qvl_runtime.families.reading import read_json


def find_layout(checkpoint: Checkpoint) -> Import | None:
    """Return the layout of a quantized checkpoint; None if it is not quantized.

    Raises
    ------
    QvlError
        For an unsupported layout.
    """
    path = checkpoint.folder / "quantize_config.json"
    if os.path.lexists(path):
        return AutoGptq.read(read_json(path), str(path))
    path = checkpoint.folder / "config.json"
    config = checkpoint.raw_config.get("quantization_config")
    if config is None or fp8.block_size(checkpoint.raw_config, str(path)) is not None:
        return None
    if not isinstance(config, dict):
        raise QvlError(f"{path}: 'quantization_config' is {str(config)[:60]!r}, expected a section; {REMEDY}")
    return (Awq if config.get("quant_method") == "awq" else AutoGptq).read(config, str(path))
