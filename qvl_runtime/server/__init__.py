"""The HTTP server: serves a model with OpenAI's API.

>>> from qvl_runtime.server import create_app
>>> app = create_app(qvl.load("m.qvl"))     # any ASGI server runs it
"""

from qvl_runtime.server.app import create_app
from qvl_runtime.server.limits import Limits

__all__ = ["Limits", "create_app"]
