"""The folder of a run: what was asked for, finished parts, the state to resume from. Every file appears complete."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop import io
from cortexloop.cli.console import BadInputError, bad_input

FORMAT = 1

RUN, REPORT, CODES, IMAGES, CHECKPOINT = "run.json", "report.html", "codes.npz", "images", "checkpoint"
GENERATIONS, COMPARISON, NATURAL = "generations.csv", "comparison.csv", "natural.csv"

CACHED_PARTS = 40
"""Kept in memory: more than a usual comparison has conditions, and a few hundred megabytes at most."""

_OWN = (RUN, REPORT, CODES, IMAGES, CHECKPOINT, GENERATIONS, COMPARISON, NATURAL)
_SUFFIX = re.compile(r"[^A-Za-z0-9_+.=-]+")


class RunFolder:
    """The files of one run.

    A part is one group of evolutions under one condition. `checkpoint/` holds the finished parts and the state of the
    one that runs, and goes when everything else is written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.made = False
        self._cached = lru_cache(maxsize=CACHED_PARTS)(self._read_part)

    def occupied(self) -> bool:
        """Whether files of a run, or of the same names, are there."""
        return any((self.out / name).exists() for name in _OWN)

    def read(self) -> dict[str, Any]:
        """What `write` wrote.

        Raises:
            BadInputError: there is no run, or a file of another kind.
        """
        path = self.out / RUN
        if not path.exists():
            raise BadInputError(f"there is no run to resume in {str(self.out)!r}; leave out --resume to start one")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            known = document["format"] == FORMAT and {"settings", "options", "status"} <= document.keys()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadInputError(f"{str(path)!r} is no readable record of a run; give another --out") from error
        if not known:
            raise BadInputError(f"{str(path)!r} was written by another version of cortexloop; give another --out")
        return dict(document)

    def create(self) -> None:
        """Make the folder. Raises BadInputError."""
        with bad_input():
            self.made = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)

    def discard(self) -> None:
        """Remove what a run left that could not begin, and the folder if it was made for it."""
        self.finish()
        for name in (RUN, NATURAL):
            (self.out / name).unlink(missing_ok=True)
        if self.made and self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()

    def write(self, document: Mapping[str, Any]) -> None:
        """Replace the record of the run."""
        text = json.dumps(plain({"format": FORMAT, **document}), indent=2, allow_nan=False) + "\n"
        self.write_text(RUN, text)

    def write_text(self, name: str, text: str) -> None:
        """Write one file of text. Raises BadInputError where the disk is full or protected."""
        with bad_input(), io.atomic_path(self.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def begin(self) -> None:
        """Make the folder of checkpoints."""
        with bad_input():
            (self.out / CHECKPOINT).mkdir(exist_ok=True)

    def state(self, condition: int, group: int) -> Path:
        """The checkpoint of a part that runs."""
        return self.out / CHECKPOINT / f"state-{condition:03d}-{group:04d}.safetensors"

    def part(self, condition: int, group: int) -> Path:
        """The file of a finished part."""
        return self.out / CHECKPOINT / f"part-{condition:03d}-{group:04d}.npz"

    def frames(self, condition: int, group: int) -> Path:
        """Codes kept on the way of a part that runs."""
        return self.out / CHECKPOINT / f"frames-{condition:03d}-{group:04d}.npz"

    def save_frames(self, condition: int, group: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write the codes kept so far. Raises BadInputError."""
        with bad_input(), io.atomic_path(self.frames(condition, group)) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]

    def load_frames(self, condition: int, group: int) -> dict[str, NDArray[Any]]:
        """The codes kept so far. Raises BadInputError."""
        return _read_arrays(self.frames(condition, group))

    def save_part(self, condition: int, group: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write a finished part and drop its checkpoint."""
        with bad_input(), io.atomic_path(self.part(condition, group)) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
        for rest in (self.state(condition, group), self.frames(condition, group)):
            rest.unlink(missing_ok=True)

    def load_part(self, condition: int, group: int) -> dict[str, NDArray[Any]]:
        """The arrays of a finished part; the most recent ones stay in memory.

        Raises:
            BadInputError: a damaged file.
        """
        return self._cached(condition, group)

    def _read_part(self, condition: int, group: int) -> dict[str, NDArray[Any]]:
        return _read_arrays(self.part(condition, group))

    def finish(self) -> None:
        """Remove the checkpoints."""
        shutil.rmtree(self.out / CHECKPOINT, ignore_errors=True)


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadInputError(
            f"{str(path)!r} is missing or damaged: delete the files of its name, and --resume computes them again"
        ) from error


def plain(value: Any) -> Any:
    """JSON without NaN and infinity: null, and the texts "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return str(value) if isinstance(value, Path) else value


def file_stem(index: int, *parts: str) -> str:
    """A file name from names of any kind: the index keeps names apart that look the same once cleaned."""
    cleaned = (_SUFFIX.sub("-", part).strip("-.")[:60] for part in parts)
    return "_".join([f"{index:03d}", *filter(None, cleaned)])


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises BadInputError."""
    found = hashlib.sha256()
    with bad_input(), path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def digest_of_arrays(*arrays: NDArray[Any]) -> str:
    """SHA-256 of shapes, types and values."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
