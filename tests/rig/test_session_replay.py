"""Journals of real sessions: sound, told in tables as they were told by the rig, and repeated to the bit."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cortexloop.evolve import CholeskyCMA, FourierGenerator
from cortexloop.realtime import ResumeError, Session, SessionSettings, StreamSettings
from cortexloop.realtime import messages as m
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.jobs import Immediately
from cortexloop.realtime.journal import JOURNAL, Journal, JournalError
from cortexloop.realtime.records import Update
from cortexloop.realtime.sources import EvolutionSource, FixedImages
from cortexloop.rig.export import export
from cortexloop.rig.history import Recording
from cortexloop.rig.inprocess import Loop, RequestError
from cortexloop.rig.replay import repeat
from cortexloop.rig.timeline import timeline
from cortexloop.rig.verify import verify

SIZE = 12
SETTINGS = SessionSettings(
    session="replayed", seed=5, repeats=2, within_ms=600_000, max_reshow=1, min_fraction=0.5,
    streams=[StreamSettings(name="evo", units=["u1"]), StreamSettings(name="set")],
)  # fmt: skip
REFERENCES = np.random.default_rng(2).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)


def sources(seed: int = 0) -> dict[str, Any]:
    generator = FourierGenerator(SIZE, SIZE)
    optimiser = CholeskyCMA(generator.dim, population=5, seed=seed)
    pictures = np.random.default_rng(1).integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
    return {
        "evo": EvolutionSource(optimiser, generator, generations=3),
        "set": FixedImages(pictures, per_batch=2, labels=["cat", "dog", "mug", "sky"], seed=3),
    }


def responses(images):
    flat = images.reshape(len(images), -1).astype(np.float64)
    return np.stack([flat.mean(1), flat.std(1)], axis=1)


def show(session: Session, told: list[Any], batches: int | None = None) -> None:
    """Show batches; the sixth presentation of each never works, some responses come as means over an image."""
    loop = Loop(session)
    while batches is None or batches > 0:
        try:
            batch, images = loop.ask()
        except RequestError as error:
            if error.code != "FINISHED":
                raise
            return
        bad = batch.pres_ids[5] if len(batch.pres_ids) > 5 else None
        loop.shown([
            m.Event(pres_id=pres, outcome="abort" if pres == bad else "ok", t_on=k, clock="screen")
            for k, pres in enumerate(batch.pres_ids)
        ])  # fmt: skip
        values = responses(images)
        if batch.stream == "set":
            loop.tell(batch, values, units=["u0", "u1"], final=True)
            told += [(batch.batch_id, item.item_id, None, *v) for item, v in zip(batch.items, values, strict=True)]
        else:
            rows = values[batch.order]
            status = ["artifact" if pres == bad else "ok" for pres in batch.pres_ids]
            loop.tell(batch, rows, units=["u0", "u1"], pres_ids=batch.pres_ids, status=status, final=True)
            told += [
                (batch.batch_id, batch.items[i].item_id, pres, *v)
                for i, pres, v in zip(batch.order, batch.pres_ids, rows, strict=True)
            ]
        batches = None if batches is None else batches - 1


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """(folder, what was told): a session that was left and taken up again."""
    folder = tmp_path_factory.mktemp("sessions") / "session"
    told: list[Any] = []
    kept = {"references": REFERENCES, "clock": ManualClock(), "executor": Immediately(), "config": {"monkey": "a"}}
    with Session.create(folder, SETTINGS, sources(), **kept) as first:
        show(first, told, batches=3)
        Loop(first).control(m.Note, "a note")
    with Session.resume(folder, SETTINGS, sources(), **kept) as second:
        show(second, told)
    return folder, told


def again(folder: Path, made: dict[str, Any] | None = None, **more: Any):
    return repeat(folder, SETTINGS, made or sources(), REFERENCES, config={"monkey": "a"}, **more)


def test_it_is_sound(session):
    found = verify(session[0])
    assert found.sound, found.checks
    assert found["tells"].notes == []
    assert found["batches"].looked > 5


def test_references_are_scored_as_the_stream_is(session):
    """By the units that make its score, so that both can be compared."""
    expected = responses(REFERENCES)
    with Recording.open(session[0]) as recording:
        assert recording.history.score_units("evo") == ["u1"]
        assert recording.history.score_units("set") == []
        for batch in recording.history.batches.values():
            if batch.made.batch_kind == "gen":
                columns = [1] if batch.made.stream == "evo" else [0, 1]
                found = recording.history.of_item(batch, "ref-000"), recording.history.of_item(batch, "ref-001")
                values = [v[columns].mean() for part in found for v in part]
                assert np.isclose(recording.history.reference_mean(batch), np.mean(values), rtol=1e-12)
                assert np.isclose(min(values), expected[:, columns].mean(axis=1).min(), rtol=1e-12)


def test_the_tables_have_what_was_told(session, tmp_path):
    folder, told = session
    with Recording.open(folder) as recording:
        export(recording, "csv", tmp_path)
        with (tmp_path / "responses.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        assert len(found) == 2 * len(told)
        for i, (batch, item, pres, u0, u1) in enumerate(told):
            for row, unit, value in zip(found[2 * i : 2 * i + 2], ("u0", "u1"), (u0, u1), strict=True):
                assert (row["batch_id"], row["item_id"], row["unit"]) == (batch, item, unit)
                assert float(row["response"]) == value
                assert pres is None or row["pres_id"] == pres
                assert row["counts"] == ("0" if row["status"] == "artifact" else "1")
        with (tmp_path / "items.csv").open(newline="") as file:
            labels = {row["item_id"]: row["label"] for row in csv.DictReader(file)}
        assert {label for item, label in labels.items() if item.startswith("set-")} == {"cat", "dog", "mug", "sky"}
        # What the sources learned is what follows from the responses that count.
        for batch in recording.history.batches.values():
            if batch.update is None:
                continue
            chosen = [1] if batch.made.stream == "evo" else [0, 1]
            generated = [item.item_id for item in batch.made.items if item.kind == "gen"]
            for item, score in zip(generated, batch.update.scores.numpy(), strict=True):
                values = [v for part in recording.history.round(batch) if item in part.state.presentations
                          for v in recording.history.of_item(part, item)]  # fmt: skip
                assert np.isclose(np.mean([v[chosen].mean() for v in values]), score, rtol=1e-12)
        text = "\n".join(line.text for line in timeline(recording))
        assert "a note" in text
        assert "in vain" in text


def test_it_repeats_to_the_bit(session):
    before = {path: path.read_bytes() for path in session[0].iterdir()}
    found = again(session[0])
    assert (found.learned, found.images, found.different) == (3 + 2, 3 * 5 + 4, [])
    assert found.batches > 5
    assert {path: path.read_bytes() for path in session[0].iterdir()} == before


def test_it_does_not_repeat_with_other_parts(session):
    with pytest.raises(ResumeError, match="evo"):
        again(session[0], sources(seed=1))
    with pytest.raises(ResumeError):
        repeat(session[0], SETTINGS, sources(), REFERENCES, config={"monkey": "b"})
    with pytest.raises(ResumeError, match="reference"):
        repeat(session[0], SETTINGS, sources(), REFERENCES[:1], config={"monkey": "a"})


def test_images_that_come_out_differently_are_listed(session, monkeypatch):
    """As on another GPU: the codes are the same, the pixels not quite."""
    made = sources()
    propose = made["evo"].propose

    def other(decision=None):
        proposal = propose(decision)
        if proposal is None:
            return None
        images = proposal.render().copy()
        images[2, 0, 0, 0] ^= 1
        return type(proposal)(**{**vars(proposal), "render": lambda: images})

    monkeypatch.setattr(made["evo"], "propose", other)
    assert again(session[0], made).different == [f"evo-{g:04d}-002" for g in range(3)]
    assert again(session[0], render=False).images == 0


def test_a_changed_score_is_found(session, tmp_path):
    journal, records = Journal.open(session[0])
    journal.close()
    i = next(i for i, record in enumerate(records) if isinstance(record, Update))
    scores = records[i].scores.numpy().copy()
    scores[0] += 1
    changed = msgspec.structs.replace(records[i], scores=type(records[i].scores).of(scores))
    with Journal.create(tmp_path, records[0]) as copy:
        for record in (*records[1:i], changed, *records[i + 1 :]):
            copy.append(record)
    with pytest.raises(ResumeError, match="do not follow from the responses"):
        again(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"no journal")
    with pytest.raises(JournalError, match="no journal"):
        again(tmp_path)
