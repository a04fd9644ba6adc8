"""A quantized runtime for Qwen's vision-language models: one file, no PyTorch.

>>> import qvl_runtime as qvl
>>> model = qvl.load("qwen-vl-chat.qvl")
>>> model.generate("<img>cat.jpg</img>Describe the image in English:").text
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl_kernels.ops import DeviceError as DeviceError
    from qvl_runtime.boxes import Box as Box
    from qvl_runtime.engine.constraints import Grounding as Grounding
    from qvl_runtime.engine.constraints import JsonSchema as JsonSchema
    from qvl_runtime.engine.constraints import Regex as Regex
    from qvl_runtime.engine.generation import Piece as Piece
    from qvl_runtime.engine.generation import Timings as Timings
    from qvl_runtime.errors import QvlError as QvlError
    from qvl_runtime.inputs.tools import ToolCall as ToolCall
    from qvl_runtime.inputs.tools import Tools as Tools
    from qvl_runtime.loading import load as load
    from qvl_runtime.model import Model as Model
    from qvl_runtime.results import ChatResult as ChatResult
    from qvl_runtime.results import Result as Result
    from qvl_runtime.results import Stream as Stream

_HOMES = {
    "Box": "qvl_runtime.boxes",
    "ChatResult": "qvl_runtime.results",
    "DeviceError": "qvl_kernels.ops",
    "Grounding": "qvl_runtime.engine.constraints",
    "JsonSchema": "qvl_runtime.engine.constraints",
    "Model": "qvl_runtime.model",
    "Piece": "qvl_runtime.engine.generation",
    "QvlError": "qvl_runtime.errors",
    "Regex": "qvl_runtime.engine.constraints",
    "Result": "qvl_runtime.results",
    "Stream": "qvl_runtime.results",
    "Timings": "qvl_runtime.engine.generation",
    "ToolCall": "qvl_runtime.inputs.tools",
    "Tools": "qvl_runtime.inputs.tools",
    "load": "qvl_runtime.loading",
}
__all__ = list(_HOMES)
__version__ = "0.2.0.dev1"


if not TYPE_CHECKING:  # else any name would be one to a type checker

    def __getattr__(name: str) -> Any:
        """Import a name when it is first asked for: that takes most of a start, in which the command can be stopped."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
