"""What the interpreter reports."""


class PtxError(Exception):
    """A kernel did what a GPU does not define, or the interpreter does not know what it asks for."""
