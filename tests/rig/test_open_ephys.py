"""Open Ephys' ZMQ Interface: its messages, and losses in their numbers."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexloop.rig.counting import SpikeCounter
from cortexloop.rig.open_ephys import (
    Other,
    Progress,
    Pulse,
    Receiver,
    Spike,
    StreamError,
    Subscriber,
    heartbeat,
    parse,
)

RATE = 30_000


def header(number, kind, **fields):
    part = "spike" if kind == "spike" else "content"
    return json.dumps({"message_num": number, "type": kind, part: fields, "data_size": 0, "timestamp": 17}).encode()


def data(number, sample, samples=300, rate=float(RATE)):
    content = {"stream": "s", "channel_num": 0, "num_samples": samples, "sample_num": sample, "sample_rate": rate}
    return [b"DATA\0", header(number, "data", **content), np.zeros(samples, "<f4").tobytes()]


def spike(number, sample, electrode="e1", sorted_id=0):
    fields = {"stream": "s", "source_node": 1, "electrode": electrode, "sample_num": sample, "num_channels": 1}
    rest = {"num_samples": 40, "sorted_id": sorted_id, "threshold": [1.0]}
    return [b"EVENT\0", header(number, "spike", **fields, **rest), bytes(160)]


def pulse(number, sample, line=3, state=1):
    content = {"stream": "s", "source_node": 1, "type": 3, "sample_num": sample}
    return [b"EVENT\0", header(number, "event", **content), bytes([line, state]) + bytes(8)]


def test_messages():
    assert parse(data(1, 600)) == Progress(1, "s", 0, 600, 300, 30_000.0)
    assert parse(spike(2, 700)) == Spike(2, "s", 700, "e1")
    assert parse(spike(3, 700, sorted_id=2)).unit == "e1:2"
    assert parse(pulse(4, 800)) == Pulse(4, "s", 800, 3, True)
    assert parse([b"EVENT", header(5, "event", stream="s", sample_num=1), b"a text"]) == Other(5)
    assert parse([b"PARAM", header(6, "parameter")]) == Other(6)


@pytest.mark.parametrize(
    ("frames", "text"),
    [
        ([b"DATA"], "2 or 3 frames"),
        ([b"DATA", b"{", b""], "JSON"),
        ([b"DATA", b"[1]", b""], "an object"),
        ([b"DATA", b"{}", b""], "message_num should be an integer"),
        ([b"DATA", header(1, "data", stream="s"), b""], "channel_num should be an integer"),
        ([b"DATA", b'{"message_num": 1, "type": "spike"}', b""], "lacks 'spike'"),
        ([b"DATA", header(1, "data", stream=3), b""], "stream should be a text"),
        ([b"DATA", b"[" * 70_000, b""], "at most 64000 bytes"),
        ([b"DATA", b"[" * 60_000, b""], "JSON"),
    ],
)
def test_other_messages_are_refused(frames, text):
    with pytest.raises(ValueError, match=text):
        parse(frames)


@given(st.lists(st.binary(max_size=200), max_size=4))
@settings(max_examples=200, deadline=None)
def test_garbage_raises_nothing_else(frames):
    with pytest.raises(ValueError):
        parse(frames)


def receiver(**options):
    return Receiver(SpikeCounter(["e1"], window_ms=(0, 100), kind="count", guard_ms=10), RATE, **options)


def stream(spikes, upto, *, buffer=300):
    """Messages of data and spikes (sample numbers), numbered from 1."""
    frames = []
    for begin in range(0, upto, buffer):
        frames.append(data(len(frames) + 1, begin, buffer))
        frames += [
            spike(len(frames) + 1 + k, s) for k, s in enumerate(x for x in spikes if begin <= x < begin + buffer)
        ]
    return frames


def test_counting_from_messages():
    r = receiver()
    r.counter.presented("p", "i", r.ns(3_000))
    for frames in stream([2_999, 3_000, 4_500, 5_999, 6_000], 9_000):
        r.take(frames)
    assert r.counter.ready().responses.tolist() == [[3.0]]
    assert r.sequence.lost == 0


def test_no_loss_goes_unnoticed():
    """Whichever message is lost: a number is right, or the presentation is said to lie in a gap."""
    spikes = list(range(100, 15_000, 170))
    messages = stream(spikes, 15_000)
    onsets = {f"p{k}": 3_000 * k for k in range(4)}
    truth = {p: sum(on <= s < on + 3_000 for s in spikes) for p, on in onsets.items()}
    gaps = 0
    for lost in range(1, len(messages) - 1):
        r = receiver()
        for name, sample in onsets.items():
            r.counter.presented(name, "i", r.ns(sample))
        for k, frames in enumerate(messages):
            if k != lost:
                r.take(frames)
        assert r.sequence.lost == 1
        found = r.counter.ready()
        for p, status, row in zip(found.presentations, found.status, found.responses, strict=True):
            assert status == "gap" or row[0] == truth[p.pres_id]
        gaps += found.status.count("gap")
        assert found.status.count("gap") <= 2
    assert gaps > len(messages) / 2


def test_pulses_and_restarts():
    pulses, lost = [], []
    r = receiver(on_pulse=lambda p, t: pulses.append((p.line, p.state, t)), on_restart=lost.extend)
    r.take(data(7, 0))
    r.take(pulse(8, 150))
    assert pulses == [(3, True, 5_000_000)]
    r.counter.presented("p", "i", 0)
    r.take(data(1, 0))
    assert [p.pres_id for p in lost] == ["p"]
    assert r.sequence.restarts == 1
    assert r.counter.watermark.passed_ns == 10_000_000


def test_another_sampling_rate_is_refused():
    with pytest.raises(StreamError, match=r"2500\.0 samples per second, expected 30000"):
        receiver().take(data(1, 0, rate=2_500.0))


def test_times_of_samples_are_exact_for_a_day():
    r = receiver()
    assert r.ns(30_000 * 86_400 + 3) == 86_400 * 10**9 + 100_000
    assert Receiver(r.counter, 24_414.0625).ns(24_414_062_500) == 10**15


def test_heartbeat():
    said = json.loads(heartbeat("cortexloop", "1234"))
    assert said == {"application": "cortexloop", "uuid": "1234", "type": "heartbeat"}


@pytest.fixture
def plugin():
    """The plugin's sockets: data, listening."""
    context = zmq.Context()
    data_port, listening = context.socket(zmq.XPUB), context.socket(zmq.REP)
    for which in (data_port, listening):
        which.setsockopt(zmq.LINGER, 0)
        which.bind("tcp://127.0.0.1:*")
    yield data_port, listening
    data_port.close()
    listening.close()
    context.term()


