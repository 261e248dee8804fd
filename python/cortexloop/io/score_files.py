"""Score files of rigs that exchange files: what MATLAB (`-v7.3`), h5py or any program that writes JSON left there.

- `block000.mat`: HDF5 with a cell array of texts `stimulusID` and a matrix `tEvokedResp`, one row per image as h5py
  sees it (in MATLAB one column per image);
- `block000.h5`: `scores`, [images] or [images, channels], and either `ids` (texts) or `indices` (positions in the
  sorted file names of the block);
- `block000.json`: {"ids": [...], "scores": [...]}.

Source: the formats that XDREAM's EPhysScorer reads (github.com/willwx/XDream).

The HDF5 library can loop without end, or crash, on a damaged file, and keeps Python from doing anything else meanwhile.
So `ScoreReader` reads in a process of its own, which runs this file as a program; it imports nothing of the package.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".mat", ".h5", ".json")
MAX_BYTES = 256 * 2**20
MAX_ROWS, MAX_COLUMNS = 100_000, 100_000


@dataclass(frozen=True)
class Scores:
    """What a score file says.

    Attributes:
        values: float64 [rows, columns], NaN = not measured.
        ids: a text for each row, without folders; None if the file has indices instead.
        indices: a position in the sorted file names of the block for each row.
        units: a name for each column, if the file has any.
    """

    values: NDArray[np.float64]
    ids: list[str] | None
    indices: list[int] | None
    units: list[str] | None


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Read a score file in this process.

    Raises:
        ValueError: something is missing or does not fit; one sentence.
        OSError: it cannot be read, or is not complete.
        ModuleNotFoundError: h5py is needed.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"it has {size} bytes, score files have at most {MAX_BYTES}")
    if path.suffix == ".json":
        return _from_json(path.read_bytes())
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading .mat and .h5 score files takes h5py; install it with: pip install 'cortexloop[rig]'"
        ) from error
    with path.open("rb") as file:
        if not _is_hdf5(file.read(2056)):
            raise ValueError("it is not an HDF5 file; MATLAB writes one with save(..., '-v7.3')")
    with h5py.File(path, "r") as file:
        return _from_mat(file) if path.suffix == ".mat" else _from_h5(file)


def _is_hdf5(start: bytes) -> bool:
    return any(start[at : at + 8] == b"\x89HDF\r\n\x1a\n" for at in (0, 512, 1024, 2048))


def _from_mat(file: Any) -> Scores:
    for name in ("stimulusID", "tEvokedResp"):
        if name not in file:
            raise ValueError(f"it should have the variables stimulusID and tEvokedResp, it has {_some(file)}")
    references = np.asarray(file["stimulusID"]).reshape(-1)
    if references.dtype != object:
        raise ValueError("stimulusID should be a cell array of texts")
    ids = ["".join(map(chr, np.asarray(file[reference]).reshape(-1).tolist())) for reference in references]
    return _checked(np.asarray(file["tEvokedResp"]), ids, None, None, "tEvokedResp", "stimulusID")


def _from_h5(file: Any) -> Scores:
    if "scores" not in file:
        raise ValueError(f"it should have a dataset scores, it has {_some(file)}")
    values, indices, ids = np.asarray(file["scores"]), None, None
    if "ids" in file:
        ids = [_text(value) for value in np.asarray(file["ids"]).reshape(-1)]
    elif "indices" in file:
        found = np.asarray(file["indices"]).reshape(-1)
        if not np.array_equal(found, np.round(found)):
            raise ValueError("indices should be whole numbers")
        indices = [int(value) for value in found]
    else:
        raise ValueError(
            "it should have ids or indices beside scores; what belongs to what is never guessed from the order"
        )
    units = [_text(value) for value in np.asarray(file["units"]).reshape(-1)] if "units" in file else None
    return _checked(values, ids, indices, units, "scores", "ids" if indices is None else "indices")


def _from_json(data: bytes) -> Scores:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise OSError(f"it is no JSON, or not complete: {error}") from error
    if not isinstance(found, dict) or "scores" not in found or not ("ids" in found or "indices" in found):
        raise ValueError('it should look like {"ids": [...], "scores": [...]}')
    try:
        rows = [[np.nan if x is None else x for x in row] if isinstance(row, list) else
                np.nan if row is None else row for row in found["scores"]]  # fmt: skip
        values = np.asarray(rows, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("scores should be numbers, or rows of as many numbers each") from error
    ids = [str(x) for x in found["ids"]] if isinstance(found.get("ids"), list) else None
    indices = found.get("indices") if ids is None else None
    if ids is None and not (isinstance(indices, list) and all(type(x) is int for x in indices)):
        raise ValueError("ids should be a list of texts, or indices one of whole numbers")
    units = found.get("units")
    if units is not None and not (isinstance(units, list) and all(isinstance(x, str) for x in units)):
        raise ValueError("units should be a list of texts")
    return _checked(values, ids, indices, units, "scores", "ids" if indices is None else "indices")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _some(file: Any) -> str:
    return ", ".join(list(file)[:10]) or "nothing"


def _checked(
    values: NDArray[Any],
    ids: list[str] | None,
    indices: list[int] | None,
    units: list[str] | None,
    what: str,
    by: str,
) -> Scores:
    if values.dtype.kind not in "fiub" or values.ndim not in (1, 2):
        raise ValueError(f"{what} should be numbers, [images] or [images, channels]")
    values = values.astype(np.float64)
    values = values[:, None] if values.ndim == 1 else values
    rows = len(indices or []) if ids is None else len(ids)
    if len(values) != rows:
        hint = "; it looks transposed" if values.shape[1] == rows else ""
        raise ValueError(f"{what} has {len(values)} rows, {by} {rows} entries{hint}")
    if not 0 < rows <= MAX_ROWS or not 0 < values.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"{what} should have 1 to {MAX_ROWS} rows and 1 to {MAX_COLUMNS} columns")
    if units is not None and len(units) != values.shape[1]:
        raise ValueError(f"{what} has {values.shape[1]} columns, units {len(units)} entries")
    # Some rigs write the whole path of a Windows folder.
    names = None if ids is None else [name.replace("\\", "/").rpartition("/")[2] for name in ids]
    return Scores(values, names, indices, units)


# ---------------------------------------------------------------------------------------------- in another process


# Not as a script: that would put the folder of this file before the standard library's.
_PROGRAM = (
    "import sys; sys.path = [p for p in sys.path if p]; import runpy; runpy.run_path(sys.argv[1], {}, '__main__')"
)


class ScoreReader:
    """Reads score files in a process of its own, which is started with it and again after it had to be ended.

    Args:
        timeout_s: how long one file may take.
    """

    def __init__(self, timeout_s: float = 20.0) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._start()

    def read(self, path: str | os.PathLike[str]) -> Scores:
        """See `read_scores`.

        Raises:
            ValueError: also if the file makes the HDF5 library crash or hang.
            OSError, ModuleNotFoundError: see `read_scores`.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(os.fspath(path)) + "\n")
            process.stdin.flush()
            answer = self._answers.get(timeout=self._timeout_s)
        except (OSError, queue.Empty):
            answer = ""
        if not answer:
            self.close()
            raise ValueError("the HDF5 library crashed at it, or did not come to an end; it is damaged")
        found = json.loads(answer)
        if "error" in found:
            kinds = {"OSError": OSError, "ModuleNotFoundError": ModuleNotFoundError}
            raise kinds.get(found["kind"], ValueError)(found["error"])
        values = np.asarray(found.pop("values"), np.float64)
        return Scores(values=values.reshape(len(values), -1), **found)

    def close(self) -> None:
        """End the process; the next `read` starts another."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:  # what was written last had no reader any more
                        continue

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()

        def listen() -> None:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    answers.put(line)
            except ValueError:  # closed
                pass
            answers.put("")

        threading.Thread(target=listen, daemon=True, name="cortexloop-scores").start()
        self._process, self._answers = process, answers
        return process


def _serve() -> None:
    """Read the file of each line of standard input; one line of JSON for each on standard output."""
    for line in sys.stdin:
        try:
            scores = read_scores(json.loads(line))
            found: dict[str, Any] = {
                "values": scores.values.tolist(),
                "ids": scores.ids,
                "indices": scores.indices,
                "units": scores.units,
            }
        except Exception as error:
            kind = next((k for k in (ModuleNotFoundError, OSError) if isinstance(error, k)), ValueError)
            found = {"error": " ".join(str(error).split()) or type(error).__name__, "kind": kind.__name__}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _serve()
