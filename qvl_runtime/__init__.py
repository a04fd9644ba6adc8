"""A quantized runtime for Qwen's vision-language models: one file, no PyTorch.

>>> import qvl_runtime as qvl
>>> model = qvl.load("qwen-vl-chat.qvl")
>>> model.generate("<img>cat.jpg</img>Describe the image in English:").text
"""

from qvl_kernels.ops import DeviceError
from qvl_runtime.boxes import Box
from qvl_runtime.engine.constraints import Grounding, JsonSchema, Regex
from qvl_runtime.engine.generation import Piece, Timings
from qvl_runtime.errors import QvlError
from qvl_runtime.inputs.tools import ToolCall, Tools
from qvl_runtime.loading import load
from qvl_runtime.model import Model
from qvl_runtime.results import ChatResult, Result, Stream

__all__ = [
    "Box",
    "ChatResult",
    "DeviceError",
    "Grounding",
    "JsonSchema",
    "Model",
    "Piece",
    "QvlError",
    "Regex",
    "Result",
    "Stream",
    "Timings",
    "ToolCall",
    "Tools",
    "load",
]
__version__ = "0.1.0"
