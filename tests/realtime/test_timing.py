"""Clock mappings against simulated clocks whose truth is known; onsets; the watermark."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexloop.realtime.messages import Event
from cortexloop.realtime.timing import (
    ClockEstimator,
    MonotonicCheck,
    Watermark,
    bursts_needed,
    exchange_of_pair,
    in_ns,
    latest_uncertainty_ns,
    onset,
)

SECOND = 1_000_000_000
MS = 1_000_000


class TrueClock:
    """A client's clock: client = (server - zero) * (1 + ppm) + steps so far. Server time is the truth."""

    def __init__(self, zero: int = 10**17, ppm: float = 0.0) -> None:
        self.zero, self.ppm, self.steps = zero, ppm, 0

    def __call__(self, server: int) -> int:
        since = server - self.zero
        return since + round(since * self.ppm * 1e-6) + self.steps


def burst(clock, server, rng, *, n=8, delay=lambda rng: 100_000, back=None):
    """n exchanges that begin at server time `server`; `delay` and `back` draw the way there and back, in ns."""
    exchanges = []
    for _ in range(n):
        t2 = server + int(delay(rng))
        t3 = t2 + 20_000
        arrived = t3 + int((back or delay)(rng))
        exchanges.append((clock(server), t2, t3, clock(arrived)))
        server = arrived + 300_000
    return exchanges


def heavy(rng):
    """50 us, and a tail that goes to many ms."""
    return 50_000 + 30_000 * rng.pareto(1.2)


def run(clock, seconds, rng, estimator=None, start=10**17, every=5, **ways):
    estimator = estimator or ClockEstimator("ptb")
    for k in range(0, seconds, every):
        estimator.add(burst(clock, start + k * SECOND, rng, **ways))
    return estimator


# ---------------------------------------------------------------------------------------------- estimation


def test_one_exchange_is_the_ntp_formula():
    """offset = ((t2 - t1) + (t3 - t4)) / 2 and half the round trip, in numbers."""
    fit = ClockEstimator("a").add([(1000, 500_000_300, 500_000_400, 1500)])
    assert fit.to_server_ns(1250) == 500_000_350
    assert fit.uncertainty_ns == (500 - 100) / 2
    assert fit.bursts == 1
    assert fit.drift_ppm == 0.0
    assert fit.step is None


def test_the_exchange_with_the_shortest_round_trip_counts():
    good, bad = (1000, 11_100, 11_200, 1300), (5000, 95_000, 95_100, 175_100)
    assert ClockEstimator("a").add([bad, good, bad]) == ClockEstimator("a").add([good])


@pytest.mark.parametrize("ppm", [-50.0, 0.0, 50.0, 300.0])
def test_drift_is_found(ppm):
    clock = TrueClock(ppm=ppm)
    estimator = run(clock, 120, np.random.default_rng(0), delay=lambda rng: 80_000 + rng.exponential(20_000))
    fit = estimator.mapping
    assert -fit.drift_ppm == pytest.approx(ppm, abs=1.0)
    # 300 ppm of an unknown rate are 1.5 ms in 5 s: a correction that is told
    assert [step.kind for step in estimator.steps] == (["back"] if ppm == 300 else [])
    for seconds in (0, 33, 118):
        truth = 10**17 + seconds * SECOND
        mapped, uncertainty = estimator.to_server_ns(clock(truth))
        assert abs(mapped - truth) <= min(uncertainty, 100_000)


def test_uncertainty_grows_without_exchanges():
    clock = TrueClock(ppm=50)
    estimator = run(clock, 60, np.random.default_rng(1))
    soon, late = (estimator.mapping.uncertainty_at(clock(10**17 + s * SECOND)) for s in (60, 3600))
    assert soon < late
    truth = 10**17 + 3600 * SECOND
    assert abs(estimator.mapping.to_server_ns(clock(truth)) - truth) <= late


