"""The small model that ships with the package, and the pictures it knows."""

from importlib.resources import files
from pathlib import Path


def checkpoint_folder() -> Path:
    """The shipped checkpoint, a Hugging Face folder that `qvl convert` takes like any other."""
    return Path(str(files(__package__)))
