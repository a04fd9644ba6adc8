"""The errors of invalid input, and foreign text in their messages."""


class QvlError(ValueError):
    """Invalid input. The one-line message names the file or value, and the remedy."""


class PromptTooLongError(QvlError):
    """The prompt has more tokens than the window."""


class NoRoomError(QvlError):
    """`max_new_tokens` is too small for a complete answer.

    Parameters
    ----------
    limit : int
        `max_new_tokens`.
    what : str
        The shortest answer in words.
    needed : int
        The least `max_new_tokens` that is accepted.
    """

    def __init__(self, limit: int, what: str, needed: int):
        super().__init__(f"max_new_tokens is {limit}; {what} needs {needed}")
        self.what, self.needed = what, needed


def excerpt(text: object) -> str:
    """Return foreign text, such as another library's message, for an error: one line, cut, escaped if not printable."""
    line = " ".join(str(text).split())
    line = line if len(line) <= 200 else f"{line[:197]}..."
    return line if line.isprintable() else ascii(line)
