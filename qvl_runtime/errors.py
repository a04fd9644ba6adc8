"""The one error a user can cause."""


class QvlError(ValueError):
    """Something the caller can mend: the message names the file or value and the remedy, on one line."""
