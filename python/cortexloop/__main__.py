"""`cortexloop` and `python -m cortexloop`; without arguments the latter describes the installation like `doctor`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 2 bad input, 130 interrupted. Bugs propagate with their traceback."""
    from cortexloop.cli.app import run

    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main(sys.argv[1:] or ["doctor"])
