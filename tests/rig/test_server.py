"""A server, its clients, and all that can go wrong between them."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from rig_parts import UNITS, FakeSession, addresses, make_session, neurons, pictures, play, serving

from cortexloop.realtime import messages as m
from cortexloop.rig.client import RigClient, RigError, RigTimeout
from cortexloop.rig.links import ClientLink
from cortexloop.rig.protocol import Limits, decode_reply, encode
from cortexloop.rig.server import Server, check_address, split_address

TRANSPORTS = ["zmq", "tcp"]


def client(server: Server, transport: str = "zmq", **options: Any) -> RigClient:
    return RigClient(addresses(server)[transport], "rig", **{"heartbeat": None, "timeout": 5.0, **options})


# ---------------------------------------------------------------------------------------------- a whole session


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_session_is_shown_and_told(tmp_path: Path, transport: str):
    with make_session(tmp_path, rounds=2) as session, serving(session) as server, client(server, transport) as rig:
        assert rig.hello()["session"] == "test"
        assert len(play(rig)) == 6
        status = rig.status()
        assert (status["state"], status["told"], status["deadline_misses"]) == ("finished", 36, 0)
        assert rig.resent == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_images_come_whole_and_in_parts(tmp_path: Path, transport: str):
    with make_session(tmp_path) as session, serving(session) as server, client(server, transport) as rig:
        batch = rig.ask()
        assert batch.images.shape == (6, 12, 10, 3)
        np.testing.assert_array_equal(batch.images[:2], pictures(2, seed=99))
        assert rig.ask(max_items=4).pixels == batch.pixels
        assert rig.ask(max_items=1).pixels == batch.pixels
        assert rig.ask(need="header").pixels == b""
        assert [p.kind for p in batch.presentations()][:2] == ["ref", "ref"]
        with pytest.raises(RigError, match="BAD_SHAPE"):
            rig.tell(
                batch, np.zeros((1, 2), np.float32), units=UNITS, item_ids=["x"], pres_ids=["y"], status=["ok"] * 2
            )


def test_a_filler_comes_in_parts_of_the_same_filler(tmp_path: Path):
    with make_session(tmp_path, n=8) as session, serving(session) as server, client(server) as rig:
        first = rig.ask()
        second = rig.ask(first)
        filler = rig.ask(second, within_ms=0, max_items=1)
        assert filler.kind == "filler"
        assert filler.pixels == pictures(2, seed=99).tobytes()
        assert rig.status()["deadline_misses"] == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_all_that_a_client_says(tmp_path: Path, transport: str):
    with make_session(tmp_path) as session, serving(session) as server, client(server, transport) as rig:
        assert rig.heartbeat()["type"] == "ack"
        assert rig.note("screen moved")["accepted"] == 1
        assert rig.sync_clock()["accepted"] == 8
        batch = rig.ask()
        assert rig.pause("break")["type"] == "ack"
        with pytest.raises(RigError, match="paused: break") as caught:
            rig.ask(batch)
        assert (caught.value.code, caught.value.retry) == ("PAUSED", True)
        assert rig.resume()["type"] == "ack"
        assert rig.ask().batch_id == batch.batch_id
        rows = [neurons(batch.image(i)) for i in batch.order]
        header = {"type": "tell", "id": "t1", "batch_id": batch.batch_id, "units": UNITS, "dtype": "float64"}
        header |= {"item_ids": batch.items_of(batch.pres_ids), "pres_ids": batch.pres_ids}
        data = np.array(rows).tobytes()
        assert rig.request(header, data)[0] == {**rig.request(header, data)[0], "dup": False}
        assert rig.request(header, data)[0]["dup"]
        assert rig.stop("monkey tired")["type"] == "ack"
        with pytest.raises(RigError, match="FINISHED"):
            rig.ask(batch)


def test_responses_as_lists_and_as_arrays(tmp_path: Path):
    with make_session(tmp_path) as session, serving(session) as server, client(server) as rig:
        batch = rig.ask()
        half = len(batch.order) // 2
        rows = [neurons(batch.image(i)) for i in batch.order]
        assert rig.tell(batch, rows[:half], units=UNITS, pres_ids=batch.pres_ids[:half])["accepted"] == half
        rest = np.array(rows)[half:]
        status = ["ok"] * (len(rest) - 1) + ["missing"]
        rest[-1] = np.nan
        told = rig.tell(batch, rest, units=UNITS, pres_ids=batch.pres_ids[half:], status=status, final=True)
        assert told["accepted"] + len(told["ignored"]) == len(rest)
        following = rig.ask(batch)
        assert "repair" in (following.kind, rig.ask(following).kind)
        for wrong in ([[1.0]], np.zeros((2, 2)), [[1.0, 2.0, 3.0]] * half):
            with pytest.raises(ValueError, match="responses should"):
                rig.tell(batch, wrong, units=UNITS, pres_ids=batch.pres_ids[:half])
        with pytest.raises(ValueError, match="item_ids are needed"):
            rig.tell("images-0000", [[1.0, 2.0]], units=UNITS)


def test_the_image_of_a_client_without_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with make_session(tmp_path) as session, serving(session) as server, client(server) as rig:
        batch = rig.ask()
        expected = batch.images[3]
        monkeypatch.setitem(__import__("sys").modules, "numpy", None)
        image = batch.image(3)
        assert isinstance(image, memoryview)
        assert (image.shape, image.tobytes()) == ((12, 10, 3), expected.tobytes())


# ---------------------------------------------------------------------------------------------- who may


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_secret_is_needed_where_there_is_one(transport: str):
    with serving(session := FakeSession(), secret="right") as server:
        for wrong in (None, "wrong"):
            with client(server, transport, secret=wrong) as rig, pytest.raises(RigError, match="AUTH"):
                rig.status()
        assert session.seen == []
        with client(server, transport, secret="right") as rig:
            rig.heartbeat()
        assert [type(request).__name__ for _, request in session.seen] == ["Hello", "Heartbeat"]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.10", "*", "rig.example.org", "::"])
def test_other_computers_need_a_secret_or_a_word(host: str):
    with pytest.raises(ValueError, match="set a secret"):
        check_address(host, secret=None, insecure=False)
    check_address(host, secret="x", insecure=False)
    check_address(host, secret=None, insecure=True)
    for own in ("127.0.0.1", "localhost", "[::1]", "127.9.9.9"):
        check_address(own, secret=None, insecure=False)


def test_an_unsafe_server_is_not_made():
    session = FakeSession()
    with pytest.raises(ValueError, match="set a secret"):
        Server(session, zmq="tcp://*:0")
    with pytest.raises(ValueError, match="set a secret"):
        Server(session, zmq="tcp://127.0.0.1:*", tcp="0.0.0.0:0")
    for bad in ("127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", ":5", "a:b"):
        with pytest.raises(ValueError, match="looks like"):
            split_address(bad)
    with pytest.raises(ValueError, match="looks like"):
        Server(session, zmq="127.0.0.1:5557")


def test_an_address_in_use_is_named():
    with serving(FakeSession()) as server:
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1"):
            Server(FakeSession(), tcp=server.tcp_address)
        with pytest.raises(OSError, match="cannot listen on tcp://"):
            Server(FakeSession(), zmq=server.zmq_address)


# ---------------------------------------------------------------------------------------------- what is no message


def raw(server: Server) -> socket.socket:
    host, port = split_address(str(server.tcp_address))
    return socket.create_connection((host, port), 5)


def framed(header: bytes, buffer: bytes = b"") -> bytes:
    return struct.pack(">II", len(header), len(buffer)) + header + buffer


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with sock:
        while piece := sock.recv(65536):
            data += piece
    return data


@pytest.mark.parametrize("lengths", [(0, 0), (20_000, 0), (2**32 - 1, 5), (10, 5)])
def test_a_tcp_client_that_announces_too_much_is_told_and_closed(lengths: tuple[int, int]):
    with serving(FakeSession()) as server:
        sock = raw(server)
        sock.sendall(struct.pack(">II", *lengths) + bytes(1000))
        sock.shutdown(socket.SHUT_WR)
        data = read_all(sock)
        reply = decode_reply(data[8:])
        assert isinstance(reply, m.Error)
        assert (reply.code, reply.id) == ("TOO_LARGE", "?")
        with client(server, "tcp") as rig:
            rig.heartbeat()


def dealer(server: Server) -> zmq.Socket[bytes]:
    sock = zmq.Context.instance().socket(zmq.DEALER)
    sock.linger = 0
    sock.rcvtimeo = 5000
    sock.connect(str(server.zmq_address))
    return sock


@pytest.mark.parametrize("frames", [[b""], [b"", b"", b""], [b"{}", b"", b"", b""], [b"\xc1"], [b"{}", b"x" * 9]])
def test_frames_without_a_meaning_are_answered(frames: list[bytes]):
    with serving(FakeSession()) as server, dealer(server) as sock:
        sock.send_multipart(frames)
        reply = decode_reply(sock.recv_multipart()[-1])
        assert isinstance(reply, m.Error)
        assert reply.code == "BAD_MESSAGE"


def test_a_request_socket_may_put_its_empty_frame_first():
    with serving(FakeSession()) as server:
        sock = zmq.Context.instance().socket(zmq.REQ)
        sock.linger, sock.rcvtimeo = 0, 5000
        with sock:
            sock.connect(str(server.zmq_address))
            sock.send(encode(m.Hello(id="1", client="x"), "msgpack"))
            reply = sock.recv()
            assert isinstance(decode_reply(reply), m.Welcome)
            assert reply[:1] != b"{"


def test_a_routing_id_of_ones_own_is_refused():
    """The next connection under this id would inherit the hello of the last."""
    with serving(session := FakeSession()) as server:
        sock = zmq.Context.instance().socket(zmq.DEALER)
        sock.linger, sock.rcvtimeo, sock.routing_id = 0, 5000, b"me"
        with sock:
            sock.connect(str(server.zmq_address))
            sock.send(encode(m.Hello(id="1", client="x")))
            reply = decode_reply(sock.recv())
            assert isinstance(reply, m.Error)
            assert (reply.id, reply.code) == ("1", "BAD_MESSAGE")
        assert session.seen == []


def test_a_tell_beyond_the_limit_is_refused_over_both():
    with serving(FakeSession(), limits=Limits(buffer_bytes=1000)) as server:
        for transport in TRANSPORTS:
            with client(server, transport, retries=0) as rig:
                rig.heartbeat()
                with pytest.raises(RigError, match="TOO_LARGE"):
                    rig.tell("b", np.zeros((1, 251), np.float32), item_ids=["i"], units=[str(i) for i in range(251)])


def test_any_two_hundred_requests_leave_the_server_alive(tmp_path: Path, rng: np.random.Generator):
    """Random fields of a real session's requests, random bytes, in random order, over both transports."""
    with make_session(tmp_path) as session, serving(session) as server:
        kinds = [
            "ask",
            "shown",
            "tell",
            "note",
            "clock",
            "clock_report",
            "status",
            "heartbeat",
            "resume",
            "launch",
            "hello",
        ]
        fields: dict[str, list[Any]] = {
            "after": [None, "images-0000", "nothing"],
            "batch_id": ["images-0000", "images-0001", "nothing", ""],
            "item_ids": [[], ["images-0000-000"], ["ref-000", "ref-001"], ["../../etc/passwd"]],
            "pres_ids": [None, [], ["images-0000.0000"], ["x", "y"]],
            "units": [[], ["a"], ["a", "b"], ["a", "a"]],
            "dtype": ["float32", "float64", "int8"],
            "status": [None, ["ok"], ["gap", "ok"]],
            "events": [[], [{"pres_id": "images-0000.0000"}], [{"pres_id": "x"}]],
            "exchanges": [[], [[1, 2, 3, 4]], [[4, 3, 2, 1]], [[0, 0]]],
            "clock": ["screen", ""],
            "t1_ns": [0, -1, 1.5],
            "text": ["", "x" * 4001],
            "within_ms": [0, 1, -1, None],
            "max_items": [1, 100, 0],
            "part": [0, 1, 99],
            "client": ["fuzz", ""],
        }
        with dealer(server) as sock, raw(server) as stream:
            sock.send(encode(m.Hello(id="h", client="fuzz")))
            stream.sendall(framed(encode(m.Hello(id="h", client="fuzz2"))))
            for number in range(200):
                kind = str(rng.choice(kinds))
                known = next((t for t in m.Request.__args__ if t.__struct_config__.tag == kind), m.Tell)
                names = [n for n in known.__struct_fields__ if n in fields and rng.random() < 0.8]
                header = {"type": kind, "id": f"f{number}"} | {
                    n: fields[n][rng.integers(len(fields[n]))] for n in names
                }
                data = json.dumps(header).encode() if rng.random() < 0.9 else rng.bytes(30)
                buffer = rng.bytes(int(rng.choice([0, 4, 8, 16])))
                sock.send_multipart([data, buffer] if len(buffer) else [data])
                stream.sendall(framed(data, buffer))
        with client(server) as rig:
            assert rig.status()["state"] in ("ready", "running")
            assert len(play(rig)) == 3


