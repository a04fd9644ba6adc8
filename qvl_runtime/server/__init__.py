"""The HTTP server: serves a model with OpenAI's API.

>>> import qvl_runtime as qvl
>>> from qvl_runtime.server import create_app
>>> app = create_app(qvl.load("m.qvl"))     # any ASGI server runs it
"""

from qvl_runtime.openai.limits import Limits
from qvl_runtime.server.app import create_app

__all__ = ["Limits", "create_app"]
