"""The simulated rig: its parts against what they are said to do, and whole days in which nothing may get lost."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import Future

import msgspec
import numpy as np
import pytest

from cortexloop.bank import ModelBank
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.jobs import Immediately
from cortexloop.realtime.messages import Heartbeat
from cortexloop.realtime.session import Session
from cortexloop.realtime.settings import SessionSettings
from cortexloop.realtime.sources.fixed import FixedImages
from cortexloop.rig.counting import SpikeCounter
from cortexloop.rig.open_ephys import Receiver
from cortexloop.rig.server import Server
from cortexloop.rig.simulated import DAYS, Day, Neurons, example, simulate, textbook_neurons
from cortexloop.rig.simulated.hardware import SAMPLE_RATE, Acquisition, Display
from cortexloop.rig.simulated.report import check_journal
from cortexloop.rig.simulated.rig import CLOCK_UNITS, SimulatedRig
from cortexloop.rig.simulated.world import NetworkLine, RealWorld, RigClock, SlowExecutor
from cortexloop.textbook import procedural_images
from cortexloop.textbook import textbook_neurons as models

MS, SECOND = 1_000_000, 1_000_000_000

QUICK = dataclasses.replace(DAYS["good"], on_ms=50.0, off_ms=50.0, pause_ms=100.0)
WORSE = dataclasses.replace(
    DAYS["bad"],
    on_ms=50.0,
    off_ms=50.0,
    pause_ms=200.0,
    breaks=0.05,
    no_diode=0.1,
    lost_packets=0.002,
    lost_messages=0.05,
    server_crashes=0.01,
    repeated_messages=0.05,
    slow_every=2,
    clock_step_every=3,
    client_restart_every=3,
    acquisition_restart_every=4,
    silence_every=5,
)


@pytest.fixture(scope="module")
def bank():
    chosen = [model for model in models() if model.name in ("edge_0deg", "curve_up", "dot_small")]
    return ModelBank(chosen)


# ---------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("ppm", [0.0, 120.0, -40.0])
def test_a_clock_and_its_inverse(ppm):
    clock = RigClock(10**12, ppm)
    clock.step(5 * MS)
    for t in (10**12, 10**12 + 7, 10**12 + 3600 * SECOND):
        assert abs(clock.true_ns(clock.read_ns(t)) - t) <= 1
    assert clock.read_ns(10**12 + SECOND) == SECOND + round(ppm * 1000) + 5 * MS


def test_images_begin_at_frames_and_light_follows():
    display = Display(
        RigClock(0, 0.0), Day(refresh_hz=100, light_ms=5.0, light_jitter_ms=0.0), np.random.default_rng(0)
    )
    shown = display.plan(12 * MS + 1, 100.0)
    assert (shown.frame, shown.flip_s, shown.off_s) == (2, 0.02, 0.12)
    assert (shown.light_on_ns, shown.light_off_ns) == (25 * MS, 125 * MS)
    late = Display(RigClock(0, 0.0), Day(refresh_hz=100, missed_flips=1.0), np.random.default_rng(0))
    plans = [late.plan(10 * MS, 100.0) for _ in range(20)]
    assert {(p.missed, p.too_long) for p in plans} == {(1, False), (0, True)}


def test_all_spikes_arrive_and_none_twice():
    rng = np.random.default_rng(0)
    acquisition = Acquisition(SECOND, ["a", "b"], Day(acquisition_ppm=80.0), rng)
    counter = SpikeCounter(["a", "b"], window_ms=(0, 900), kind="count")
    receiver = Receiver(counter, SAMPLE_RATE)
    spikes = [np.sort(rng.integers(SECOND, 2 * SECOND, n)) for n in (40, 90)]
    acquisition.fire(spikes)
    counter.presented("p", "i", receiver.ns(0))
    t = SECOND
    while t < 2 * SECOND:
        for message in acquisition.arrived(t):
            receiver.take(message)
        t = max(acquisition.next_ns(), t + 1)
    expected = [sum(acquisition.sample(s) < 0.9 * SAMPLE_RATE for s in train.tolist()) for train in spikes]
    assert counter.ready().responses.tolist() == [expected]
    assert counter.late == 0
    assert receiver.sequence.lost == 0


def test_lost_messages_are_noticed():
    rng = np.random.default_rng(1)
    acquisition = Acquisition(0, ["a"], Day(lost_packets=0.2), rng)
    receiver = Receiver(SpikeCounter(["a"]), SAMPLE_RATE)
    acquisition.fire([np.arange(0, SECOND, 10 * MS)])
    for message in acquisition.arrived(3 * SECOND):
        receiver.take(message)
    assert acquisition.lost > 10
    assert 0 <= acquisition.lost - receiver.sequence.lost <= 3  # the last ones cannot be missed yet


def test_neurons_fire_as_often_and_as_late_as_they_should(bank):
    neurons = Neurons(bank)
    rng = np.random.default_rng(0)
    drive = np.array([20.0, 60.0, 0.0])
    counts, first = np.zeros(3), np.full(3, 1 << 62)
    n = 400
    for k in range(n):
        neurons._fatigue[:] = 0
        for unit, train in enumerate(neurons.evoke(drive, k * SECOND, k * SECOND + 100 * MS, rng)):
            counts[unit] += len(train)
            first[unit] = min(first[unit], *(train - k * SECOND).tolist()) if len(train) else first[unit]
    steps = np.arange(0.5, 100.0)
    course = (0.5 + 0.5 * np.exp(-steps / neurons.decay_ms)).sum() / 1e3
    expected = n * drive * course
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()
    assert (first[:2] >= neurons.latency_ns[:2]).all()
    idle = neurons.idle(0, 100 * SECOND, rng)
    assert all(abs(len(train) - 400) < 100 for train in idle)


def test_neurons_adapt_and_recover(bank):
    neurons, rng = Neurons(bank), np.random.default_rng(0)
    drive = np.full(3, 200.0)

    def total(t):
        return sum(len(train) for train in neurons.evoke(drive, t, t + 100 * MS, rng))

    fresh = [total(k * 100 * SECOND) for k in range(30)]
    tired = [total(10**13 + k * 120 * MS) for k in range(30)][10:]
    assert np.mean(tired) < 0.95 * np.mean(fresh)


def test_names_of_units(bank):
    assert Neurons(bank, names=["ch17"]).units == ["ch17", *bank.names[1:]]
    with pytest.raises(ValueError, match="too few"):
        Neurons(bank, names=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="different names"):
        Neurons(bank, names=[bank.names[2]])


def test_work_is_done_when_it_is_due():
    clock = ManualClock()
    executor = SlowExecutor(clock, lambda: 20.0)
    good: Future[int] = executor.submit(lambda: 7)
    bad: Future[int] = executor.submit(lambda: 1 // 0)
    executor.run()
    assert not good.done()
    assert executor.due_ns() == 20 * MS
    clock.advance(0.02)
    executor.run()
    assert good.result() == 7
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert executor.due_ns() is None


# ---------------------------------------------------------------------------------------------- days


def small(generations, seed=0):
    return example(generations=generations, population=10, references=3, seed=seed)


def learning(session):
    """The same, what its source will be told, and how to make it anew."""
    learned = []

    def noting(source):
        learned.clear()  # a new one is told everything again
        learn = source.learn

        def note(scores, responses):
            learned.append(scores)
            learn(scores, responses)

        source.learn = note
        return {"evolution": source}

    settings, sources, references = session
    origin = sources["evolution"]
    noting(origin)

    def again():
        generations, population, seed = origin.generations, origin.optimiser.population, origin.optimiser.seed
        fresh = example(generations=generations, population=population, references=0, seed=seed)[1]
        return noting(fresh["evolution"])

    return (settings, sources, references), learned, again


def assert_learned(learned, found):
    """The source learned what the rig counted."""
    assert len(learned) == len(found.generations)
    for scores, row in zip(learned, found.generations, strict=True):
        assert np.isfinite(scores).sum() == row.images
        assert np.nanmean(scores) == pytest.approx(row.mean, rel=1e-6)
        assert np.nanmax(scores) == pytest.approx(row.best, rel=1e-6)


def resumed(folder, session):
    """The session again, from its journal: every digest of its sources is compared on the way."""
    settings, sources, references = session
    settings = msgspec.structs.replace(settings, clock_units=dict(CLOCK_UNITS))
    with Session.resume(
        folder, settings, sources, references, clock=ManualClock(10**13), executor=Immediately()
    ) as again:
        return again.status()


def test_a_good_day(tmp_path, bank):
    rows = []
    neurons = Neurons(bank)
    session, learned, _ = learning(small(3))
    found = simulate(tmp_path / "s", *session, neurons, QUICK, seed=1, on_generation=rows.append)
    assert found.ok
    assert_learned(learned, found)
    assert (found.lost, found.wrong, found.unsure, found.packets_lost, found.resent) == (0, 0, 0, 0, 0)
    assert [(row.stream, row.generation, row.images) for row in rows] == [("evolution", g, 10) for g in range(3)]
    assert rows == found.generations
    assert found.status.state == "finished"
    assert found.status.deadline_misses == 0
    assert found.status.clock_uncertainty_us < 2_000
    assert found.presentations["ok"] == found.responses["ok"] == found.status.told
    _, worst = found.onset_error_ms["photodiode"]
    assert abs(worst) < 1.0
    assert resumed(tmp_path / "s", small(3)).told == found.status.told
    again = simulate(tmp_path / "again", *small(3), Neurons(bank), QUICK, seed=1)
    assert again.generations == found.generations
    assert again.presentations == found.presentations


@pytest.mark.parametrize("seed", [0, 1])
def test_a_bad_day_loses_nothing(tmp_path, bank, seed):
    session, learned, again = learning(small(6))
    found = simulate(tmp_path / "s", *session, Neurons(bank), WORSE, seed=seed, sources_again=again)
    assert_learned(learned, found)
    assert found.lost == 0
    assert found.wrong == 0
    assert found.onsets_beyond == 0
    assert found.status.state == "finished"
    assert found.status.streams[0].generation == 6
    # everything did happen
    for happened in (
        "server_crashes",
        "resent",
        "repeated",
        "client_restarts",
        "acquisition_restarts",
        "clock_steps",
        "silences",
    ):
        assert getattr(found, happened) > 0, happened
    assert found.packets_lost > 0
    assert found.responses["gap"] > 0
    assert found.status.deadline_misses > 0
    assert found.status.reshown > 0
    assert found.presentations["no_fix"] > 0
    assert found.steps_found >= found.clock_steps - 1
    _, worst = found.onset_error_ms["photodiode"]
    assert abs(worst) < 2.0
    assert resumed(tmp_path / "s", small(6)).told == found.status.told


def test_what_is_told_is_what_the_neurons_prefer(tmp_path, bank):
    """Known order: mean responses over repeats rank images as the models do."""
    images = procedural_images(16, seed=3)
    neurons = Neurons(bank)
    truth = neurons.drive(images)[:, 1]
    source = FixedImages(images, per_batch=16, rounds=1, shuffle=False)
    stream = {"name": "fixed", "units": [neurons.units[1]]}
    settings = msgspec.convert({"session": "s", "repeats": 8, "streams": [stream]}, SessionSettings)
    learned = []
    source.learn = lambda scores, responses: learned.append(scores)
    day = dataclasses.replace(QUICK, off_ms=100.0, on_ms=100.0, gain_drift=0.0)
    found = simulate(tmp_path / "s", settings, {"fixed": source}, None, neurons, day, seed=0)
    assert found.ok
    assert np.corrcoef(learned[0], truth)[0, 1] > 0.95


def test_two_streams_hide_each_others_work(tmp_path, bank):
    """With 400 ms of work per generation, one stream alone misses its deadlines, two in turn do not until the end."""
    day = dataclasses.replace(QUICK, compute_ms=400.0, breaks=0.0)
    settings, sources, references = small(3)
    alone = simulate(tmp_path / "one", settings, sources, references, Neurons(bank), day)
    assert alone.ok
    assert alone.status.deadline_misses == 3
    assert alone.batches["filler"] == 3
    streams = [{"name": name, "units": [unit]} for name, unit in (("a", "curve_up"), ("b", "dot_small"))]
    settings = msgspec.convert({"session": "two", "streams": streams}, SessionSettings)
    sources = {name: small(3, seed)[1]["evolution"] for seed, name in enumerate("ab")}
    found = simulate(tmp_path / "two", settings, sources, references, Neurons(bank), day)
    assert found.ok
    assert found.status.deadline_misses <= 1
    assert {(row.stream, row.generation) for row in found.generations} == {(s, g) for s in "ab" for g in range(3)}


def test_units_that_nobody_records(tmp_path):
    settings, sources, references = example("ch17", generations=1, population=4, references=1)
    with pytest.raises(ValueError, match=r"streams are scored by \['ch17'\]"):
        simulate(tmp_path / "s", settings, sources, references, textbook_neurons(), DAYS["good"])


@pytest.mark.parametrize("over", ["zmq", "tcp"])
def test_over_a_network_in_real_time(tmp_path, bank, over):
    settings, sources, references = example(generations=2, population=4, references=1)
    settings = msgspec.structs.replace(settings, clock_units=dict(CLOCK_UNITS), within_ms=10_000.0)
    day = dataclasses.replace(QUICK, on_ms=10.0, off_ms=5.0, pause_ms=5.0, missed_flips=0.1, breaks=0.05)
    with Session.create(tmp_path / "s", settings, sources, references) as session:
        server = Server(session, **{over: {"zmq": "tcp://127.0.0.1:*", "tcp": "127.0.0.1:0"}[over]})
        thread = threading.Thread(target=server.run)
        thread.start()
        address = server.zmq_address if over == "zmq" else f"tcp-raw://{server.tcp_address}"
        line = NetworkLine(address)
        try:
            rig = SimulatedRig(line, RealWorld(), Neurons(bank), day, seed=2)
            found = rig.run()
        finally:
            line.close()
            server.stop()
            thread.join()
    assert found.wrong == 0
    assert found.status.state == "finished"
    check_journal(found, tmp_path / "s", rig.acknowledged, rig.light_ns, (day.light_ms, day.light_jitter_ms))
    assert found.lost == 0
    assert found.onsets_beyond == 0
    assert set(found.onset_error_ms) == {"photodiode"}
    assert len(rig.acknowledged) == found.status.told


def test_a_line_that_is_not_connected():
    with pytest.raises(RuntimeError, match="connect first"):
        NetworkLine("tcp://127.0.0.1:1").request(Heartbeat(id="a"))
