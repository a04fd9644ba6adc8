"""The command `qvl`, which is also ``python -m qvl_runtime``."""

import os
import signal


def main() -> None:
    """Run the command line; Ctrl-C ends it quietly also while it is imported."""
    if heeded := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Not an exception: imports are full of places that report it, and go on.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from qvl_runtime.cli.main import main as command

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


if __name__ == "__main__":
    main()
