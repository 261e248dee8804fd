"""Options that several commands share, as typer reads them: name, type and help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Models = Annotated[Path, typer.Option("--models", help="Model file, or folder of model files, of any readable format.")]
Images = Annotated[
    Path, typer.Option("--images", help="Folder or zip of pictures, .npy or .npz array, or one picture.")
]
Neurons = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer evaluates this on Python 3.10 as well
    typer.Option("--neurons", help="Names, patterns ('190923/*') or positions ('0,3-7') of models; all if not given."),
]
Threads = Annotated[Optional[int], typer.Option("--threads", help="Number of threads; all processors if not given.")]  # noqa: UP045
Backend = Annotated[str, typer.Option("--backend", help="auto, cpu, cuda, triton or reference.")]
Precision = Annotated[str, typer.Option("--precision", help="exact or fast (reduced precision, where supported).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and no progress.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be used, and list them.")]
Resize = Annotated[bool, typer.Option("--resize", help="Bring pictures to the models' input size (Pillow, bicubic).")]
