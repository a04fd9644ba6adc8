"""The HTTP server: serves a model with OpenAI's API.

>>> from qvl_runtime.server import create_app
>>> app = create_app(qvl.load("m.qvl"))     # any ASGI server runs it
"""

from typing import Any

from qvl_runtime.server.limits import Limits

__all__ = ["Limits", "create_app"]


def __getattr__(name: str) -> Any:
    """Import the application when it is used: jobs need the rest of this package only."""
    if name == "create_app":
        from qvl_runtime.server.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
