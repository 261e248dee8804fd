"""What is wrong with a session is found, told in words, and nothing is found in a sound one."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cortexloop.realtime.journal import JOURNAL, Journal, JournalError, frame, scan
from cortexloop.realtime.pixels import PIXELS
from cortexloop.realtime.records import Array, BatchMade, Control, Opened, Served, ShownEvents, Start, Told, Update
from cortexloop.rig.history import Recording
from cortexloop.rig.recover import recover
from cortexloop.rig.verify import verify
from session_files import BEGUN, IMAGES, write_session


@pytest.fixture
def session(tmp_path):
    """(folder, records)"""
    return tmp_path / "session", write_session(tmp_path / "session")


def rewrite(folder, records):
    """The same session with these records."""
    (folder / JOURNAL).unlink()
    with Journal.create(folder, records[0]) as journal:
        for record in records[1:]:
            journal.append(record)


def at(records, kind, number=0):
    """Place of a record of this kind."""
    return [i for i, record in enumerate(records) if isinstance(record, kind)][number]


def test_a_sound_session(session):
    folder, records = session
    found = verify(folder)
    assert found.sound
    assert {name: check.looked for name, check in found.checks.items()} == {
        "journal": len(records), "batches": 5, "presentations": 5, "tells": 6 + 5 + 2 + 6, "updates": 3, "clocks": 3,
        "times": len(records), "images": 2 + 3 * IMAGES,
    }  # fmt: skip
    assert verify(folder / JOURNAL).sound


def replaced(number, kind, **changes):
    """Change fields of a record."""

    def change(records):
        i = at(records, kind, number)
        return [*records[:i], msgspec.structs.replace(records[i], **changes), *records[i + 1 :]]

    return change


def again(number, kind, **changes):
    """Repeat a record at its place, changed."""

    def change(records):
        i = at(records, kind, number)
        return [*records[: i + 1], msgspec.structs.replace(records[i], **changes), *records[i + 1 :]]

    return change


def changed_tell(**changes):
    def change(records):
        i = at(records, Told)
        header = msgspec.structs.replace(records[i].header, **changes)
        return [*records[:i], msgspec.structs.replace(records[i], header=header), *records[i + 1 :]]

    return change


@pytest.mark.parametrize(
    ("check", "words", "change"),
    [
        ("tells", "never made", changed_tell(batch_id="evo-0099")),
        ("tells", "does not have", changed_tell(item_ids=["evo-0000-099"])),
        ("tells", "does not have", changed_tell(pres_ids=["evo-0000.0002"])),
        ("tells", "2 status for 1 rows", changed_tell(status=["ok", "ok"])),
        ("tells", "1 rows of 3 units", changed_tell(units=["a", "b", "c"])),
        ("tells", "no numbers", replaced(0, Told, responses=Array.of(np.array([[np.nan, 1]], np.float32)))),
        ("tells", "cannot be read", replaced(0, Told, responses=Array("<f4", (1, 2), b"123"))),
        ("tells", "cannot be read", replaced(0, Told, responses=Array("?!", (1, 2), b"123"))),
        ("tells", "recorded all the same", again(1, Told)),
        ("batches", "made twice", again(0, BatchMade)),
        ("batches", "checksums", replaced(0, BatchMade, shas=["0" * 64] * 6)),
        ("batches", "items beyond", replaced(0, BatchMade, order=[0, 1, 2, 3, 4, 6])),
        ("batches", "an order of 6", replaced(0, BatchMade, pres_ids=["a"])),
        ("batches", "generation 5", replaced(0, BatchMade, generation=5)),
        ("batches", "stream 'other'", replaced(0, BatchMade, stream="other")),
        ("batches", "codes of shape [1, 5]", replaced(0, BatchMade, codes=Array.of(np.zeros((1, 5))))),
        ("batches", "never made", replaced(0, Served, batch_id="evo-0099")),
        ("updates", "never made", replaced(0, Update, batch_id="evo-0099")),
        ("updates", "scores of shape", replaced(0, Update, scores=Array.of(np.zeros(3)))),
        ("updates", "the second", again(0, Update)),
        ("updates", "stream 'other'", replaced(0, Update, stream="other")),
        ("presentations", "that no batch has", lambda records: [
            r if i != at(records, ShownEvents) else msgspec.structs.replace(
                r, events=[msgspec.structs.replace(r.events[0], pres_id="evo-0099.0000"), *r.events[1:]])
            for i, r in enumerate(records)]),
        ("presentations", "onsets", replaced(0, ShownEvents, onsets=[])),
        ("times", "before the record before it", replaced(2, BatchMade, mono_ns=0)),
        ("images", "missing", replaced(0, Start, references=["ab" * 32])),
        ("images", "of shape", replaced(0, Start, image_shape=(9, 9, 3))),
    ],
)  # fmt: skip
def test_records_that_do_not_fit_together(session, check, words, change):
    folder, records = session
    rewrite(folder, change(records))
    found = verify(folder)
    assert not found.sound
    assert any(words in problem for problem in found[check].problems), found.checks
    # Whatever is wrong, tables can still be made of it.
    with Recording.open(folder) as recording:
        assert recording.history.start is not None


def test_what_is_unusual_but_right_is_a_note(session):
    """A killed process, a calendar clock that was set, and what was cut off."""
    folder, records = session
    middle = at(records, BatchMade, 2)
    late = [
        msgspec.structs.replace(r, mono_ns=r.mono_ns - records[middle].mono_ns, wall_ns=r.wall_ns - 10**9)
        for r in records[middle:]
    ]
    opened = Opened(pid=2, host="rig", environment={}, mono_ns=0, wall_ns=BEGUN, torn_bytes=3)
    fault = Control(mono_ns=10**12, wall_ns=BEGUN, what="fault", text="the source failed")
    rewrite(folder, [*records[:middle], opened, *late, fault])
    with (folder / JOURNAL).open("ab") as file:
        file.write(b"\1\2\3")
    (folder / f"{JOURNAL}.torn-1").write_bytes(b"abc")
    found = verify(folder)
    assert found.sound
    assert any("stepped back" in note for note in found["times"].notes)
    notes = " ".join(found["journal"].notes)
    assert "3 bytes of an unfinished record" in notes
    assert f"{JOURNAL}.torn-1" in notes
    assert "the source failed" in notes
    assert "without closing" in notes


def test_long_lists_are_cut_short(session):
    folder, records = session
    rewrite(folder, [*records, *[again(0, Update)(records)[at(records, Update)]] * 50])
    check = verify(folder)["updates"]
    assert (check.wrong, len(check.problems)) == (50, 20)


def test_images_that_are_damaged_or_gone(session):
    folder, _ = session
    data = bytearray((folder / PIXELS).read_bytes())
    data[100] ^= 1
    (folder / PIXELS).write_bytes(data)
    assert any("damaged" in problem for problem in verify(folder)["images"].problems)
    (folder / PIXELS).write_bytes(data[:2000])
    assert verify(folder)["images"].wrong == 5
    (folder / PIXELS).unlink()
    assert any("no images" in problem for problem in verify(folder)["images"].problems)
    (folder / PIXELS).write_bytes(b"something else")
    assert any("no store" in problem for problem in verify(folder)["images"].problems)


def damage(folder, records, number):
    """Spoil a record; the bytes before it."""
    sizes = [len(frame(record)) for record in records]
    begins = 8 + sum(sizes[:number])
    data = bytearray((folder / JOURNAL).read_bytes())
    data[begins + sizes[number] // 2] ^= 0xFF
    (folder / JOURNAL).write_bytes(data)
    return bytes(data[:begins])


def test_recovery_leaves_the_journal_and_writes_what_is_good_beside_it(session):
    folder, records = session
    number = at(records, Told, 7)
    before = damage(folder, records, number)
    spoilt = (folder / JOURNAL).read_bytes()
    assert not verify(folder).sound
    with pytest.raises(JournalError, match="rig recover"):
        Recording.open(folder)
    found = recover(folder)
    assert (folder / JOURNAL).read_bytes() == spoilt
    assert found.resumable == folder / f"{JOURNAL}.recovered"
    assert found.resumable.read_bytes() == before
    assert (found.before, found.behind) == (number, len(records) - number - 1)
    assert found.rescued is not None
    assert list(scan(found.rescued).records()) == records[:number] + records[number + 1 :]
    with Recording.open(found.rescued) as recording:
        assert len(recording.history.tells) == sum(isinstance(r, Told) for r in records) - 1
        assert recording.pixels is not None
    # As a user would.
    (folder / JOURNAL).rename(folder / "damaged")
    found.resumable.rename(folder / JOURNAL)
    journal, kept = Journal.open(folder)
    journal.close()
    assert list(kept) == records[:number]


def test_recovery_of_what_needs_none_and_of_what_cannot_be(session):
    folder, records = session
    assert recover(folder).problem is None
    assert not list(folder.glob("*.recovered"))
    damage(folder, records, 0)
    with pytest.raises(JournalError, match="without the first record"):
        recover(folder)
    with pytest.raises(FileNotFoundError, match="no session"):
        recover(folder / "elsewhere")


def test_damage_to_the_last_record_is_a_torn_tail(session):
    """Nothing follows that could be lost with it; its bytes are kept."""
    folder, records = session
    damage(folder, records, len(records) - 1)
    found = recover(folder)
    assert found.problem is None
    assert found.torn_bytes == len(frame(records[-1]))
    assert isinstance(records[0], Start)
