"""Counting: every spike once, nothing before the data has come, nothing from a gap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexloop.rig.counting import SequenceCheck, SpikeCounter

MS = 1_000_000


def counter(**options):
    return SpikeCounter(["a", "b"], **{"window_ms": (50, 200), "kind": "count", **options})


def test_a_window_holds_its_beginning_and_not_its_end():
    c = counter()
    c.spikes("a", np.array([49, 50, 199, 200]) * MS)
    c.spikes("b", [50 * MS - 1, 200 * MS - 1])
    c.presented("p", "i", 0)
    c.passed(230 * MS)
    found = c.ready()
    assert found.responses.tolist() == [[2.0, 1.0]]
    assert found.status == ["ok"]
    assert [p.pres_id for p in found.presentations] == ["p"]


def test_nothing_is_counted_before_data_has_passed_the_guard():
    c = counter(guard_ms=30)
    c.presented("p", "i", 0)
    c.passed(230 * MS - 1)
    assert len(c.ready()) == 0
    c.spikes("a", [200 * MS - 1])  # comes late, within the guard
    c.passed(230 * MS)
    assert c.ready().responses[0, 0] == 1
    assert len(c.ready()) == 0
    assert c.late == 0
    c.spikes("a", [199 * MS])
    assert c.late == 1


def test_rates_and_baseline():
    c = counter(kind="rate", window_ms=(0, 100), baseline_ms=(-50, 0))
    c.spikes("a", np.array([-10, 10, 20, 30]) * MS + 1000 * MS)
    c.presented("p", "i", 1000 * MS)
    c.passed(2000 * MS)
    assert c.ready().responses.tolist() == [[30.0 - 20.0, 0.0]]


@pytest.mark.parametrize("gap", [(199, 300), (-100, 51), (100, 101)])
def test_a_gap_that_touches_the_window(gap):
    c = counter()
    c.presented("p", "i", 0)
    c.presented("far", "i", 1000 * MS)
    c.gap(*(t * MS for t in gap))
    c.passed(2000 * MS)
    found = c.ready()
    assert found.status == ["gap", "ok"]
    assert np.isnan(found.responses[0]).all()
    assert found.responses[1].tolist() == [0, 0]


def test_gaps_beside_the_window_do_not_matter():
    c = counter()
    c.presented("p", "i", 0)
    c.gap(0, 50 * MS)
    c.gap(200 * MS, 300 * MS)
    c.passed(400 * MS)
    assert c.ready().status == ["ok"]


def test_an_onset_that_becomes_known_too_late_is_no_zero():
    """Its spikes were dropped long ago."""
    c = counter(keep_s=1)
    c.spikes("a", [60 * MS])
    c.passed(5000 * MS)
    c.ready()
    c.presented("p", "i", 0)
    assert c.ready().status == ["gap"]


def test_what_waits_keeps_its_spikes():
    c = counter(keep_s=0.1)
    c.presented("p", "i", 10_000 * MS)
    c.spikes("a", [10_060 * MS])
    for t in range(9_000, 10_230, 10):
        c.passed(t * MS)
        assert len(c.ready()) == 0
    c.passed(10_230 * MS)
    assert c.ready().responses[0, 0] == 1


def test_a_restart_loses_what_waits():
    c = counter()
    c.presented("p", "i", 10_000 * MS)
    c.spikes("a", [10_060 * MS])
    assert [p.pres_id for p in c.restart()] == ["p"]
    assert c.waiting == 0
    c.presented("q", "i", 0)
    c.passed(230 * MS)
    assert c.ready().responses.tolist() == [[0, 0]]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_order_of_arrival_gives_the_same_counts(data):
    """Spikes, onsets and progress as they may come, against a plain count over everything."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    onsets = np.cumsum(rng.integers(20, 400, 12)) * MS
    spikes = {u: np.sort(rng.integers(0, onsets[-1] + 500 * MS, 80)) for u in "ab"}
    c = counter(guard_ms=30)
    # everything is known within 30 ms of when it happened
    events = [(t + rng.integers(0, 30) * MS, "spike", u, t) for u in "ab" for t in spikes[u]]
    events += [(t + rng.integers(0, 200) * MS, "onset", f"p{k}", t) for k, t in enumerate(onsets)]
    events += [(t, "passed", "", t) for t in range(0, int(onsets[-1]) + 600 * MS, 7 * MS)]
    found = {}
    for _, kind, name, t in sorted(events, key=lambda e: e[0]):
        if kind == "spike":
            c.spikes(name, [t])
        elif kind == "onset":
            c.presented(name, "i", int(t))
        else:
            c.passed(t)
            counted = c.ready()
            found |= {p.pres_id: row.tolist() for p, row in zip(counted.presentations, counted.responses, strict=True)}
    expected = {
        f"p{k}": [float(((spikes[u] >= t + 50 * MS) & (spikes[u] < t + 200 * MS)).sum()) for u in "ab"]
        for k, t in enumerate(onsets)
    }
    assert found == expected
    assert c.late == 0


def test_a_tell_says_what_was_counted():
    c = counter()
    c.presented("b1.0", "i0", 0)
    c.presented("b1.1", "i1", 1000 * MS)
    c.spikes("a", [60 * MS])
    c.gap(1100 * MS, 1101 * MS)
    c.passed(2000 * MS)
    counted = c.ready()
    tell, buffer = counted.tell("t1", "b1", final=True)
    assert tell.pres_ids == ["b1.0", "b1.1"]
    assert tell.item_ids == ["i0", "i1"]
    assert tell.status == ["ok", "gap"]
    assert (tell.kind, tell.window_ms, tell.final) == ("count", (50.0, 200.0), True)
    values = np.frombuffer(buffer, "<f4").reshape(2, 2)
    assert values[0].tolist() == [1, 0]
    assert np.isnan(values[1]).all()
    assert counted.only(["b1.1"]).status == ["gap"]


def test_other_units_are_dropped_and_seen():
    c = counter()
    c.spikes("z", [1, 2, 3])
    assert c.others == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window_ms": (200, 50)}, "window_ms should be"),
        ({"window_ms": (0, math.inf)}, "window_ms should be"),
        ({"baseline_ms": (-50, 0)}, "a baseline is subtracted from rates"),
        ({"kind": "score"}, "kind should be"),
        ({"keep_s": 0}, "keep_s"),
        ({"guard_ms": -1}, "guard_ms"),
    ],
)
def test_bad_settings(options, text):
    with pytest.raises(ValueError, match=text):
        counter(**options)


def test_bad_units_and_times():
    with pytest.raises(ValueError, match="none twice"):
        SpikeCounter(["a", "a"])
    with pytest.raises(TypeError, match="integers"):
        counter().spikes("a", [0.5])
    with pytest.raises(ValueError, match="end after it begins"):
        counter().gap(2, 1)


def test_sequence():
    check = SequenceCheck()
    assert [check.missing(n) for n in (5, 6, 9, 10, 0, 1)] == [0, 0, 2, 0, -1, 0]
    assert (check.lost, check.restarts) == (2, 1)
