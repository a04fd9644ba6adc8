"""The errors of invalid input."""


class QvlError(ValueError):
    """Invalid input. The one-line message names the file or value, and the remedy."""


class PromptTooLongError(QvlError):
    """The prompt has more tokens than the window."""
