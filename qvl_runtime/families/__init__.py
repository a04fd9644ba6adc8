"""Registry of the model families by `model_type` of `config.json`. A family is imported when first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qvl_runtime.errors import QvlError

if TYPE_CHECKING:
    from qvl_runtime.families.base import Family

FAMILIES = {
    "qwen": "qvl_runtime.families.qwen_vl.family",
    "qwen2_vl": "qvl_runtime.families.qwen2_vl.family",
    "qwen2_5_vl": "qvl_runtime.families.qwen2_5_vl.family",
    "qwen3_vl": "qvl_runtime.families.qwen3_vl.family",
}
"""Maps a `model_type` to the module with the constant `FAMILY`."""


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """Return the family of a `config.json`.

    Raises
    ------
    QvlError
        For an unknown `model_type`.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise QvlError(f"{where}: model_type is {str(model_type)[:60]!r}; this runtime runs {known}")
    return importlib.import_module(FAMILIES[model_type]).FAMILY
