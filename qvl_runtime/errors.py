"""The errors of invalid input, and foreign text in their messages."""


class QvlError(ValueError):
    """Invalid input. The one-line message names the file or value, and the remedy."""


class PromptTooLongError(QvlError):
    """The prompt has more tokens than the window."""


def excerpt(text: object) -> str:
    """Return foreign text, such as another library's message, for an error: one line, cut, escaped if not printable."""
    line = " ".join(str(text).split())
    line = line if len(line) <= 200 else f"{line[:197]}..."
    return line if line.isprintable() else ascii(line)
