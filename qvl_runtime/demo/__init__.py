"""The small model that ships with the package, and the generator of its pictures."""

from importlib.resources import files
from pathlib import Path


def checkpoint_folder() -> Path:
    """The shipped checkpoint, a Hugging Face folder like any other that `qvl convert` takes."""
    return Path(str(files(__package__)))