def test_a_bug_in_the_session_is_answered_and_logged(caplog: pytest.LogCaptureFixture):
    def broken(client: str, request: m.Request, buffer: Any) -> Any:
        if isinstance(request, m.Note):
            raise RuntimeError("bug")
        return m.Ack(id=request.id), None

    with caplog.at_level(logging.ERROR), serving(FakeSession(broken)) as server, client(server) as rig:
        with pytest.raises(RigError, match="FAULT"):
            rig.note("x")
        rig.heartbeat()
    assert "bug" in caplog.text


def test_a_session_that_fails_while_nobody_asks_does_not_end_the_server(caplog: pytest.LogCaptureFixture):
    session = FakeSession()

    def failing() -> Any:
        raise RuntimeError("bug")

    session.poll = failing  # type: ignore[method-assign]
    session.next_wake_ns = lambda: -1  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR), serving(session) as server, client(server) as rig:
        for _ in range(20):
            rig.heartbeat()
    assert 1 <= len(caplog.records) <= 3


def test_a_tick_that_fails_does_not_end_the_server(caplog: pytest.LogCaptureFixture):
    def failing() -> None:
        raise BrokenPipeError("the terminal was closed")

    with caplog.at_level(logging.ERROR), serving(FakeSession(), tick=failing) as server, client(server) as rig:
        rig.heartbeat()
    assert "the terminal was closed" in caplog.text


