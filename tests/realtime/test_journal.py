"""The journal: what was synced is there again, whatever else happens to the file."""

from __future__ import annotations

import errno
import os
import struct
import tempfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cortexloop.realtime import durable, frames
from cortexloop.realtime import journal as journal_module
from cortexloop.realtime.journal import JOURNAL, LOCK, MAGIC, Journal, JournalError, frame, good_records, scan
from cortexloop.realtime.records import Closed
from session_files import note, start, write_session


def written(folder: Path, notes: int = 5) -> bytes:
    """A closed journal with some notes; its bytes."""
    with Journal.create(folder, start()) as journal:
        for number in range(notes):
            journal.append(note(number))
        journal.sync()
    return (folder / JOURNAL).read_bytes()


def opened(folder: Path) -> list:
    """The records of a journal, without changing more than opening does."""
    journal, records = Journal.open(folder)
    journal.close()
    return list(records)


def test_every_kind_of_record_comes_back(tmp_path):
    records = write_session(tmp_path / "session")
    found = scan(tmp_path / "session")
    assert (found.count, found.torn_bytes, found.problem) == (len(records), 0, None)
    assert found.good_bytes == (tmp_path / "session" / JOURNAL).stat().st_size
    assert list(found.records()) == records
    assert opened(tmp_path / "session") == records
    assert list(good_records(found.path)) == records
    assert {type(record).__name__ for record in records} >= {"Start", "BatchMade", "Told", "Update", "ClockMapping"}


def test_records_stay_in_the_file_until_they_are_asked_for(tmp_path):
    journal_records = write_session(tmp_path / "session")
    journal, records = Journal.open(tmp_path / "session")
    with journal:
        journal.append(note(1))
        journal.sync()
        assert len(records) == len(journal_records)
        assert (records[0], records[-1], records[3]) == (journal_records[0], journal_records[-1], journal_records[3])
        assert (len(records[1:]), list(records[1:])) == (len(journal_records) - 1, journal_records[1:])
        with pytest.raises(IndexError):
            records[len(records)]
    (tmp_path / "session" / JOURNAL).write_bytes(MAGIC + bytes(10_000))
    for use in (lambda: list(records), lambda: records[2]):
        with pytest.raises(JournalError, match="changed"):
            use()


def test_the_layout_is_the_documented_one(tmp_path):
    """Read by hand, so that another program can."""
    data = written(tmp_path, notes=2)
    assert data[:8] == MAGIC
    offset, kinds = 8, []
    while offset < len(data):
        length, checksum = struct.unpack_from("<II", data, offset)
        payload = data[offset + 8 : offset + 8 + length]
        assert zlib.crc32(struct.pack("<I", length) + payload) == checksum
        assert payload[1:6] == b"\xa4kind"
        kinds.append(payload[6:12])
        offset += 8 + length
    assert kinds == [b"\xa5start", b"\xa7contr", b"\xa7contr"]


def test_what_was_not_synced_does_not_count(tmp_path):
    journal = Journal.create(tmp_path, start())
    journal.append(note(1))
    assert scan(tmp_path).count == 1
    assert journal.sync() > 0
    assert journal.sync() == 0
    assert scan(tmp_path).count == 2
    journal.append(note(2))
    journal.close()
    journal.close()
    assert scan(tmp_path).count == 3
    with pytest.raises(JournalError, match="closed"):
        journal.append(note(3))


