"""What may go wrong around a session, one fault at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sessions import Rig, evolution, pictures, responses, run, sets, settings

from cortexloop.realtime import SessionSettings
from cortexloop.realtime import messages as m
from cortexloop.realtime.source import Proposal
from cortexloop.realtime.sources import FixedImages
from cortexloop.realtime.state import FILLERS_KEPT
from cortexloop.rig.inprocess import Loop, RequestError


def one_evolution() -> dict[str, Any]:
    return {"evo": evolution()}


def test_an_abort_that_comes_while_the_source_learns_is_late(tmp_path: Path):
    """Or the scores that the source had would not follow from the journal, which could not be resumed."""
    rig = Rig(tmp_path, one_evolution, settings("evo"))
    with rig.create() as session:
        loop = Loop(session)
        batch, images = loop.ask()
        loop.tell(batch, responses(images))  # the job is done from here on, and not collected
        ack = loop.shown([m.Event(pres_id=batch.pres_ids[0], outcome="abort")])
        assert (ack.accepted, [x.why for x in ack.ignored]) == (0, ["late"])
        assert loop.ask()[0].batch_id == "evo-0001"
        digest = session.known.streams["evo"].source.digest()
    with rig.resume() as session:
        assert session.known.streams["evo"].source.digest() == digest
        assert len(run(Loop(session))) == 3


def test_a_second_round_that_lacks_responses_does_not_hold_up_the_first(tmp_path: Path):
    with Rig(tmp_path, sets, settings("set", max_reshow=0, min_fraction=1.0)).create() as session:
        loop = Loop(session)
        first, _ = loop.ask()
        second, _ = loop.ask(after=first.batch_id)
        loop.tell(second, [np.nan, np.nan], status=["missing"] * 2)
        assert session.state == "running"
        assert loop.ask()[0].batch_id == first.batch_id
        loop.tell(first, [1.0, 2.0])
        session.poll()
        assert session.known.streams["set"].stalled
        loop.control(m.Resume)
        assert loop.ask(after="set-0002")[0].batch_id == "set-0001-r1"
        assert len(run(loop)) == 2
        assert session.state == "finished"


def test_status_tells_of_a_stalled_stream_among_others(tmp_path: Path):
    rig = Rig(tmp_path, lambda: {"evo": evolution(), **sets()}, settings("evo", "set", max_reshow=0))
    with rig.create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        loop.tell(batch, [np.nan] * 6, status=["missing"] * 6)
        status = session.status()
        assert status.state == "running"
        assert "too few responses came for stream 'evo'" in status.text


def test_an_id_that_is_used_for_something_else_is_refused(tmp_path: Path):
    """Not acknowledged as a duplicate: its responses would be lost."""
    rig = Rig(tmp_path, one_evolution, settings("evo"))

    def tell(images: Any, first: int, scale: float) -> tuple[m.Tell, bytes]:
        names = [f"evo-0000-{k:03d}" for k in range(first, first + 3)]
        values = scale * responses(images)[first : first + 3]
        return m.Tell(id="7", batch_id="evo-0000", item_ids=names, units=["u", "v"], dtype="float64"), values.tobytes()

    with rig.create() as session:
        loop = Loop(session)
        _, images = loop.ask()
        assert isinstance(loop.request(*tell(images, 0, 1.0)).message, m.Ack)
    with rig.resume() as session:
        loop = Loop(session)
        again = loop.request(*tell(images, 0, 1.0)).message
        assert isinstance(again, m.Ack)
        assert again.dup
        for other in (tell(images, 3, 1.0), tell(images, 0, 2.0), (m.Note(id="7", text="a remark"), None)):
            reply = loop.request(*other).message
            assert isinstance(reply, m.Error)
            assert reply.code == "BAD_MESSAGE"
            assert "'7' was used for another request" in reply.text


def test_fillers_take_no_memory_for_good(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo"), pictures(2)).create() as session:
        loop = Loop(session)
        after = loop.ask()[0].batch_id
        fillers = []
        for _ in range(FILLERS_KEPT + 2):
            fillers.append(loop.ask(after=after, within_ms=0)[0])
            after = fillers[-1].batch_id
        assert len(session._images) == 1
        assert {x.why for x in loop.tell(fillers[0], [1.0, 2.0]).ignored} == {"late"}
        assert loop.tell(fillers[-1], [1.0, 2.0]).accepted == 2


def test_a_waiting_ask_hears_of_every_change(tmp_path: Path):
    """Not only of what the sources do, and not first at its deadline."""
    with Rig(tmp_path, sets, settings("set", max_reshow=1)).create() as session:
        loop = Loop(session)
        first, _ = loop.ask()
        second, _ = loop.ask(after=first.batch_id)
        ask = m.Ask(id="waits", after=second.batch_id)
        assert session.handle("display", ask) is None
        assert session.next_wake_ns() != session.now_ns()
        loop.tell(first, [1.0, np.nan], status=["ok", "missing"])
        assert session.next_wake_ns() == session.now_ns()
        [(client, (repair, _))] = session.poll()
        assert isinstance(repair, m.Batch)
        assert (client, repair.id, repair.batch_id) == ("display", "waits", "set-0000-r1")
        ask = m.Ask(id="waits too", after=repair.batch_id)
        assert session.handle("display", ask) is None
        loop.control(m.Pause)
        assert session.next_wake_ns() == session.now_ns()
        [(_, (refusal, _))] = session.poll()
        assert isinstance(refusal, m.Error)
        assert refusal.code == "PAUSED"


def test_an_ask_waits_on_while_the_same_client_is_answered_another(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo")).create() as session:
        loop = Loop(session)
        batch, images = loop.ask()
        assert session.handle("display", m.Ask(id="1", after=batch.batch_id)) is None
        assert session.handle("display", m.Ask(id="2")) is not None
        loop.tell(batch, responses(images))
        [(client, (reply, _))] = session.poll()
        assert (client, reply.id) == ("display", "1")


def test_the_id_of_an_ask_used_again_is_another_question(tmp_path: Path):
    with Rig(tmp_path, one_evolution, settings("evo")).create() as session:
        loop = Loop(session)
        batch, images = loop.ask()
        loop.request(m.Ask(id="1"))
        loop.tell(batch, responses(images))
        loop.ask()
        reply = loop.request(m.Ask(id="1", after=batch.batch_id)).message
        assert isinstance(reply, m.Batch)
        assert reply.batch_id == "evo-0001"


@pytest.mark.parametrize("value", [1e308, -1e300])
def test_responses_whose_mean_would_overflow(tmp_path: Path, value: float):
    """A source would be told infinity, now and at each resumption."""
    with Rig(tmp_path, one_evolution, settings("evo")).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        with pytest.raises(RequestError, match="NAN"):
            loop.tell(batch, np.full((6, 2), value))
        assert session.status().told == 0


def test_times_beyond_all_clocks(tmp_path: Path):
    chosen = settings("evo", clock_units={"display": 1e9})
    with Rig(tmp_path, one_evolution, chosen).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        exchange = (0, 0, 0, 1000)
        loop.request(m.ClockReport(id="c", clock="display", exchanges=[exchange]))
        for t_on in (1e300, 1e11, 2**62):
            with pytest.raises(RequestError, match="finite number below"):
                loop.shown([m.Event(pres_id=batch.pres_ids[0], t_on=t_on, clock="display")])


def test_a_decision_that_cannot_be_recorded_is_a_fault(tmp_path: Path):
    class Deciding(FixedImages):
        def propose(self, decision: Any = None) -> Any:
            found = super().propose()
            assert found is not None
            return type(found)(found.count, found.render, decision=object())

    with Rig(tmp_path, lambda: {"set": Deciding(pictures(4), per_batch=2)}, settings("set")).create() as session:
        session.poll()
        assert session.state == "fault"
        assert "TypeError: settings and decisions should be" in session.status().text


def test_units_are_those_of_responses_that_count(tmp_path: Path):
    with Rig(tmp_path, sets, settings("set")).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        loop.shown([m.Event(pres_id=pres, outcome="abort") for pres in batch.pres_ids])
        loop.tell(batch, [1.0, 2.0], units=["wrong"])
        repair, _ = loop.ask(after="set-0001")
        assert loop.tell(repair, [1.0, 2.0], units=["right"]).accepted == 2


def test_clients_that_come_under_ever_new_names_are_forgotten(tmp_path: Path):
    rig = Rig(tmp_path, one_evolution, settings("evo"))
    with rig.create() as session:
        for k in range(300):
            session.handle(f"client{k}", m.Hello(id=f"h{k}", client=f"client{k}"))
            rig.clock.advance(1.0)
            session.poll()
        assert len(session.clients) <= 110


def test_names_end_where_they_end():
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"type": "resume", "id": "7\n"}, m.Resume)
    with pytest.raises(msgspec.ValidationError, match="stale_after_s"):
        msgspec.convert({"session": "a", "streams": [{"name": "x"}], "stale_after_s": float("inf")}, SessionSettings)


def test_images_that_cannot_be_rendered_again_are_a_fault_of_their_stream(tmp_path: Path):
    """And what was told is acknowledged."""

    class Once(FixedImages):
        rendered = False

        def propose(self, decision: Any = None) -> Any:
            found = super().propose()
            assert found is not None
            if not self.rendered:
                self.rendered = True
                return found

            def render() -> Any:
                raise OSError("no such file: \udcff.png")

            return type(found)(found.count, render)

    made = Once(pictures(4), per_batch=2)
    made.max_open = 1
    with Rig(tmp_path, lambda: {"set": made}, settings("set")).create() as session:
        loop = Loop(session)
        batch, _ = loop.ask()
        assert loop.tell(batch, [1.0, 2.0]).accepted == 2
        with pytest.raises(RequestError, match=r"FAULT: stream 'set': OSError: no such file: \\udcff.png"):
            loop.ask()
        assert msgspec.json.encode(session.status())


def test_a_proposal_without_images_is_a_fault(tmp_path: Path):
    class Empty(FixedImages):
        def propose(self, decision: Any = None) -> Any:
            return Proposal(count=0, render=lambda: pictures(0))

    with Rig(tmp_path, lambda: {"set": Empty(pictures(4), per_batch=2)}, settings("set")).create() as session:
        session.poll()
        assert "at least one image, or None when there are no more" in session.status().text
