"""The error class for invalid input."""


class QvlError(ValueError):
    """Invalid input. The one-line message names the file or value, and the remedy."""