def until(condition, subscriber):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        subscriber.receive(5)


def test_a_connection_to_the_plugin(plugin):
    publisher, listening = plugin
    addresses = [which.getsockopt_string(zmq.LAST_ENDPOINT) for which in plugin]
    r = receiver()
    subscriber = Subscriber(r, addresses[0], listening=addresses[1])
    try:
        assert publisher.recv() == b"\x01"  # subscribed
        r.counter.presented("p", "i", r.ns(3_000))
        for frames in stream([3_000, 4_500], 9_000):
            publisher.send_multipart(frames)
        publisher.send_multipart([b"DATA", b"no JSON", b""])
        until(lambda: subscriber.refused == 1, subscriber)
        assert r.counter.ready().responses.tolist() == [[2.0]]
        assert not subscriber.connected
        until(lambda: listening.poll(0), subscriber)
        assert json.loads(listening.recv())["type"] == "heartbeat"
        listening.send(b"heartbeat received")
        until(lambda: subscriber.connected, subscriber)
        publisher.send_multipart(data(100, 9_000, rate=1_000.0))
        with pytest.raises(StreamError):
            until(lambda: False, subscriber)
    finally:
        subscriber.close()


def test_an_address_without_a_port():
    with pytest.raises(ValueError, match="the address of the plugin looks like"):
        Subscriber(receiver(), "localhost")
