"""One door to every model format: a file, a folder or a list of files -> named models, each read when asked for."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from cortexloop.io.assemble import Geometry
from cortexloop.io.keras import read_h5, read_keras
from cortexloop.io.native import NativeBank
from cortexloop.io.paths import naming, natural_key, pick
from cortexloop.io.published import Pack, read_npy, read_pt
from cortexloop.weights import CompactWeights

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_SINGLE: dict[str, Callable[[Path, str, Geometry], CompactWeights]] = {
    ".weights.h5": read_h5,
    ".h5": read_h5,
    ".keras": read_keras,
    ".npy": read_npy,
    ".pt": read_pt,
}
MODEL_SUFFIXES = (".safetensors", ".npz", *_SINGLE)
"""Endings of the files that are read: native bank, pack, and the published single-model formats."""


class _Reader(Protocol):
    names: tuple[str, ...]

    def read(self, name: str) -> CompactWeights: ...

    def close(self) -> None: ...


class _SingleFile:
    """A file that holds one model, named after the file."""

    def __init__(self, path: Path, suffix: str, geometry: Geometry) -> None:
        self._path, self._read, self._geometry = path, _SINGLE[suffix], geometry
        self.names: tuple[str, ...] = (path.name[: -len(suffix)],)

    def read(self, name: str) -> CompactWeights:
        return self._read(self._path, name, self._geometry)

    def close(self) -> None:
        """Nothing is held open."""


class ModelFiles:
    """Models in one or more files, opened for reading; a context manager.

    Only headers are read until a model is asked for: `names` lists all models in order, `read(name)` gives one.
    """

    def __init__(self, source: Source, geometry: Geometry) -> None:
        self._where: dict[str, tuple[_Reader, Path]] = {}
        self._readers: list[_Reader] = []
        try:
            for path, in_folder in _expand(source):
                self._add(path, geometry, in_folder)
            if not self._where:
                raise ValueError(f"{_text(source)} holds no model file; files that end in {_suffixes()} are read")
        except BaseException:
            self.close()
            raise
        self.names = tuple(self._where)

    def _add(self, path: Path, geometry: Geometry, in_folder: bool) -> None:
        suffix = _suffix(path)
        with naming(path):
            if path.stat().st_size == 0:
                raise ValueError("the file is empty")
            reader: _Reader
            if suffix == ".safetensors":
                reader = NativeBank(path)
            elif suffix == ".npz":
                reader = Pack(path, geometry)
            else:
                reader = _SingleFile(path, suffix, geometry)
            self._readers.append(reader)
            # An .npz archive may hold anything; in a folder, one without models is not a model file.
            if not reader.names and not in_folder:
                raise ValueError("it holds no compact model, '<name>/readout/kernel' and so on")
        for name in reader.names:
            if name in self._where:
                other = self._where[name][1]
                raise ValueError(f"the model {name!r} is in {str(other)!r} and in {str(path)!r}; give one of them only")
            self._where[name] = (reader, path)

    def read(self, name: str) -> CompactWeights:
        """One model, checked. ValueError if there is none of that name, or if it is damaged."""
        pick(self.names, [name])
        reader, path = self._where[name]
        with naming(path):
            return reader.read(name)

    def close(self) -> None:
        """Close all files."""
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_models(
    source: Source, *, strides: Sequence[int] | None = None, input_size: tuple[int, int] | None = None
) -> ModelFiles:
    """Open model files without reading the models; arguments and errors as of `load_models`."""
    return ModelFiles(
        source,
        Geometry(
            None if strides is None else tuple(operator.index(stride) for stride in strides),
            None if input_size is None else (operator.index(input_size[0]), operator.index(input_size[1])),
        ),
    )


def load_models(
    source: Source,
    *,
    names: Sequence[str] | None = None,
    strides: Sequence[int] | None = None,
    input_size: tuple[int, int] | None = None,
) -> list[CompactWeights]:
    """Read compact models from a file, a folder or a list of files, in any readable format.

    Formats are told by the ending: `.safetensors` (cortexloop's own), `.npz` (pack of many models), and the published
    single-model files `.npy` (pickled arrays; nothing is executed), `.weights.h5`, `.keras`, `.h5` and `.pt`. A model
    in a single-model file is named after the file without that ending. Of a folder, all files with these endings are
    read in natural order (neuron2 before neuron10), folders in it are not.

    Args:
        source: where the models are.
        names: the models wanted, in this order; None for all. Others are not read.
        strides: stride of each layer, for formats that do not hold it (`.npz`, `.npy`, `.weights.h5`, `.pt`). None:
            the published 1, 2, 2, 1, 1 for five layers, else deduced from the size of the readout where possible.
        input_size: height and width of the images, for the same formats; None for the published 112 x 112.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: a file is damaged, of an unknown kind or no compact model, a name is missing or occurs twice, or
            the strides cannot be told. Each is one sentence that names the file.
    """
    with open_models(source, strides=strides, input_size=input_size) as files:
        return [files.read(name) for name in pick(files.names, names)]


def _expand(source: Source) -> list[tuple[Path, bool]]:
    """The files of a source in order, each with whether it was found in a folder."""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_dir():
            return [(_known(path), False)]
        inside = sorted(path.iterdir(), key=lambda item: natural_key(item.name))
        return [
            (item, True)
            for item in inside
            if item.is_file() and item.name.endswith(MODEL_SUFFIXES) and not item.name.startswith(".")
        ]
    paths = [Path(item) for item in source]
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder; give one folder, or a list of files")
    return [(_known(path), False) for path in paths]


def _known(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {str(path)!r}")
    if not path.name.endswith(MODEL_SUFFIXES):
        raise ValueError(f"{str(path)!r} is of no known kind; model files end in {_suffixes()}")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} should be a file")
    return path


def _suffix(path: Path) -> str:
    return max((suffix for suffix in MODEL_SUFFIXES if path.name.endswith(suffix)), key=len)


def _suffixes() -> str:
    return ", ".join(MODEL_SUFFIXES)


def _text(source: Source) -> str:
    return repr(str(source)) if isinstance(source, (str, os.PathLike)) else "the list of files"
