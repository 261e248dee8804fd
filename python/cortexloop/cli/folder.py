"""The folder that a command fills at its end: all of its files appear together, or none of them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from cortexloop.cli.console import BadInputError, bad_input, sentence


class OutputFolder:
    """A folder whose files of known names are written beside first and then moved into place.

    Args:
        out: the folder; made if missing.
        names: files and sub-folders that the command may write.
        overwrite: replace those of an earlier run instead of refusing.

    Raises:
        BadInputError: `out` is a file, or holds results already and `overwrite` is false.
    """

    def __init__(self, out: Path, names: Sequence[str], *, overwrite: bool) -> None:
        self.out, self.names = out, tuple(names)
        if out.exists() and not out.is_dir():
            raise BadInputError(f"--out {str(out)!r} is a file; give a folder")
        held = [name for name in self.names if (out / name).exists()]
        if held and not overwrite:
            raise BadInputError(
                f"--out {str(out)!r} holds earlier results ({', '.join(held)}): --overwrite replaces them, "
                "or give another folder"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """A folder to write into; when the block ends without an exception, its contents replace what was there.

        Raises:
            BadInputError: no permission, no space left; earlier results are untouched.
        """
        made = not self.out.exists()
        with bad_input():
            self.out.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.out))
        try:
            yield staging
            for name in self.names:
                _remove(self.out / name)
            for path in staging.iterdir():
                path.replace(self.out / path.name)
        except OSError as error:
            raise BadInputError(sentence(error)) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if made and not any(self.out.iterdir()):
                self.out.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