def test_there_is_one_journal_per_folder(tmp_path):
    data = written(tmp_path)
    with pytest.raises(FileExistsError, match="resume"):
        Journal.create(tmp_path, start())
    assert (tmp_path / JOURNAL).read_bytes() == data
    with pytest.raises(FileNotFoundError, match="no session"):
        Journal.open(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_one_process_at_a_time(tmp_path):
    with Journal.create(tmp_path, start()) as journal:
        for attempt in (lambda: Journal.open(tmp_path), lambda: Journal.create(tmp_path, start())):
            with pytest.raises(JournalError, match="in use"):
                attempt()
        journal.append(note(1))
        journal.sync()
        assert scan(tmp_path).count == 2, "reading needs no lock"
    assert len(opened(tmp_path)) == 2


@pytest.mark.parametrize("kept", ["nothing", "an older tail"])
def test_a_tail_torn_at_every_byte_of_the_last_record(tmp_path, kept):
    data = written(tmp_path)
    last = len(frame(note(4)))
    for cut in range(1, last + 1):
        if kept == "nothing":
            for path in tmp_path.glob("*.torn-*"):
                path.unlink()
        (tmp_path / JOURNAL).write_bytes(data[: len(data) - cut])
        found = scan(tmp_path)
        torn = 0 if cut == last else last - cut
        assert (found.count, found.torn_bytes, found.problem) == (5, torn, None)
        journal, records = Journal.open(tmp_path)
        assert (len(records), journal.torn_bytes) == (5, torn)
        journal.append(note(9))
        journal.close()
        assert [r.text for r in opened(tmp_path)[1:]] == [note(n).text for n in (0, 1, 2, 3, 9)]
        tails = {path.read_bytes() for path in tmp_path.glob("*.torn-*")}
        assert not torn or data[len(data) - last : len(data) - cut] in tails


@pytest.mark.parametrize(
    "tail", [bytes(1), bytes(7), bytes(8), bytes(9), bytes(5000), b"\xff" * 100, MAGIC, b"\xa4kind"]
)
def test_tails_that_are_no_record(tmp_path, tail):
    """Zeros above all: that is what a file system leaves behind a power cut."""
    data = written(tmp_path)
    (tmp_path / JOURNAL).write_bytes(data + tail)
    journal, records = Journal.open(tmp_path)
    journal.close()
    assert (len(records), journal.torn_bytes) == (6, len(tail))
    assert (tmp_path / JOURNAL).read_bytes() == data
    assert (tmp_path / f"{JOURNAL}.torn-1").read_bytes() == tail


def test_damage_in_the_middle_is_not_cut_off(tmp_path):
    data = written(tmp_path)
    begins = len(data) - 3 * len(frame(note(0)))
    for offset in range(begins, begins + len(frame(note(0)))):
        damaged = bytearray(data)
        damaged[offset] ^= 0x10
        (tmp_path / JOURNAL).write_bytes(damaged)
        with pytest.raises(JournalError, match=rf"bytes {begins} to \d+ \(after 3 good records\).*rig recover"):
            Journal.open(tmp_path)
        assert (tmp_path / JOURNAL).read_bytes() == damaged
        assert [r.text for r in list(good_records(tmp_path / JOURNAL))[1:]] == [note(n).text for n in (0, 1, 3, 4)]
    assert not list(tmp_path.glob("*.torn-*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no journal"),
        (b"RIFF....", "no journal"),
        (MAGIC.replace(b"\r\n", b"\n"), "no journal"),
        (MAGIC, "no first record"),
        (MAGIC + b"\0\0", "no first record"),
        (MAGIC + frame(note(1)), "cannot come here"),
        (MAGIC + frame(start()) + frame(start()), "cannot come here"),
        (MAGIC + frame(start(format=7)), "format 7"),
    ],
)
def test_files_that_are_no_journal(tmp_path, content, message):
    (tmp_path / JOURNAL).write_bytes(content)
    assert message in scan(tmp_path).problem
    with pytest.raises(JournalError, match=message):
        Journal.open(tmp_path)
    assert (tmp_path / JOURNAL).read_bytes() == content
    assert not list(tmp_path.glob("*.torn-*"))


def test_a_whole_frame_of_something_else(tmp_path):
    """The checksum is right: another version wrote it, and it must not be cut off."""
    data = written(tmp_path, notes=1)
    payload = b"\x81\xa4kind\xa7strange"
    strange = struct.pack("<II", len(payload), zlib.crc32(struct.pack("<I", len(payload)) + payload)) + payload
    (tmp_path / JOURNAL).write_bytes(data + strange)
    with pytest.raises(JournalError, match="record 3"):
        Journal.open(tmp_path)


class Disk:
    """Stands in for the system's calls, and fails when told to."""

    def __init__(self, monkeypatch) -> None:
        self.write_error = self.sync_error = self.cut_error = None
        self.takes = None
        self._write, self._sync, self._cut = os.write, durable.sync_file, os.ftruncate
        monkeypatch.setattr(durable.os, "write", self.write)
        monkeypatch.setattr(journal_module, "sync_file", self.sync)
        monkeypatch.setattr(journal_module.os, "ftruncate", self.cut)

    def write(self, fd, data):
        if self.takes is not None:
            data = data[: self.takes]
            if not len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.takes -= len(data)
        if self.write_error is not None:
            raise self.write_error
        return self._write(fd, data)

    def sync(self, fd):
        if self.sync_error is not None:
            raise self.sync_error
        self._sync(fd)

    def cut(self, fd, size):
        if self.cut_error is not None:
            raise self.cut_error
        self._cut(fd, size)


@pytest.mark.parametrize("takes", [0, 1, 7, 8, 30, 100])
def test_a_full_disk(tmp_path, monkeypatch, takes):
    journal = Journal.create(tmp_path, start())
    journal.append(note(1))
    journal.sync()
    data = (tmp_path / JOURNAL).read_bytes()
    disk = Disk(monkeypatch)
    disk.takes = takes
    journal.append(note(2))
    journal.append(note(3))
    with pytest.raises(JournalError, match="no space left"):
        journal.sync()
    assert journal.failed
    assert (tmp_path / JOURNAL).read_bytes() == data, "half a record was cut off again"
    disk.takes = None
    for refused in (lambda: journal.append(note(4)), journal.sync):
        with pytest.raises(JournalError, match="failed before"):
            refused()
    journal.close()
    assert [r.text for r in opened(tmp_path)[1:]] == [note(1).text]