@given(
    seed=st.integers(0, 2**32 - 1),
    ppm=st.floats(-200, 200),
    there=st.integers(20_000, 5 * MS),
    back=st.integers(20_000, 5 * MS),
)
@settings(max_examples=40, deadline=None)
def test_the_truth_is_within_the_uncertainty_with_unequal_ways_and_heavy_tails(seed, ppm, there, back):
    """No false step, and no time further off than said, however lopsided the network."""
    rng, clock = np.random.default_rng(seed), TrueClock(ppm=ppm)
    estimator = run(clock, 100, rng, delay=lambda r: there + heavy(r), back=lambda r: back + heavy(r))
    assert all(step.kind == "back" for step in estimator.steps)
    for server in rng.integers(10**17, 10**17 + 99 * SECOND, 20).tolist():
        mapped, uncertainty = estimator.to_server_ns(clock(server))
        assert abs(mapped - server) <= uncertainty + 10


def test_pairs_of_times_do_for_exchanges():
    """Flips, known to 0.3 ms, and the photodiode's samples for them."""
    rng, clock = np.random.default_rng(12), TrueClock(ppm=-35)
    estimator = ClockEstimator("ephys")
    for second in range(60):
        light = 10**17 + second * SECOND
        flip = light + int(rng.uniform(-0.3, 0.3) * MS)
        fit = estimator.add([exchange_of_pair(clock(light), flip, 300_000)])
    assert not estimator.steps
    assert -fit.drift_ppm == pytest.approx(-35, abs=10)
    assert 0.3 * MS <= fit.uncertainty_ns < 0.6 * MS
    assert abs(estimator.to_server_ns(clock(light))[0] - light) < 0.2 * MS


def test_far_zeros_lose_nothing():
    """Zeros 2^62 ns apart, where float64 resolves 1 us only."""
    clock = TrueClock(zero=2**62)
    estimator = run(clock, 30, np.random.default_rng(2), start=2**62 + 12345)
    truth = 2**62 + 20 * SECOND + 7
    assert abs(estimator.to_server_ns(clock(truth))[0] - truth) <= 2


def test_server_and_client_times_are_inverse():
    estimator = run(TrueClock(ppm=80), 60, np.random.default_rng(3))
    fit = estimator.mapping
    for t in (0, 10**9, 10**12):
        assert abs(fit.to_client_ns(fit.to_server_ns(t)) - t) <= 1


# ---------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("jump_ms", [-60_000.0, -40.0, -3.0, 3.0, 40.0, 60_000.0])
def test_a_step_begins_a_segment_and_old_times_keep_their_mapping(jump_ms):
    rng, clock = np.random.default_rng(4), TrueClock(ppm=30)
    estimator = run(clock, 100, rng, delay=heavy)
    old = [10**17 + s * SECOND for s in (1, 50, 90)]
    raw = [clock(t) for t in old]
    before = [estimator.to_server_ns(t, s + 10 * MS)[0] for t, s in zip(raw, old, strict=True)]
    clock.steps = round(jump_ms * MS)
    run(clock, 100, rng, estimator, start=10**17 + 100 * SECOND, delay=heavy)
    (step,) = estimator.steps
    assert step.kind == "jump"
    assert step.jump_ns == pytest.approx(-jump_ms * MS, abs=1 * MS, rel=1e-4)
    assert "ptb" in str(step)
    assert "ms" in str(step)
    assert [estimator.to_server_ns(t, s + 10 * MS)[0] for t, s in zip(raw, old, strict=True)] == before
    new = 10**17 + 150 * SECOND
    mapped, uncertainty = estimator.to_server_ns(clock(new), new + 10 * MS)
    assert abs(mapped - new) <= uncertainty < 1 * MS


def test_a_client_that_starts_anew_keeps_its_rate():
    rng, clock = np.random.default_rng(5), TrueClock(ppm=45)
    estimator = run(clock, 100, rng)
    clock.zero = 10**17 + 101 * SECOND
    fit = estimator.add(burst(clock, 10**17 + 102 * SECOND, rng))
    assert fit.step is not None
    assert fit.bursts == 1
    assert -fit.drift_ppm == pytest.approx(45, abs=1)


