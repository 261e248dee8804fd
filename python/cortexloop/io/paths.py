"""What all model readers do with paths and names: find files, select models, say which file an error is about."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path


def existing_file(source: str | os.PathLike[str]) -> Path:
    """The path of an existing regular file; FileNotFoundError or ValueError with a sentence otherwise."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} should be a file")
    return path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before the sentence of any ValueError, and turn failures to read it into one."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts neuron2 before neuron10."""
    parts = re.split(r"([0-9]+)", text)
    return [(int(part[:4000]), len(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)]


def pick(found: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """`names` if all of them were found (all that were found for None).

    Raises:
        ValueError: a name is not there, or is asked for twice.
    """
    if names is None:
        return list(found)
    if isinstance(names, str):
        raise TypeError(f"names should be a list of model names, got the single text {names!r}")
    present = set(found)
    for name in names:
        if name not in present:
            some = ", ".join(repr(other) for other in list(found)[:3])
            raise ValueError(f"there is no model {name!r}; there are {len(found)}: {some}{', ...' * (len(found) > 3)}")
    if len(set(names)) != len(names):
        raise ValueError("a model is asked for twice; names must differ")
    return list(names)
