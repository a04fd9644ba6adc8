"""``python -m qvl_runtime`` is the command `qvl`."""

from qvl_runtime.cli.main import main

if __name__ == "__main__":
    main()