def test_between_the_bursts_around_a_step_nobody_knows():
    rng, clock = np.random.default_rng(6), TrueClock()
    estimator = run(clock, 50, rng)
    clock.steps = 30 * MS
    run(clock, 50, rng, estimator, start=10**17 + 50 * SECOND)
    between = 10**17 + 48 * SECOND
    mapped, uncertainty = estimator.to_server_ns(clock(between), between + 100 * MS)
    assert abs(mapped - between) <= uncertainty
    assert uncertainty > 29 * MS
    # 10 ms after it happened only one of the two is possible
    mapped, uncertainty = estimator.to_server_ns(clock(between), between + 10 * MS)
    assert abs(mapped - between) <= uncertainty < 1 * MS


def test_a_better_estimate_that_sets_time_back_is_told():
    """The first way was slow by 20 ms in one direction: within its uncertainty, so no jump; but time goes back."""
    clock, rng = TrueClock(), np.random.default_rng(7)
    estimator = ClockEstimator("ptb")
    estimator.add(burst(clock, 10**17, rng, back=lambda r: 100_000, delay=lambda r: 20 * MS))
    fit = estimator.add(burst(clock, 10**17 + 5 * SECOND, rng))
    assert fit.step is not None
    assert fit.step.kind == "back"
    assert fit.step.jump_ns < -1 * MS
    assert fit.bursts == 2
    assert "back" in str(fit.step)


def test_a_preview_says_what_add_will_and_changes_nothing():
    clock, rng = TrueClock(ppm=20), np.random.default_rng(8)
    estimator = ClockEstimator("a")
    for k in range(6):
        clock.steps = 40 * MS * (k >= 3)
        exchanges = burst(clock, 10**17 + k * 5 * SECOND, rng)
        previewed = estimator.preview(exchanges)
        assert estimator.preview(exchanges) == previewed
        assert estimator.add(exchanges) == previewed
    assert len(estimator.steps) == 1


def test_reports_that_come_twice_or_late_change_nothing():
    clock, rng = TrueClock(ppm=20), np.random.default_rng(8)
    bursts = [burst(clock, 10**17 + k * 5 * SECOND, rng) for k in range(10)]
    estimator, other = ClockEstimator("a"), ClockEstimator("a")
    for b in bursts:
        estimator.add(b)
    for k, b in enumerate(bursts):
        other.add(b)
        other.add(b)
        other.add(bursts[max(0, k - 2)])
    assert other.mapping == estimator.mapping
    assert not other.steps


@pytest.mark.parametrize("exchange", [(10, 5, 4, 20), (20, 5, 6, 10), (10, 0, 500, 20)])
def test_exchanges_out_of_order_are_refused(exchange):
    estimator = ClockEstimator("ptb")
    with pytest.raises(ValueError, match=r"clock 'ptb': an exchange is \(t1, t2, t3, t4\)"):
        estimator.add([exchange])
    assert estimator.mapping is None
    assert estimator.add([exchange, (10, 5, 6, 20)]).bursts == 1


def test_a_clock_without_exchanges_maps_nothing():
    with pytest.raises(ValueError, match="send a clock report first"):
        ClockEstimator("ptb").to_server_ns(0)
    assert latest_uncertainty_ns([ClockEstimator("ptb")], 0) is None


def test_latest_uncertainty_is_that_of_the_worst_clock():
    good = run(TrueClock(), 50, np.random.default_rng(9))
    bad = run(TrueClock(), 50, np.random.default_rng(9), delay=lambda rng: 5 * MS)
    now = 10**17 + 46 * SECOND
    assert latest_uncertainty_ns([good, bad], now) == latest_uncertainty_ns([bad], now) >= 5 * MS


