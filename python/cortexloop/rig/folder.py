"""Images and scores as files in shared folders, as XDREAM rigs exchange them.

Out: `block003_000_<item>.png`, one file for each presentation in the order of showing, then `block003_manifest.json`.
Back: `block003.mat`, `.h5` or `.json`, see `cortexloop.io.score_files`; rows are matched by file name, or by item. One
block is out at a time; its images are removed when its scores are in, no other file ever.

All files appear complete, by renaming. Scores may be written in place: they are taken when size and time stand still
for `settle_s`, or at once if they are JSON, whose end is known. Folders are looked at every few milliseconds because
network shares tell nobody of their changes. A file that cannot be used goes to `rejected/`, with the reason beside it.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cortexloop.io.score_files import SUFFIXES, ScoreReader, Scores
from cortexloop.realtime import messages as m
from cortexloop.rig.links import Link

log = logging.getLogger("cortexloop.rig")

_BLOCK = re.compile(r"block(\d{1,9})(?:_.*)?\.[a-z0-9]+$")
_LONGEST_MS = 600_000.0  # the next batch may take as long as it takes: the rig waits for files, not for frames
_HEARTBEAT_S = 1.0
_PATIENCE_S = 0.25  # between asks while the session is paused


class _Reader(Protocol):
    def read(self, path: str | os.PathLike[str]) -> Scores: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Shown:
    """One file of a block."""

    file: str
    pres_id: str
    item_id: str


@dataclass
class Block:
    """The batch that is out. seen: (size, time) of each score file, and since when it stands still."""

    number: int
    batch_id: str
    files: list[Shown]
    seen: dict[str, tuple[tuple[int, int], float]] = field(default_factory=dict)
    left_alone: set[tuple[str, int, int]] = field(default_factory=set)


class FolderRig:
    """Serves a rig that watches folders; a client of a session like others.

    Args:
        link: to the session; says hello through it.
        images: folder for images. scores: folder for score files, the same if None. Both are made if missing.
        image_format: "png" or "bmp".
        units: names of the columns of score files; those of the file, or "ch0", "ch1", ... if empty.
        settle_s: how long a score file has to stand still.
        reject_s: how long a file that stands still may stay unreadable.
        client: name in the journal.
        reader: of score files; one with a process of its own if None.

    Attributes:
        finished: the session is over.

    Raises:
        OSError: a folder cannot be made.
        RuntimeError: the session refuses the hello.
    """

    def __init__(
        self,
        link: Link,
        images: str | os.PathLike[str],
        scores: str | os.PathLike[str] | None = None,
        *,
        image_format: str = "png",
        units: list[str] | None = None,
        settle_s: float = 0.1,
        reject_s: float = 2.0,
        client: str = "folder",
        reader: _Reader | None = None,
    ) -> None:
        self.images = Path(images)
        self.scores = self.images if scores is None else Path(scores)
        self.finished = False
        self._link, self._format, self._units = link, image_format, units or []
        self._settle_s, self._reject_s = settle_s, reject_s
        self._prefix, self._count = uuid.uuid4().hex[:12], 0
        self._block: Block | None = None
        self._after: str | None = None
        self._next_ask = self._next_beat = 0.0
        self._said = ""
        self._partial = self.images / ".partial"
        for folder in (self.images, self.scores, self._partial):
            folder.mkdir(parents=True, exist_ok=True)
        reply, _ = link.request(m.Hello(id=self._id(), client=client, roles=["display", "acquisition"]))
        if not isinstance(reply, m.Welcome):
            raise RuntimeError(f"the session refuses the folder: {reply}")
        self._session = reply.session
        self._reader = reader or ScoreReader()

    def run(self, stop: threading.Event, poll_s: float = 0.02) -> None:
        """Look at the folders until the session is over or `stop` is set; a failing disk is logged and tried again."""
        try:
            while not stop.is_set() and not self.finished:
                try:
                    busy = self.step()
                except (OSError, TimeoutError) as error:
                    log.warning("the folder %s: %s", self.images, error)
                    stop.wait(1.0)
                    continue
                if not busy:
                    stop.wait(poll_s)
        finally:
            self.close()

    def close(self) -> None:
        """End the reader; files stay as they are."""
        self._reader.close()

    def step(self) -> bool:
        """Look once; whether there was anything to do."""
        if self.finished:
            return False
        if self._block is None:
            return self._publish()
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + _HEARTBEAT_S
            self._link.request(m.Heartbeat(id=self._id()))
        return self._look(self._block)

    def _say(self, text: str) -> None:
        """Log something once, however often it is tried again."""
        if text != self._said:
            self._said = text
            log.warning("%s", text)

    def _id(self) -> str:
        self._count += 1
        return f"{self._prefix}-{self._count}"

    # ------------------------------------------------------------------------------------ images out

    def _publish(self) -> bool:
        if time.monotonic() < self._next_ask:
            return False
        reply, buffer = self._link.request(m.Ask(id=self._id(), after=self._after, within_ms=_LONGEST_MS))
        if isinstance(reply, m.Error):
            self.finished = reply.code == "FINISHED"
            if not self.finished:
                self._say(f"the session gives no images: {reply.text}")
            self._next_ask = time.monotonic() + _PATIENCE_S
            return False
        assert isinstance(reply, m.Batch)
        self._block = self._already_out(reply) or self._write(reply, buffer or b"")
        self._after = reply.batch_id
        return True

    def _already_out(self, batch: m.Batch) -> Block | None:
        """The block of this batch that was written before a restart, if it is all there; the rest of others goes."""
        found = None
        for path in sorted([*self.images.glob("block*_manifest.json"), *self._partial.glob("block*_manifest.json")]):
            try:
                manifest = json.loads(path.read_text(encoding="utf-8"))
                files = [Shown(x["file"], x["pres_id"], x["item_id"]) for x in manifest["files"]]
                session, batch_id, number = manifest["session"], manifest["batch_id"], int(manifest["block"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            if session != self._session:
                continue
            same = batch_id == batch.batch_id and files == self._names(number, batch) and path.parent == self.images
            if same and all((self.images / x.file).is_file() for x in files):
                found = Block(number, batch_id, files)
                continue
            self._remove([x for x in files if re.fullmatch(rf"block0*{number}_[A-Za-z0-9._-]+", x.file)])
            if path.parent == self._partial:
                path.unlink()
        return found

    def _write(self, batch: m.Batch, buffer: bytes | memoryview) -> Block:
        """All files are complete before the first appears, and the manifest comes last. A copy of it is left in the
        folder of unfinished files meanwhile, so that after a crash it is known what to remove."""
        pixels = np.frombuffer(buffer, np.uint8).reshape(batch.shape)
        folders = (self.images, self.scores, self._partial)
        number = 1 + max([n for folder in folders for n in self._numbers(folder)], default=-1)
        files = self._names(number, batch)
        manifest = {
            "session": self._session,
            "block": number,
            "batch_id": batch.batch_id,
            "kind": batch.kind,
            "stream": batch.stream,
            "generation": batch.generation,
            "files": [
                {"file": x.file, "pres_id": x.pres_id, "item_id": x.item_id, "kind": batch.items[i].kind}
                for x, i in zip(files, batch.order, strict=True)
            ],
        }
        last = f"block{number:03d}_manifest.json"
        _write_through(self._partial / last, json.dumps(manifest, indent=1).encode())
        encoded = [_encode(image, self._format) for image in pixels]
        for shown, index in zip(files, batch.order, strict=True):
            _write_through(self._partial / shown.file, encoded[index])
        for name in [*(shown.file for shown in files), last]:
            os.replace(self._partial / name, self.images / name)
        return Block(number, batch.batch_id, files)

    def _remove(self, files: list[Shown]) -> None:
        for shown in files:
            for folder in (self.images, self._partial):
                (folder / shown.file).unlink(missing_ok=True)

    def _names(self, number: int, batch: m.Batch) -> list[Shown]:
        digits = max(3, len(str(len(batch.order) - 1)))  # so that sorting by name is sorting by position
        files = []
        for position, (index, pres_id) in enumerate(zip(batch.order, batch.pres_ids, strict=True)):
            item_id = batch.items[index].item_id
            label = re.sub(r"[^A-Za-z0-9._-]", "_", item_id)[:100]
            file = f"block{number:03d}_{position:0{digits}d}_{label}.{self._format}"
            files.append(Shown(file, pres_id, item_id))
        return files

    def _numbers(self, folder: Path) -> set[int]:
        """Of all blocks that have a file in a folder, whoever wrote it."""
        matches = (_BLOCK.match(entry.name) for entry in os.scandir(folder))
        return {int(match[1]) for match in matches if match}

    # ------------------------------------------------------------------------------------ scores in

    def _look(self, block: Block) -> bool:
        if time.monotonic() < self._next_ask:
            return False
        for suffix in SUFFIXES:
            path = self.scores / f"block{block.number:03d}{suffix}"
            try:
                status = path.stat()
            except FileNotFoundError:
                block.seen.pop(path.name, None)
                continue
            now, mark = time.monotonic(), (status.st_size, status.st_mtime_ns)
            if (path.name, *mark) in block.left_alone:
                continue
            before = block.seen.get(path.name)
            if before is None or before[0] != mark:
                before = block.seen[path.name] = (mark, now)
            still_s = now - before[1]
            if suffix != ".json" and still_s < self._settle_s:
                continue
            try:
                scores = self._reader.read(path)
            except OSError as error:
                if still_s >= self._reject_s:
                    self._reject(block, path, mark, str(error))
                continue
            except (ValueError, ModuleNotFoundError) as error:
                self._reject(block, path, mark, str(error))
                continue
            return self._tell(block, path, mark, scores)
        return False

    def _tell(self, block: Block, path: Path, mark: tuple[int, int], scores: Scores) -> bool:
        try:
            tell, data = self._rows(block, scores)
        except ValueError as error:
            self._reject(block, path, mark, str(error))
            return False
        reply, _ = self._link.request(tell, data)
        if isinstance(reply, m.Error):
            if reply.retry or reply.code == "FAULT":
                self._say(f"the scores {path.name} are not taken yet: {reply.text}")
                self._next_ask = time.monotonic() + _PATIENCE_S
            else:
                self._reject(block, path, mark, f"{reply.code}: {reply.text}")
            return False
        self._remove(block.files)
        self._block = None
        return True

    def _rows(self, block: Block, scores: Scores) -> tuple[m.Tell, bytes]:
        """The tell that a score file means.

        Raises:
            ValueError: none of its rows belongs to the block.
        """
        units = scores.units or self._units or [f"ch{i}" for i in range(scores.values.shape[1])]
        if len(units) != scores.values.shape[1]:
            raise ValueError(f"it has {scores.values.shape[1]} columns, the configuration names {len(units)} units")
        by_name = {x.file: i for i, x in enumerate(block.files)}
        by_name |= {x.file.rpartition(".")[0]: i for i, x in enumerate(block.files)}
        by_name |= {x.pres_id: i for i, x in enumerate(block.files)}
        items = {x.item_id for x in block.files}
        rows_of: dict[str, list[int]] = {}
        unknown, by_item = [], False
        if scores.ids is None:
            in_order = sorted(range(len(block.files)), key=lambda i: block.files[i].file)
            for row, index in enumerate(scores.indices or []):
                if not 0 <= index < len(in_order):
                    raise ValueError(f"indices should be 0 to {len(in_order) - 1}, got {index}")
                rows_of.setdefault(block.files[in_order[index]].pres_id, []).append(row)
        else:
            by_item = not any(name in by_name for name in scores.ids)
            for row, name in enumerate(scores.ids):
                if not by_item and name in by_name:
                    rows_of.setdefault(block.files[by_name[name]].pres_id, []).append(row)
                elif by_item and name in items:
                    rows_of.setdefault(name, []).append(row)
                else:
                    unknown.append(name)
        if not rows_of:
            some = ", ".join(repr(name) for name in unknown[:3])
            raise ValueError(f"none of its rows belongs to block {block.number:03d}: {some}")
        if unknown:
            log.warning("block %03d: %d rows of unknown images: %s", block.number, len(unknown), unknown[:3])
        # A file that a rig showed several times has several rows; their mean is its response, as in XDREAM.
        values = np.stack([_mean(scores.values[rows]) for rows in rows_of.values()])
        owner = {x.pres_id: x.item_id for x in block.files}
        names = list(rows_of)
        content = hashlib.sha256(f"{self._session}\n{block.batch_id}\n{names}\n{units}".encode())
        content.update(values.tobytes())
        fields: dict[str, Any] = {} if by_item else {"pres_ids": names}
        tell = m.Tell(
            id=f"folder-{content.hexdigest()[:32]}",  # the same file, read again after a restart, is the same tell
            batch_id=block.batch_id,
            item_ids=names if by_item else [owner[name] for name in names],
            units=units,
            dtype="float64",
            status=["ok" if np.isfinite(row).all() else "missing" for row in values],
            kind="score",
            final=True,
            **fields,
        )
        return tell, np.ascontiguousarray(values, "<f8").tobytes()

    def _reject(self, block: Block, path: Path, mark: tuple[int, int], reason: str) -> None:
        """Put a file aside, with the reason beside it."""
        log.warning("the scores %s are rejected: %s", path, reason)
        block.left_alone.add((path.name, *mark))
        folder = self.scores / "rejected"
        try:
            folder.mkdir(exist_ok=True)
            number = sum(1 for _ in folder.glob(f"{path.stem}*.txt"))
            target = folder / f"{path.stem}-{number}{path.suffix}"
            target.with_suffix(".txt").write_text(f"{path.name}: {reason}\n", encoding="utf-8")
            os.replace(path, target)
        except OSError as error:  # a folder that may not be written; the file is left alone where it is
            log.warning("the scores %s cannot be put aside: %s", path, error)


def _mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the rows that are complete; NaN if none is."""
    complete = rows[np.isfinite(rows).all(axis=1)]
    return complete.mean(axis=0) if len(complete) else np.full(rows.shape[1], np.nan)


def _write_through(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _encode(image: NDArray[np.uint8], kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind.upper(), **({"compress_level": 1} if kind == "png" else {}))
    return stream.getvalue()