def test_a_reply_that_cannot_be_sent_does_not_end_the_server(caplog: pytest.LogCaptureFixture):
    def answer(client: str, request: m.Request, buffer: Any) -> Any:
        if isinstance(request, m.StatusRequest):
            return m.Error(id=request.id, code="FAULT", text="\udcff"), None
        return m.Ack(id=request.id), None

    with caplog.at_level(logging.ERROR), serving(FakeSession(answer)) as server, client(server) as rig:
        rig.timeout, rig.retries = 0.2, 0
        with pytest.raises(RigTimeout):
            rig.status()
        rig.timeout = 5.0
        rig.heartbeat()
    assert "cannot be sent" in caplog.text


def test_a_waiting_ask_hears_of_a_pause(tmp_path: Path):
    with (
        make_session(tmp_path, n=4) as session,
        serving(session) as server,
        client(server) as display,
        client(server) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        batch = display.ask()
        waits = pool.submit(display.ask, batch, within_ms=20_000)
        deadline = time.monotonic() + 10
        while not session._waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        other.pause("a break")
        with pytest.raises(RigError, match="a break"):
            waits.result(30)


def test_a_refusal_of_the_session_is_an_error():
    def refuse(client: str, request: m.Request, buffer: Any) -> Any:
        raise m.Refusal("STALE_BATCH", "long gone", retry=True)

    with serving(FakeSession(refuse)) as server, client(server) as rig:
        with pytest.raises(RigError, match="STALE_BATCH: long gone") as caught:
            rig.heartbeat()
        assert caught.value.retry


# ---------------------------------------------------------------------------------------------- slow, many, gone


def batch_reply(id: str, side: int = 300) -> tuple[m.Reply, bytes]:
    items = [m.Item(item_id="i", kind="gen", sha="0" * 16)]
    reply = m.Batch(
        id=id, batch_id="b", stream="s", generation=0, kind="gen", items=items, order=[0], pres_ids=["p"],
        shape=(1, side, side, 3),
    )  # fmt: skip
    return reply, bytes(side * side * 3)


def test_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody():
    session = FakeSession(lambda client, request, buffer: batch_reply(request.id, 1000))
    with serving(session, limits=Limits(stall_s=0.3, output_bytes=2**20 * 64)) as server:
        lazy = raw(server)
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(framed(encode(m.Hello(id="h", client="lazy"))))
        lazy.sendall(b"".join(framed(encode(m.Ask(id=f"a{i}"))) for i in range(50)))
        with client(server, "tcp") as rig:
            until = time.monotonic() + 10
            asked = 0
            while time.monotonic() < until:
                rig.ask()
                asked = sum(name == "lazy" and isinstance(r, m.Ask) for name, r in session.seen)
                try:
                    lazy.send(framed(encode(m.Heartbeat(id="x"))))
                except OSError:
                    break
                time.sleep(0.02)
            else:
                pytest.fail("the client was not cut off")
        lazy.close()
        # Nothing more is taken from it while replies lie unread: three megabytes each, some in the system's buffers.
        assert asked < 10


def closed_by_the_server(sock: socket.socket) -> bool:
    """Whether, within some seconds, sending fails."""
    for _ in range(1000):
        try:
            sock.send(b"x")
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_client_whose_unread_replies_are_too_many_is_cut_off():
    session = FakeSession(lambda client, request, buffer: batch_reply(request.id, 1500))
    with serving(session, limits=Limits(output_bytes=2**20)) as server:
        lazy = raw(server)
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(framed(encode(m.Hello(id="h", client="lazy"))) + framed(encode(m.Ask(id="a"))))
        with lazy:
            assert closed_by_the_server(lazy)


def test_connections_are_counted_and_strangers_do_not_stay():
    with serving(FakeSession(), limits=Limits(clients=2, hello_s=0.3)) as server:
        first, second = raw(server), raw(server)
        time.sleep(0.05)
        with raw(server) as third:
            reply = decode_reply(read_all(third)[8:])
        assert isinstance(reply, m.Error)
        assert reply.code == "BUSY"
        assert read_all(first) == b""  # cut off for its silence
        assert read_all(second) == b""
        with client(server, "tcp") as rig:
            rig.heartbeat()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files as Linux shows them")
def test_clients_that_come_and_go_leave_nothing_behind():
    with serving(FakeSession()) as server:
        for transport in TRANSPORTS:
            client(server, transport).close()
        with client(server, "tcp") as rig:
            rig.heartbeat()
            before = len(os.listdir("/proc/self/fd"))
            for number in range(60):
                stream = raw(server)
                if number % 2:
                    stream.sendall(framed(encode(m.Hello(id="h", client=f"c{number}")))[: 20 + number])
                stream.close()
                with client(server, TRANSPORTS[number % 2]) as other:
                    other.heartbeat()
            until = time.monotonic() + 5
            while len(os.listdir("/proc/self/fd")) > before:
                assert time.monotonic() < until, "connections stay open"
                rig.heartbeat()


def test_zeromq_clients_beyond_the_number_say_hello_again():
    with serving(FakeSession(), limits=Limits(clients=2)) as server:
        rigs = [client(server) for _ in range(4)]
        for _ in range(2):
            for rig in rigs:
                rig.heartbeat()
        for rig in rigs:
            rig.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_answer_of_an_ask_that_waits_goes_to_who_asked_last(transport: str):
    session = FakeSession(
        lambda client, request, buffer: None if isinstance(request, m.Ask) else (m.Ack(id=request.id), None)
    )
    with serving(session) as server:
        rig = client(server, transport, timeout=0.2, retries=20)
        gone: list[str] = []

        def answer() -> None:
            asks = [request.id for _, request in session.seen if isinstance(request, m.Ask)]
            if len(asks) >= 3 and not gone:
                gone.append(asks[0])
                session.later = [("rig", batch_reply(asks[0])), ("rig", batch_reply("unknown"))]
                assert session.wake is not None
                session.wake()

        session.next_wake_ns = lambda: answer() or None  # type: ignore[method-assign]
        assert rig.ask().batch_id == "b"
        assert rig.resent >= 2
        assert len({request.id for _, request in session.seen if isinstance(request, m.Ask)}) == 1
        rig.close()


def test_a_later_ask_takes_the_place_of_an_older_one():
    session = FakeSession(lambda client, request, buffer: None)
    with serving(session) as server, dealer(server) as sock:
        sock.send(encode(m.Hello(id="h", client="x")))
        sock.recv()
        sock.send(encode(m.Ask(id="1")))
        sock.send(encode(m.Ask(id="2")))
        reply = decode_reply(sock.recv())
        assert isinstance(reply, m.Error)
        assert (reply.id, reply.code, reply.retry) == ("1", "BUSY", True)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_those_who_wait_are_told_when_the_server_closes(transport: str):
    session = FakeSession(lambda client, request, buffer: None)
    with serving(session) as server:
        if transport == "zmq":
            sock = dealer(server)
            sock.send(encode(m.Hello(id="h", client="x")))
            sock.recv()
            sock.send(encode(m.Ask(id="1")))
            receive = sock.recv
        else:
            stream = raw(server)
            stream.sendall(framed(encode(m.Hello(id="h", client="x"))) + framed(encode(m.Ask(id="1"))))
            receive = lambda: read_all(stream).rpartition(b"\0\0\0\0")[2]  # noqa: E731
        until = time.monotonic() + 5
        while not any(isinstance(request, m.Ask) for _, request in session.seen):
            assert time.monotonic() < until
            time.sleep(0.005)
    reply = decode_reply(receive())
    assert isinstance(reply, m.Error)
    assert (reply.id, reply.code, reply.retry) == ("1", "BUSY", True)
    if transport == "zmq":
        sock.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_client_outlives_its_server(tmp_path: Path, transport: str):
    """The same request, sent again to the next server, takes effect once."""
    with make_session(tmp_path) as session:
        with serving(session) as server:
            address = {"zmq": {"zmq": server.zmq_address}, "tcp": {"tcp": server.tcp_address}}[transport]
            rig = client(server, transport, timeout=0.3, retries=20)
            batch = rig.ask()
        with pytest.raises(RigTimeout, match="is the server running"):
            RigClient(rig.address, "rig", timeout=0.05, retries=1, heartbeat=None).status()
        with serving(session, **address):
            assert rig.ask().pixels == batch.pixels
            assert len(play(rig)) == 3
            rig.close()


def test_a_thread_of_the_process_needs_no_socket(tmp_path: Path):
    with make_session(tmp_path) as session:
        with serving(session, zmq=None, tcp=None, secret="x") as server:
            link = server.local("folder")
            assert isinstance(link.request(m.Hello(id="h", client="folder"))[0], m.Welcome)
            batch, pixels = link.request(m.Ask(id="1"))
            assert isinstance(batch, m.Batch)
            assert pixels is not None
            assert len(pixels) == 6 * 12 * 10 * 3
        late = link.request(m.Heartbeat(id="2"), timeout=5)[0]
        assert isinstance(late, m.Error)
        assert late.code == "BUSY"


def test_a_tick_comes_again_and_again():
    ticks: list[float] = []
    with serving(FakeSession(), tick=lambda: ticks.append(time.monotonic()), tick_s=0.01):
        until = time.monotonic() + 5
        while len(ticks) < 3:
            assert time.monotonic() < until
            time.sleep(0.005)


def test_messages_are_encoded_as_they_were_asked_for(tmp_path: Path):
    with serving(FakeSession()) as server, dealer(server) as sock:
        for encoding in ("json", "msgpack"):
            sock.send(encode(m.Hello(id="h", client="x"), encoding))  # type: ignore[arg-type]
            reply = sock.recv()
            assert (reply[:1] == b"{") == (encoding == "json")
            decode = msgspec.json.decode if encoding == "json" else msgspec.msgpack.decode
            assert decode(reply)["type"] == "welcome"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_client_as_a_link(tmp_path: Path, transport: str):
    with make_session(tmp_path) as session:
        with serving(session) as server, client(server, transport, retries=1, timeout=0.3) as rig:
            link = ClientLink(rig)
            assert isinstance(link.request(m.Hello(id="h", client="x", roles=["display"]))[0], m.Welcome)
            batch, pixels = link.request(m.Ask(id="1"))
            assert isinstance(batch, m.Batch)
            assert pixels is not None
            assert len(pixels) == 6 * 12 * 10 * 3
            tell = m.Tell(id="2", batch_id=batch.batch_id, item_ids=["ref-000"], units=["a"])
            assert isinstance(link.request(tell, memoryview(np.ones(1, np.float32)).cast("B"))[0], m.Ack)
            wrong = link.request(tell.__class__(id="3", batch_id="b", item_ids=[], units=[]))
            assert isinstance(wrong[0], m.Error)
            assert wrong[0].code == "STALE_BATCH"
        with pytest.raises(TimeoutError, match="no answer"):
            link.request(m.Heartbeat(id="4"))