def test_when_a_burst_is_due():
    assert bursts_needed(None, 0)
    assert bursts_needed(0, 5 * SECOND)
    assert not bursts_needed(0, 5 * SECOND - 1)


def test_mapped_time_that_goes_back():
    check = MonotonicCheck()
    assert [check.back_ns(t * MS) for t in (10, 12, 11, 13, 5, 6, 7)] == [0, 0, 0, 0, 8 * MS, 0, 0]


# ---------------------------------------------------------------------------------------------- onsets


@pytest.fixture
def clocks():
    rng = np.random.default_rng(10)
    return {name: run(TrueClock(10**17 - k * SECOND, 20 * k), 50, rng) for k, name in enumerate(["ptb", "ephys"])}


def event(**fields):
    return Event(pres_id="p", **fields)


NOW = 10**17 + 40 * SECOND
UNITS = {"ptb": 1e9, "ephys": 1e9 / 30_000}


def test_truth_order(clocks):
    sample = round((NOW + 3 * MS - clocks["ephys"].mapping.offset_ns) * 30_000 / 1e9)
    full = {"t_on": 40.0, "clock": "ptb", "diode": sample, "ttl": sample - 60, "acquisition": "ephys"}
    found = onset(event(**full), clocks, UNITS, NOW + 200 * MS)
    assert found.by == "photodiode"
    assert abs(found.t_ns - NOW - 3 * MS) < 2 * MS
    assert not found.problems
    found = onset(event(**{**full, "diode": None}), clocks, UNITS, NOW + 200 * MS)
    assert found.by == "ttl"
    assert abs(found.t_ns - NOW - 1 * MS) < 2 * MS
    found = onset(event(t_on=40.0, clock="ptb"), clocks, UNITS, NOW + 200 * MS)
    assert found.by == "flip"
    assert abs(found.t_ns - NOW) < MS
    assert 0 < found.uncertainty_ns < MS
    found = onset(event(), clocks, UNITS, NOW)
    assert (found.by, found.t_ns, found.uncertainty_ns) == ("received", NOW, math.inf)


def test_a_clock_without_a_report_is_passed_over_and_said(clocks):
    found = onset(event(diode=5, acquisition="blackrock", t_on=40.0, clock="ptb"), clocks, UNITS, NOW + MS)
    assert found.by == "flip"
    assert "blackrock" in found.problems[0]
    found = onset(event(t_on=40.0), clocks, UNITS, NOW)
    assert found.by == "received"
    assert "without a name" in found.problems[0]


def test_times_in_other_units_are_not_believed(clocks):
    """Seconds taken for nanoseconds; milliseconds taken for seconds."""
    clocks["ptb"] = run(TrueClock(10**17 - 7200 * SECOND), 50, np.random.default_rng(11))
    for value, units in ((7240.0, {}), (7_240_000.0, UNITS)):
        found = onset(event(t_on=value, clock="ptb"), clocks, units, NOW + MS)
        assert found.by == "received"
        assert "units" in found.problems[0]
    assert onset(event(t_on=7240.0, clock="ptb"), clocks, UNITS, NOW + MS).by == "flip"


def test_in_ns_keeps_integers_exact():
    assert in_ns(2**62 + 1, 1.0) == 2**62 + 1
    assert in_ns(30_000, 1e9 / 30_000) == SECOND
    assert in_ns(0.5, 1e9) == SECOND // 2
    with pytest.raises(ValueError, match="finite"):
        in_ns(math.inf, 1.0)


def test_watermark():
    mark = Watermark(guard_ms=30)
    assert not mark.complete(0, 200)
    mark.passed(229 * MS)
    assert not mark.complete(0, 200)
    mark.passed(230 * MS)
    mark.passed(100 * MS)
    assert mark.complete(0, 200)
    assert mark.passed_ns == 230 * MS
    assert mark.due_ns(MS, 200) == 231 * MS
    with pytest.raises(ValueError, match="guard_ms"):
        Watermark(-1)
