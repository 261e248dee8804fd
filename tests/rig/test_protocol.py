"""Bytes and messages: every message there and back, and nothing but messages."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexloop.realtime import messages as m
from cortexloop.rig.protocol import (
    Desk,
    FrameError,
    FrameReader,
    Limits,
    Peer,
    Refused,
    decode_reply,
    decode_request,
    encode,
    encoding_of,
    frame,
)

REQUESTS = [
    m.Hello(id="1", client="ptb", roles=["display"], secret="s"),
    m.ClockRequest(id="2", t1_ns=-(2**62)),
    m.ClockReport(id="3", clock="ptb", exchanges=[(1, 2, 3, 4)]),
    m.Ask(id="4", after="evo-0001", within_ms=0.0, max_items=3, part=1, need="header"),
    m.Shown(id="5", events=[m.Event(pres_id="p", t_on=1.5, frame=7, diode=12345678901, acquisition="oe")]),
    m.Tell(id="6", batch_id="b", item_ids=["i"], units=["u"], status=["gap"], window_ms=(50.0, 200.0)),
    m.Note(id="7", text="näher am Rand"),
    m.Pause(id="8"),
    m.Resume(id="9"),
    m.Stop(id="10"),
    m.StatusRequest(id="11"),
    m.Heartbeat(id="12"),
]


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_a_request_comes_back_as_it_was(request_: m.Request, encoding: str):
    header = encode(request_, encoding)  # type: ignore[arg-type]
    assert encoding_of(header) == encoding
    assert decode_request(header) == request_


def test_a_reply_comes_back_as_it_was():
    reply = m.Error(id="1", code="BUSY", text="später", retry=True)
    assert decode_reply(encode(reply)) == decode_reply(encode(reply, "msgpack")) == reply
    with pytest.raises(ValueError, match="not a reply"):
        decode_reply(b'{"type":"hello"}')


def refusal(header: bytes) -> m.Error:
    with pytest.raises(Refused) as caught:
        decode_request(header)
    return caught.value.reply


@pytest.mark.parametrize(
    ("header", "id", "says"),
    [
        (b"", "?", "truncated"),
        (b"\xff\xfe", "?", "no request"),
        (b"{", "?", "truncated"),
        (b'{"id":"7"}', "7", "type"),
        (b'{"id":7,"type":"ask"}', "?", "id"),
        (b'{"id":"7","type":"launch"}', "7", "launch"),
        (b'{"id":"7","type":"ask","colour":1}', "7", "colour"),
        (b'{"id":"7","type":"ask","within_ms":-1}', "7", "within_ms"),
        (b'{"id":"7","type":"note","text":NaN}', "?", "malformed"),
        (b'{"id":"../7","type":"note","text":"x"}', "../7", "id"),
        (b'{"id":"' + b"7" * 65 + b'","type":"heartbeat"}', "?", "id"),
        (b'{"id":"7","type":"clock","t1_ns":99999999999999999999999}', "7", "t1_ns"),
        (b'{"id":"7","type":"note","text":' + b"[" * 100_000, "?", "text"),
        (b'{"id":"7","type":"heartbeat","x":' + b"[" * 100_000, "?", "no request"),
        (b"\x91" * 100_000, "?", "no request"),
    ],
)
def test_what_is_no_request_is_refused_by_name(header: bytes, id: str, says: str):
    error = refusal(header)
    assert (error.code, error.id) == ("BAD_MESSAGE", id)
    assert says in error.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63 - 1])
@pytest.mark.parametrize("field", ["t_on", "t_off", "diode", "ttl", "frame"])
def test_times_are_numbers_that_can_be_reckoned_with(field: str, value: float):
    """msgpack could carry others, into the journal and from there into every table."""
    event = {"pres_id": "p", field: value}
    header = msgspec.msgpack.encode({"type": "shown", "id": "1", "events": [event]})
    assert field in refusal(header).text


def test_another_version_is_named_even_if_its_hello_has_other_fields():
    header = b'{"type":"hello","id":"1","client":"x","versions":[7,8],"colour":"red"}'
    error = refusal(header)
    assert (error.code, error.id) == ("VERSION", "1")
    assert "7, 8" in error.text


@given(st.binary(max_size=200) | st.text(max_size=80).map(lambda t: b"{" + t.encode("utf-8", "surrogatepass")))
@settings(max_examples=300, deadline=None)
def test_no_bytes_but_a_request_are_taken_for_one(header: bytes):
    assert code(Desk(), Peer("x"), header) in ("ok", "BAD_MESSAGE", "VERSION")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(REQUESTS), st.data())
@settings(max_examples=200, deadline=None)
def test_requests_with_other_fields_are_taken_whole_or_not_at_all(request_: m.Request, data: st.DataObject):
    fields = msgspec.to_builtins(request_)
    for name in data.draw(st.sets(st.sampled_from(sorted(fields)), min_size=1, max_size=2)):
        fields[name] = data.draw(VALUES)
    try:
        header = msgspec.msgpack.encode(fields)
    except OverflowError:  # the encoder's own limit
        return
    try:
        taken = decode_request(header)
    except Refused:
        return
    assert decode_request(encode(taken)) == taken


# ---------------------------------------------------------------------------------------------- the desk


def code(desk: Desk, peer: Peer, request_: m.Request | bytes, buffer: bytes | None = None) -> str:
    """ "ok", or the code of the refusal."""
    try:
        desk.admit(peer, request_ if isinstance(request_, bytes) else encode(request_), buffer)
    except Refused as refused:
        return refused.reply.code
    return "ok"


def test_hello_comes_first():
    desk, peer = Desk(), Peer()
    assert code(desk, peer, m.Heartbeat(id="1")) == "NO_HELLO"
    assert code(desk, peer, m.Hello(id="2", client="ptb")) == "ok"
    assert peer.client == "ptb"
    assert code(desk, peer, m.Heartbeat(id="3")) == "ok"


@pytest.mark.parametrize("secret", [None, "", "wrong", "right ", "rightright", "ríght"])
def test_nothing_passes_with_another_secret(secret: str | None):
    desk, peer = Desk("right"), Peer()
    assert code(desk, peer, m.Hello(id="1", client="x", secret=secret)) == "AUTH"
    assert peer.client is None
    assert code(desk, peer, m.StatusRequest(id="2")) == "NO_HELLO"


def test_a_wrong_secret_takes_back_the_right_one():
    desk, peer = Desk("right"), Peer()
    assert code(desk, peer, m.Hello(id="1", client="x", secret="right")) == "ok"
    assert code(desk, peer, m.Hello(id="2", client="x", secret="wrong")) == "AUTH"
    assert code(desk, peer, m.StatusRequest(id="3")) == "NO_HELLO"


def test_the_session_does_not_see_the_secret():
    desk = Desk("right")
    request_, encoding = desk.admit(Peer(), encode(m.Hello(id="1", client="x", secret="right"), "msgpack"), None)
    assert isinstance(request_, m.Hello)
    assert request_.secret is None
    assert encoding == "msgpack"


def test_versions_need_one_in_common():
    assert code(Desk(), Peer(), m.Hello(id="1", client="x", versions=[2, 1])) == "ok"
    assert code(Desk(), Peer(), m.Hello(id="1", client="x", versions=[2])) == "VERSION"
    assert code(Desk(), Peer(), m.Hello(id="1", client="x", versions=[])) == "VERSION"


def test_sizes_have_limits():
    desk = Desk(limits=Limits(header_bytes=2000, buffer_bytes=100, stranger_bytes=500))
    stranger, peer = Peer(), Peer("ptb")
    long = m.Note(id="9", text="x" * 1000)
    assert code(desk, stranger, long) == "NO_HELLO"
    assert code(desk, peer, long) == "ok"
    assert code(desk, peer, m.Note(id="9", text="x" * 2000)) == "TOO_LARGE"
    tell = m.Tell(id="1", batch_id="b", item_ids=["i"], units=["u"])
    assert code(desk, peer, tell, bytes(100)) == "ok"
    assert code(desk, peer, tell, bytes(101)) == "TOO_LARGE"
    assert code(desk, peer, m.Heartbeat(id="1"), b"x") == "BAD_MESSAGE"
    assert code(desk, peer, m.Heartbeat(id="1"), b"") == "ok"


def test_a_refusal_has_the_id_of_its_request():
    desk = Desk(limits=Limits(buffer_bytes=10))
    with pytest.raises(Refused) as caught:
        desk.admit(Peer("x"), encode(m.Heartbeat(id="mine")), bytes(11))
    assert caught.value.reply.id == "mine"


# ---------------------------------------------------------------------------------------------- TCP


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=30), st.none() | st.binary(min_size=1, max_size=50)), max_size=5),
    st.lists(st.integers(1, 20), max_size=40),
)
@settings(max_examples=150, deadline=None)
def test_messages_survive_any_cutting_into_pieces(messages: list[tuple[bytes, bytes | None]], cuts: list[int]):
    stream = b"".join(bytes(part) for header, buffer in messages for part in frame(header, buffer))
    reader, found, at = FrameReader(100, 100), [], 0
    for size in [*cuts, len(stream)]:
        reader.feed(stream[at : at + size])
        at += size
        while (message := reader.next()) is not None:
            found.append(message)
    assert found == messages
    assert not reader.ready()


@pytest.mark.parametrize(("header", "buffer"), [(0, 0), (101, 0), (2**32 - 1, 0), (1, 101), (1, 2**32 - 1)])
def test_lengths_are_checked_before_anything_is_kept(header: int, buffer: int):
    reader = FrameReader(100, 100)
    reader.feed(np.array([header, buffer], ">u4").tobytes())
    assert reader.ready()
    with pytest.raises(FrameError, match="were announced"):
        reader.next()