def test_a_disk_that_cannot_sync(tmp_path, monkeypatch):
    """Nobody knows what is on it then: no record counts, also not a later one."""
    journal = Journal.create(tmp_path, start())
    disk = Disk(monkeypatch)
    disk.sync_error = OSError(errno.EIO, os.strerror(errno.EIO))
    journal.append(note(1))
    with pytest.raises(JournalError, match="input/output error"):
        journal.sync()
    disk.sync_error = None
    with pytest.raises(JournalError, match="failed before"):
        journal.append(note(2))
    journal.close()
    assert len(opened(tmp_path)) == 1


def test_a_full_disk_that_cannot_even_be_cut(tmp_path, monkeypatch):
    journal = Journal.create(tmp_path, start())
    disk = Disk(monkeypatch)
    disk.takes, disk.cut_error = 20, OSError(errno.EIO, "x")
    journal.append(note(1))
    with pytest.raises(JournalError, match="no space left"):
        journal.sync()
    journal.close()
    disk.takes = disk.cut_error = None
    again, records = Journal.open(tmp_path)
    again.close()
    assert (len(records), again.torn_bytes) == (1, 20)


def test_an_interruption_while_writing(tmp_path, monkeypatch):
    journal = Journal.create(tmp_path, start())
    disk = Disk(monkeypatch)
    disk.write_error = KeyboardInterrupt()
    journal.append(note(1))
    with pytest.raises(KeyboardInterrupt):
        journal.sync()
    disk.write_error = None
    assert journal.failed
    journal.close()
    assert len(opened(tmp_path)) == 1


def test_a_disk_that_takes_a_few_bytes_at_a_time(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(durable.os, "write", lambda fd, data: real(fd, data[:3]))
    written(tmp_path)
    assert scan(tmp_path).count == 6


def test_a_journal_that_cannot_be_begun(tmp_path, monkeypatch):
    """Nothing of it stays, and the folder is free for the next attempt."""
    disk = Disk(monkeypatch)
    disk.takes = 50
    with pytest.raises(JournalError, match="no space left"):
        Journal.create(tmp_path, start())
    assert not (tmp_path / JOURNAL).exists()
    disk.takes = None
    Journal.create(tmp_path, start()).close()
    assert {path.name for path in tmp_path.iterdir()} <= {JOURNAL, LOCK}
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be made"):
        Journal.create(tmp_path / "file" / "session", start())


def test_a_record_beyond_all_bounds_is_refused_and_the_journal_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "MAX_RECORD", 2000)
    with Journal.create(tmp_path, start()) as journal:
        with pytest.raises(ValueError, match="at most 2000 bytes"):
            journal.append(note(1, size=2000))
        journal.append(note(2))
    assert len(opened(tmp_path)) == 2


def test_reading_while_it_grows(tmp_path):
    with Journal.create(tmp_path, start()) as journal:
        found = scan(tmp_path)
        journal.append(note(1))
        journal.sync()
        assert len(list(found.records())) == 1
    (tmp_path / JOURNAL).write_bytes(MAGIC)
    with pytest.raises(JournalError, match="changed"):
        list(found.records())
    (tmp_path / JOURNAL).unlink()
    with pytest.raises(JournalError, match="cannot be read"):
        scan(tmp_path)


SOUND = MAGIC + frame(start()) + b"".join(frame(note(n)) for n in range(3)) + frame(Closed(mono_ns=9, wall_ns=9))


@settings(max_examples=200, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.builds(lambda tail: SOUND + tail, st.binary(max_size=100)),
        st.builds(
            lambda at, new, gone: SOUND[:at] + new + SOUND[at + gone :],
            st.integers(0, len(SOUND)), st.binary(max_size=20), st.integers(0, 40),
        ),
        st.builds(
            lambda length, checksum, tail: MAGIC + struct.pack("<II", length, checksum) + tail,
            st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=50),
        ),
    )
)  # fmt: skip
@example(SOUND)
@example(SOUND + SOUND)
def test_no_bytes_break_the_reader(content):
    """It says what is good and what not, and reads no further than the file goes."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / JOURNAL
        path.write_bytes(content)
        found = scan(path)
        assert found.good_bytes + found.torn_bytes == len(content)
        assert len(list(found.records())) == found.count
        assert content[: found.good_bytes].startswith(SOUND[: found.good_bytes]) or found.count >= 1 or found.problem
        total = sum(1 for _ in good_records(path))
        assert total >= found.count - 1
        try:
            journal, records = Journal.open(name)
        except JournalError:
            assert found.problem is not None
            assert path.read_bytes() == content
        else:
            journal.close()
            assert found.problem is None
            assert len(records) == found.count
            assert path.read_bytes() == content[: found.good_bytes]


def test_memory_stays_flat(tmp_path):
    """40 MB through the journal and the reader, with no more than a few records in memory."""
    with Journal.create(tmp_path, start()) as journal:
        tracemalloc.start()
        try:
            for number in range(80):
                journal.append(note(number, size=500_000))
                journal.sync()
            found = scan(tmp_path)
            assert sum(1 for _ in found.records()) == 81
            assert sum(1 for _ in good_records(found.path)) == 81
            journal.close()
            again, records = Journal.open(tmp_path)
            assert sum(1 for _ in records[1:]) == 80
            again.close()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert found.good_bytes > 40_000_000
    assert peak < 6_000_000
