"""The commands `cortexloop serve` and `cortexloop rig ...`: options and words; `cortexloop.rig` does the work."""

from __future__ import annotations

import typer

rig = typer.Typer(name="rig", help="Sessions with a rig: simulate, test, check, export.", no_args_is_help=True)

from cortexloop.cli.rig import example as _example  # noqa: E402, F401 - its commands register themselves
from cortexloop.cli.rig import journals as _journals  # noqa: E402, F401
from cortexloop.cli.rig import selftest as _selftest  # noqa: E402, F401
from cortexloop.cli.rig import simulate as _simulate  # noqa: E402, F401
