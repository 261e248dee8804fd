"""Networks that lose, repeat, delay, reorder, cut and spoil what they carry; each from a seed."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import zmq


class FaultyZmq:
    """Between DEALER clients and a ROUTER server, one connection to the server for each of the clients'.

    Args:
        server: address. seed: of all faults. rates: probability of each fault for a message: drop, twice, delay (up to
            30 ms, so that others overtake), truncate, garbage (random bytes instead), oversize (a megabyte behind it).
    """

    def __init__(self, server: str, seed: int, rates: dict[str, float]) -> None:
        self._server, self._random, self._rates = server, random.Random(seed), rates
        self.faults = dict.fromkeys(rates, 0)
        self._context = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.linger = 0
        port = self._front.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._backs: dict[bytes, Any] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for sock in [self._front, *self._backs.values()]:
            sock.close(0)
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        backs = self._backs
        fronts: dict[Any, bytes] = {}
        late: list[tuple[float, Any, list[bytes]]] = []
        while not self._stop.is_set():
            ready = dict(poller.poll(2))
            for sock in ready:
                frames = sock.recv_multipart()
                if sock is self._front:
                    who, frames = frames[0], frames[1:]
                    if who not in backs:
                        backs[who] = self._context.socket(zmq.DEALER)
                        backs[who].linger = 0
                        backs[who].connect(self._server)
                        fronts[backs[who]] = who
                        poller.register(backs[who], zmq.POLLIN)
                    target, envelope = backs[who], []
                else:
                    target, envelope = self._front, [fronts[sock]]
                for delay, spoiled in self._spoil(frames):
                    late.append((time.monotonic() + delay, target, envelope + spoiled))
            due = [entry for entry in late if entry[0] <= time.monotonic()]
            late = [entry for entry in late if entry not in due]
            for _, target, frames in due:
                target.send_multipart(frames)

    def _spoil(self, frames: list[bytes]) -> Iterator[tuple[float, list[bytes]]]:
        chosen = {name for name, rate in self._rates.items() if self._random.random() < rate}
        for name in chosen:
            self.faults[name] += 1
        if "drop" in chosen:
            return
        frames = list(frames)
        if "truncate" in chosen:
            i = self._random.randrange(len(frames))
            frames[i] = frames[i][: self._random.randrange(len(frames[i]) + 1)]
        if "garbage" in chosen:
            i = self._random.randrange(len(frames))
            frames[i] = self._random.randbytes(self._random.randrange(1, 200))
        if "oversize" in chosen:
            frames[-1] = frames[-1] + bytes(2**20)
        delay = self._random.random() * 0.03 if "delay" in chosen else 0.0
        yield delay, frames
        if "twice" in chosen:
            yield delay + self._random.random() * 0.01, frames


class FaultyTcp:
    """Between TCP clients and a server: passes bytes on in small pieces, and cuts connections in the middle of them.

    Args:
        server: (host, port). seed: of the cuts. cut: probability for each piece.
    """

    def __init__(self, server: tuple[str, int], seed: int, cut: float) -> None:
        self._server, self._random, self._cut = server, random.Random(seed), cut
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        while not self._stop.is_set():
            ready, _, _ = select.select([self._listener, *other], [], [], 0.005)
            for sock in ready:
                if sock is self._listener:
                    front = sock.accept()[0]
                    try:
                        back = socket.create_connection(self._server, 1)
                    except OSError:
                        front.close()
                        continue
                    other |= {front: back, back: front}
                    continue
                if sock not in other:
                    continue
                target = other[sock]
                try:
                    data = sock.recv(self._random.choice([1, 7, 100, 3000, 65536]))
                    cut = self._random.random() < self._cut
                    target.sendall(data[: len(data) // 2] if cut else data)
                except OSError:
                    data, cut = b"", False
                self.cuts += cut
                if cut or not data:
                    for end in (sock, target):
                        del other[end]
                        end.close()
        for sock in other:
            sock.close()


@contextmanager
def closing(network: Any) -> Iterator[Any]:
    try:
        yield network
    finally:
        network.close()
