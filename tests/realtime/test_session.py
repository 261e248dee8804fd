"""The state machine between sources, a rig and a journal, on a clock that stands still."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sessions import NEVER_MS, Rig, evolution, identity, pictures, responses, run, sets, settings

from cortexloop.realtime import ResumeError, Session, SessionSettings, StreamSettings
from cortexloop.realtime import messages as m
from cortexloop.realtime import records as r
from cortexloop.realtime.checks import image_sha
from cortexloop.realtime.journal import JOURNAL, MAGIC, JournalError, frame, scan
from cortexloop.realtime.sources import EvolutionSource, FixedImages
from cortexloop.rig.inprocess import Loop, RequestError


def one_evolution() -> dict[str, EvolutionSource]:
    return {"evo": evolution()}


def two_evolutions() -> dict[str, EvolutionSource]:
    return {"a": evolution(0, 3), "b": evolution(1, 3)}


def test_an_evolution_is_shown_told_and_learned(tmp_path: Path):
    rig = Rig(tmp_path, one_evolution, settings("evo", repeats=2, reference_repeats=3), pictures(2))
    with rig.create() as session:
        loop = Loop(session)
        shown = run(loop)
        assert [b.batch_id for b in shown] == [f"evo-{g:04d}" for g in range(4)]
        for batch in shown:
            assert [item.kind for item in batch.items] == ["ref"] * 2 + ["gen"] * 6
            assert sorted(batch.order[:6]) == [0] * 3 + [1] * 3  # references first
            assert sorted(batch.order[6:]) == sorted([*range(2, 8), *range(2, 8)])
            assert len(set(batch.pres_ids)) == len(batch.order)
        status = session.status()
        assert (status.state, status.streams[0].generation, status.told) == ("finished", 4, 4 * 8)
        # the same as the optimiser alone, told the same scores
        source = evolution()
        for batch in shown:
            proposal = source.propose()
            assert proposal is not None
            images = proposal.render()
            assert [item.sha for item in batch.items[2:]] == [image_sha(image)[:16] for image in images]
            source.learn(responses(images).mean(1), responses(images))
        assert source.digest() == session.known.streams["evo"].source.digest()


def test_ask_is_the_same_until_it_is_told(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo")).create() as session:
        loop = Loop(session)
        first, images = loop.ask()
        again, same = loop.ask()
        assert identity(first) == identity(again)
        np.testing.assert_array_equal(images, same)
        loop.tell(first, responses(images))
        second, _ = loop.ask()
        assert second.batch_id == "evo-0001"


def test_parts_of_a_batch(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo"), pictures(1)).create() as session:
        loop = Loop(session)
        _, whole = loop.ask()
        parts = []
        for part in range(4):
            reply, buffer = loop.request(m.Ask(id=f"part{part}", max_items=2, part=part))
            assert isinstance(reply, m.Batch)
            assert buffer is not None
            assert (reply.first, reply.more) == (2 * part, part < 3)
            parts.append(np.frombuffer(buffer, np.uint8).reshape(reply.shape))
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        reply, _ = loop.request(m.Ask(id="beyond", max_items=2, part=4))
        assert isinstance(reply, m.Error)
        assert reply.code == "BAD_SHAPE"
        header, nothing = loop.request(m.Ask(id="header", need="header"))
        assert isinstance(header, m.Batch)
        assert nothing is None


def test_streams_alternate(tmp_path: Path):
    with Rig(tmp_path, two_evolutions, settings("a", "b")).create() as session:
        loop = Loop(session)
        first, images = loop.ask()
        second, _ = loop.ask(after=first.batch_id)
        assert (first.stream, second.stream) == ("a", "b")
        loop.tell(first, responses(images))
        third, _ = loop.ask(after=second.batch_id)
        assert (third.stream, third.generation) == ("a", 1)
        assert {b.stream for b in run(loop)} == {"a", "b"}


def test_what_comes_twice_counts_once(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo")).create() as session:
        loop = Loop(session)
        batch, images = loop.ask()
        values = np.ascontiguousarray(responses(images)[:3], "<f8").tobytes()
        tell = m.Tell(
            id="t1", batch_id=batch.batch_id, item_ids=[x.item_id for x in batch.items[:3]], units=["u", "v"],
            dtype="float64",
        )  # fmt: skip
        first, _ = loop.request(tell, values)
        again, _ = loop.request(tell, values)
        assert first == m.Ack(id="t1", accepted=3)
        assert again == m.Ack(id="t1", accepted=3, dup=True)
        other, _ = loop.request(m.Tell(**{**_fields(tell), "id": "t2"}), np.zeros((3, 2)).tobytes())
        assert isinstance(other, m.Ack)
        assert (other.accepted, {x.why for x in other.ignored}) == (0, {"duplicate"})
        loop.tell(batch, responses(images)[3:], item_ids=[x.item_id for x in batch.items[3:]], units=["u", "v"])
        np.testing.assert_array_equal(session.known.streams["evo"].rounds[0].results(None)[1], responses(images))
        session.poll()
        late = loop.tell(batch, responses(images), units=["u", "v"])
        assert {x.why for x in late.ignored} == {"late"}
        assert session.status().late == 6


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


def test_repeats_are_averaged_presentation_by_presentation(tmp_path: Path):
    with Rig(tmp_path, sets, settings("set", repeats=2)).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        values = np.arange(4.0)[:, None]
        loop.tell(batch, values[:2], pres_ids=batch.pres_ids[:2])
        loop.tell(batch, values[2:], pres_ids=batch.pres_ids[2:])
        expected = [values[[i for i, x in enumerate(batch.order) if x == item]].mean() for item in range(2)]
        np.testing.assert_array_equal(session.known.streams["set"].rounds[0].results(None)[0], expected)


def test_rows_of_an_item_without_presentations(tmp_path: Path):
    """One row is about all of its presentations, several are about one after the other."""
    with Rig(tmp_path, sets, settings("set", repeats=3)).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        one, other = (item.item_id for item in batch.items)
        ack = loop.tell(batch, [1.0, 2.0, 4.0, 8.0, 5.0], item_ids=[one, one, one, one, other])
        assert (ack.accepted, [x.why for x in ack.ignored]) == (4, ["duplicate"])
        np.testing.assert_allclose(session.known.streams["set"].rounds[0].results(None)[0], [7 / 3, 5.0])


def test_missing_images_are_shown_again(tmp_path: Path):
    with Rig(tmp_path, sets, settings("set", repeats=2), pictures(1, 9)).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        status = ["ok"] * 5
        missed = next(k for k, item in enumerate(batch.order) if item == 2)
        status[missed] = "artifact"
        loop.tell(batch, np.ones(5), pres_ids=batch.pres_ids, status=status)
        repair, images = loop.ask(after="set-0001")  # which was made before
        assert (repair.kind, repair.batch_id, len(repair.order)) == ("repair", "set-0000-r1", 1)
        assert repair.items == [batch.items[2]]
        np.testing.assert_array_equal(images[0], session.images_of("set-0000")[2])
        loop.tell(repair, [3.0])
        np.testing.assert_array_equal(session.known.streams["set"].rounds[0].results(None)[0], [1.0, 2.0])
        assert session.status().reshown == 1


def test_an_aborted_presentation_does_not_count_whatever_is_told(tmp_path: Path):
    with Rig(tmp_path, sets, settings("set")).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        loop.tell(batch, [1.0], pres_ids=batch.pres_ids[:1])
        loop.shown([m.Event(pres_id=pres, outcome="no_fix") for pres in batch.pres_ids])
        ack = loop.tell(batch, [2.0], pres_ids=batch.pres_ids[1:])
        assert [x.why for x in ack.ignored] == ["not_ok"]
        assert loop.ask(after="set-0001")[0].kind == "repair"


def test_too_many_missing_stall_a_stream_until_resumed(tmp_path: Path):
    rig = Rig(tmp_path, one_evolution, settings("evo", max_reshow=1, min_fraction=0.9))
    with rig.create() as session:
        loop = Loop(session)
        for _ in range(2):
            batch, _ = loop.ask()
            loop.tell(batch, np.full(len(batch.items), np.nan), status=["missing"] * len(batch.items))
        with pytest.raises(RequestError, match="too few responses came for stream 'evo'; send resume"):
            loop.ask()
        assert session.status().state == "paused"
    with rig.resume() as session:
        loop = Loop(session)
        assert session.status().state == "paused"
        loop.control(m.Resume)
        batch, images = loop.ask()
        assert batch.batch_id == "evo-0000-r2"
        status = ["missing", *["ok"] * 5]
        values = responses(images)
        loop.tell(batch, values, status=status)
        with pytest.raises(RequestError, match="too few"):  # 5 of 6 are less than 0.9
            loop.ask()


def test_few_missing_are_told_as_nan(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo", max_reshow=0, min_fraction=0.8)).create() as session:
        loop = Loop(session)
        batch, images = loop.ask()
        loop.tell(batch, responses(images), status=["ok"] * 5 + ["missing"])
        assert loop.ask()[0].generation == 1
        update = next(x for x in scan(tmp_path / JOURNAL).records() if isinstance(x, r.Update))
        np.testing.assert_array_equal(np.isnan(update.scores.numpy()), [False] * 5 + [True])


def test_a_filler_is_shown_when_the_deadline_passes(tmp_path: Path):
    rig = Rig(tmp_path, one_evolution, settings("evo", within_ms=150.0), pictures(2))
    with rig.create() as session:
        loop = Loop(session)
        batch, images = loop.ask()
        ask = m.Ask(id="next", after=batch.batch_id)
        assert session.handle("in-process", ask) is None  # nothing is told, so nothing is next
        due = session.next_wake_ns()
        assert due == rig.clock.monotonic_ns() + 150_000_000
        rig.clock.advance(0.149)
        assert session.poll() == []
        rig.clock.advance(0.002)
        [(client, (filler, buffer))] = session.poll()
        assert isinstance(filler, m.Batch)
        assert (client, filler.kind, filler.id) == ("in-process", "filler", "next")
        assert buffer is not None
        assert {item.kind for item in filler.items} == {"ref"}
        assert session.status().deadline_misses == 1
        again = session.handle("in-process", ask)  # the same question has the same answer
        assert again is not None
        assert isinstance(again.message, m.Batch)
        assert again.message.batch_id == filler.batch_id
        loop.tell(filler, [1.0, 2.0])
        loop.tell(batch, responses(images))
        assert session.status().reference_mean == pytest.approx(responses(images)[:2].mean())
        after, _ = loop.ask(after=filler.batch_id)
        assert after.batch_id == "evo-0001"


def test_fillers_of_the_best_images(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo", filler="best")).create() as session:
        loop = Loop(session)
        with pytest.raises(RequestError, match="no references to show meanwhile"):
            loop.ask(after=loop.ask()[0].batch_id, within_ms=0)
        batch, images = loop.ask()
        loop.tell(batch, responses(images))
        second, _ = loop.ask()
        filler, shown = loop.ask(after=second.batch_id, within_ms=0)
        best = np.argsort(-responses(images).mean(1))
        np.testing.assert_array_equal(shown, images[best])
        assert filler.items[0].stream == "evo"


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"batch_id": "evo-0009"}, "STALE_BATCH", "there is no batch 'evo-0009'"),
        ({"item_ids": ["evo-0000-000", "other"]}, "UNKNOWN_ITEM", "has no item 'other'"),
        ({"pres_ids": ["evo-0000.0000"]}, "BAD_SHAPE", "pres_ids should have 2 entries"),
        ({"pres_ids": ["x", "y"]}, "UNKNOWN_ITEM", "no presentation 'x' of"),
        ({"status": ["ok"]}, "BAD_SHAPE", "status should have 2 entries"),
        ({"units": ["u"]}, "BAD_SHAPE", "2 rows of 1 units in float64 are 16 bytes, got 32"),
        ({"units": ["u", "u"]}, "BAD_SHAPE", "named once"),
        ({"dtype": "float32"}, "BAD_SHAPE", "are 16 bytes, got 32"),
    ],
)
def test_responses_that_cannot_be(tmp_path: Path, change: dict[str, Any], code: str, text: str):
    with Rig(tmp_path, one_evolution, settings("evo")).create() as session:
        loop = Loop(session)
        loop.ask()
        fields = {
            "id": "t", "batch_id": "evo-0000", "item_ids": ["evo-0000-000", "evo-0000-001"], "units": ["u", "v"],
            "dtype": "float64", **change,
        }  # fmt: skip
        reply, _ = loop.request(m.Tell(**fields), np.ones((2, 2)).tobytes())
        assert isinstance(reply, m.Error)
        assert reply.code == code
        assert text in reply.text
        assert session.status().told == 0


def test_nan_is_no_response(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo")).create() as session:
        loop = Loop(session)
        batch, images = loop.ask()
        values = responses(images)
        values[2, 1] = np.nan
        with pytest.raises(RequestError, match=r"NAN: the response to 'evo-0000-002' is NaN or infinite"):
            loop.tell(batch, values)
        assert session.status().told == 0
        loop.tell(batch, values, status=["ok", "ok", "missing", "ok", "ok", "ok"])


def test_streams_are_scored_by_their_units(tmp_path: Path):
    chosen = SessionSettings(
        session="test", streams=[StreamSettings(name="evo", units=["v", "w"])], within_ms=NEVER_MS
    )  # fmt: skip
    with Rig(tmp_path, one_evolution, chosen).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        with pytest.raises(RequestError, match="scored by 'v', 'w'; of these, 'w' is not told"):
            loop.tell(batch, np.ones((6, 2)), units=["u", "v"])
        values = np.random.default_rng(0).standard_normal((6, 3))
        loop.tell(batch, values, units=["w", "u", "v"])
        scores, kept = session.known.streams["evo"].rounds[0].results([2, 0])
        session.poll()
        np.testing.assert_array_equal(kept, values[:, [2, 0]])
        update = next(x for x in scan(tmp_path / JOURNAL).records() if isinstance(x, r.Update))
        np.testing.assert_array_equal(update.scores.numpy(), scores)


def test_pause_note_stop(tmp_path: Path):
    rig = Rig(tmp_path, one_evolution, settings("evo"))
    with rig.create() as session:
        loop = Loop(session)
        batch, images = loop.ask()
        loop.control(m.Pause, "the animal drinks")
        with pytest.raises(RequestError, match="paused: the animal drinks") as caught:
            loop.ask()
        assert caught.value.retry
        loop.tell(batch, responses(images))  # responses are taken
        loop.control(m.Note, "electrode moved")
    with rig.resume() as session:
        loop = Loop(session)
        assert session.state == "paused"
        loop.control(m.Resume)
        assert loop.ask()[0].generation == 1
        loop.control(m.Stop, "enough")
        assert session.state == "finished"
        with pytest.raises(RequestError, match="FINISHED"):
            loop.ask()
        with pytest.raises(RequestError, match="stopped; nothing more is recorded"):
            loop.control(m.Note, "too late")
    with rig.resume() as session:
        assert session.state == "finished"


def test_lost_links_are_noticed_and_come_back(tmp_path: Path):
    rig = Rig(tmp_path, one_evolution, settings("evo", stale_after_s=3))
    with rig.create() as session:
        loop = Loop(session)
        rig.clock.advance(2.9)
        session.poll()
        assert not session.status().links[0].stale
        rig.clock.advance(0.2)
        session.poll()
        assert session.status().links[0].stale
        loop.ask()
        assert not session.status().links[0].stale
    what = [x.what for x in scan(tmp_path / JOURNAL).records() if isinstance(x, r.Control)]
    assert what == ["link_lost", "link_back"]


@pytest.mark.parametrize("seed", range(3))
def test_it_resumes_from_every_record_to_the_bit(tmp_path: Path, seed: int):
    """A crash may leave any prefix of the journal; what follows is then the same, with some presentations missing."""

    def status(batch: m.Batch) -> list[str]:
        rng = np.random.default_rng([seed, sum(batch.batch_id.encode())])
        return rng.choice(["ok", "ok", "ok", "missing"], len(batch.items)).tolist()

    def sources() -> dict[str, Any]:
        return {"a": evolution(seed, 3), "set": FixedImages(pictures(7), per_batch=2, seed=seed)}

    rig = Rig(tmp_path / "whole", sources, settings("a", "set", max_reshow=2, min_fraction=0.1, seed=seed), pictures(2))
    with rig.create() as session:
        whole = [identity(batch) for batch in run(Loop(session), status=status)]
        digests = {name: stream.source.digest() for name, stream in session.known.streams.items()}
    records = list(scan(tmp_path / "whole" / JOURNAL).records())
    made = [x.batch_id for x in records if isinstance(x, r.BatchMade)]
    assert sorted(made) == sorted(batch[0] for batch in whole)
    for cut in range(1, len(records)):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / JOURNAL).write_bytes(MAGIC + b"".join(map(frame, records[:cut])))
        if cut % 2:  # with and without the pixels
            shutil.copy(tmp_path / "whole" / "images.seg", folder)
        rig.folder = folder
        with rig.resume() as session:
            rest = [identity(batch) for batch in run(Loop(session, f"client{cut}"), status=status)]
            told = [x for x in scan(folder / JOURNAL).records() if isinstance(x, r.Told)]
            assert len({x.header.batch_id for x in told}) == len(told)  # each once
            assert sorted({x.header.batch_id for x in told}) == sorted(made)
            by_name = {batch[0]: batch for batch in whole}
            assert all(batch == by_name[batch[0]] for batch in rest)
            assert {name: stream.source.digest() for name, stream in session.known.streams.items()} == digests
        shutil.rmtree(folder)


def test_another_session_is_not_resumed(tmp_path: Path):
    rig = Rig(tmp_path, one_evolution, settings("evo"), pictures(1))
    with rig.create() as session:
        run(Loop(session), batches=2)
    for change, text in (
        ({"settings": settings("evo", repeats=2)}, "configuration has changed: settings.repeats was 1 and is now 2"),
        ({"make": lambda: {"evo": evolution(seed=1)}}, r"source of stream 'evo' is another: optimiser.seed was 0"),
        ({"references": pictures(1, 5)}, "reference images are not those"),
    ):
        other = Rig(tmp_path, one_evolution, settings("evo"), pictures(1))
        vars(other).update(change)
        with pytest.raises(ResumeError, match=text):
            other.resume()
    with pytest.raises(FileExistsError, match="resume that session"):
        rig.create()
    with rig.resume(), pytest.raises(JournalError, match="in use"):
        rig.resume()


def test_a_source_that_comes_out_differently_is_noticed(tmp_path: Path):
    rig = Rig(tmp_path, one_evolution, settings("evo"))
    with rig.create() as session:
        run(Loop(session), batches=2)

    class Other(EvolutionSource):
        def learn(self, scores: Any, responses: Any) -> None:
            super().learn(scores + 1, responses * 2)

        def digest(self) -> str:
            return super().digest()[::-1]

    def others() -> dict[str, Any]:
        source = evolution()
        return {"evo": Other(source.optimiser, source.generator, generations=4)}

    with pytest.raises(ResumeError, match="after batch 'evo-0000', the source of stream 'evo' should have the digest"):
        Rig(tmp_path, others, settings("evo")).resume()


def test_a_source_that_fails_stops_the_asking_not_the_recording(tmp_path: Path):
    class Failing(FixedImages):
        def learn(self, scores: Any, responses: Any) -> None:
            raise MemoryError("the GPU is full")

    rig = Rig(tmp_path, lambda: {"set": Failing(pictures(4), per_batch=2)}, settings("set"))
    with rig.create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        loop.tell(batch, [1.0, 2.0])
        with pytest.raises(RequestError, match="FAULT: stream 'set': MemoryError: the GPU is full"):
            loop.ask()
        assert session.state == "fault"
        loop.control(m.Note, "this is still recorded")
    rig.make = lambda: {"set": FixedImages(pictures(4), per_batch=2)}
    with rig.resume() as session:  # mended, it goes on
        assert len(run(Loop(session))) == 1


def test_a_full_disk_acknowledges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rig = Rig(tmp_path, one_evolution, settings("evo"))
    with rig.create() as session:
        loop = Loop(session)
        batch, images = loop.ask()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("cortexloop.realtime.journal.sync_file", full)
            with pytest.raises(RequestError, match=r"FAULT: .*no space left"):
                loop.tell(batch, responses(images))
        for _ in range(2):
            with pytest.raises(RequestError, match="FAULT"):
                loop.tell(batch, responses(images))
            with pytest.raises(RequestError, match="FAULT"):
                loop.ask()
        assert session.status().state == "fault"
    with rig.resume() as session:
        assert session.status().told == 0
        assert len(run(Loop(session))) == 4


def test_parts_that_do_not_belong_together(tmp_path: Path):
    chosen = settings("evo", "set")
    with pytest.raises(ValueError, match="one source for each stream, 'evo', 'set', got sources for 'evo'"):
        Session.create(tmp_path, chosen, one_evolution())
    with pytest.raises(ValueError, match="images of one size"):
        Session.create(
            tmp_path, chosen, {"evo": evolution(), "set": FixedImages(np.zeros((2, 4, 4, 3), np.uint8), per_batch=1)}
        )
    with pytest.raises(ValueError, match=r"references should be uint8 \[R, 12, 12, 3\]"):
        Session.create(tmp_path, settings("evo"), one_evolution(), np.zeros((2, 4, 4, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
