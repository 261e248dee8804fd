"""A session over bad networks is the session over a good one: every response once, every image as it was."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import FaultyTcp, FaultyZmq, closing
from rig_parts import UNITS, make_session, neurons, pictures, serving

import cortexloop.rig
from cortexloop.realtime import records
from cortexloop.realtime.journal import scan
from cortexloop.rig.client import RigClient, RigError
from cortexloop.rig.protocol import Limits
from cortexloop.rig.server import split_address

# What a spoiled request or a spoiled reply may look like to a client; the network's fault, so it asks again.
SPOILED = ("BAD_MESSAGE", "BAD_SHAPE", "TOO_LARGE", "NAN", "UNKNOWN_ITEM", "STALE_BATCH")


def insist(rig: RigClient, header: dict[str, Any], data: bytes = b"") -> tuple[dict[str, Any], bytes]:
    """A request until it takes effect, under one id."""
    for _ in range(200):
        answer = attempt(rig, header, data)
        if answer is not None:
            return answer
    raise AssertionError(f"{header['type']} does not get through")


def attempt(rig: RigClient, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes] | None:
    try:
        reply, found = rig.request(header, data)
    except RigError as error:
        if error.code not in SPOILED:
            raise
        return None
    whole = reply["type"] != "batch" or len(found) == np.prod(reply["shape"])
    return (reply, found) if whole else None


def play_insisting(rig: RigClient, rounds: int) -> list[bytes]:
    """Show and tell whatever the network does; the pixels of every batch that is no filler."""
    seen: list[bytes] = []
    header: dict[str, Any] = {"type": "ask", "within_ms": 100}
    for number in itertools.count():
        if len(seen) == rounds:
            return seen
        reply, pixels = insist(rig, {**header, "id": f"ask-{number}"})
        header["after"] = reply["batch_id"]
        if reply["kind"] == "filler":
            continue
        images = np.frombuffer(pixels, np.uint8).reshape(reply["shape"])
        seen.append(pixels)
        events = [{"pres_id": pres, "t_on": 1.0, "clock": "screen"} for pres in reply["pres_ids"]]
        insist(rig, {"type": "shown", "id": f"shown-{number}", "events": events})
        tell = {"type": "tell", "id": f"tell-{number}", "batch_id": reply["batch_id"], "units": UNITS}
        tell["item_ids"] = [reply["items"][i]["item_id"] for i in reply["order"]]
        tell |= {"pres_ids": reply["pres_ids"], "dtype": "float64"}
        insist(rig, tell, np.array([neurons(images[i].tobytes()) for i in reply["order"]]).tobytes())
    raise AssertionError


def check(folder: Path, seen: list[bytes], batches: int) -> None:
    """The journal has each tell once, with the right numbers, and the images were those of the session."""
    entries = list(scan(folder / "session.rigj").records())
    told = [entry for entry in entries if isinstance(entry, records.Told)]
    made = {entry.batch_id: entry for entry in entries if isinstance(entry, records.BatchMade)}
    assert len(seen) == len(told) == batches
    assert len({entry.header.batch_id for entry in told}) == batches
    known = {image.tobytes() for image in [*pictures(12), *pictures(2, seed=99)]}
    for pixels, entry in zip(seen, told, strict=True):
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 12, 10, 3)
        batch = made[entry.header.batch_id]
        assert all(image.tobytes() in known for image in images)
        expected = [neurons(images[i].tobytes()) for i in batch.order]
        np.testing.assert_array_equal(entry.responses.numpy(), expected)


FAULTS = {
    "drop": {"drop": 0.15},
    "twice": {"twice": 0.5},
    "delay": {"delay": 0.5},
    "spoil": {"truncate": 0.1, "garbage": 0.1},
    "oversize": {"oversize": 0.15},
    "everything": {"drop": 0.05, "twice": 0.1, "delay": 0.1, "truncate": 0.05, "garbage": 0.05, "oversize": 0.03},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_session_over_a_faulty_network(tmp_path: Path, name: str):
    limits = Limits(buffer_bytes=2**20, header_bytes=2**19)
    with make_session(tmp_path, rounds=2) as session:
        with (
            serving(session, tcp=None, limits=limits) as server,
            closing(FaultyZmq(str(server.zmq_address), 7, FAULTS[name])) as network,
        ):
            with RigClient(network.address, "rig", heartbeat=None, timeout=0.06, retries=200) as rig:
                seen = play_insisting(rig, 6)
            assert all(network.faults.values()), network.faults
        assert session.state == "finished"
    check(tmp_path, seen, 6)


def test_a_session_over_connections_that_break(tmp_path: Path):
    with make_session(tmp_path, rounds=2) as session:
        with (
            serving(session, zmq=None) as server,
            closing(FaultyTcp(split_address(str(server.tcp_address)), 3, 0.04)) as network,
        ):
            address = f"tcp-raw://127.0.0.1:{network.port}"
            with RigClient(address, "rig", heartbeat=None, timeout=1.0, retries=200) as rig:
                seen = play_insisting(rig, 6)
            assert network.cuts >= 3
        assert session.state == "finished"
    check(tmp_path, seen, 6)


OCTAVE = """
pkg load instrument-control
addpath('{folder}');
rig = RigClient('127.0.0.1', {port}, 'octave', 'correct horse');
rig.timeout = 1; rig.retries = 100;
printf('%s\\n', rig.welcome.session);
ack = rig.sync_clock();
printf('%d exchanges\\n', ack.accepted);
rig.note('größer');
batch = rig.next();
try
    rig.tell(batch, zeros(1, 2), {{'a', 'b'}});
catch problem
    printf('%s\\n', problem.identifier);
end
try
    wrong = batch; wrong.batch_id = 'nothing';
    rig.tell(wrong, zeros(numel(batch.order), 2), {{'a', 'b'}});
catch problem
    printf('%s\\n', problem.identifier);
end
told = 0; first = true;
while ~isempty(batch)
    rows = numel(batch.order);
    responses = zeros(rows, 2); status = repmat({{'ok'}}, 1, rows);
    for k = 1:rows
        image = double(batch.images(:, :, :, batch.order(k)));
        weights = reshape(0:numel(image) - 1, size(image));
        responses(k, :) = [sum(image(:) .* weights(:)), image(2, 3, 1)];
    end
    if first, responses(rows, :) = NaN; status{{rows}} = 'missing'; first = false; end
    rig.shown(struct('pres_id', batch.pres_ids, 't_on', num2cell(0.1 * (1:rows)), 'clock', 'octave', 'frame', []));
    options = struct('kind', 'count', 'window_ms', [50 200], 'final', true);
    options.status = status;
    ack = rig.tell(batch, responses, {{'a', 'b'}}, options);
    batch = rig.next(batch);
end
status = rig.status();
printf('%s\\n', status.state);
printf('%d resent\\n', rig.resent);
rig.close();
"""


@pytest.mark.skipif(
    shutil.which("octave-cli") is None, reason="no octave-cli (Debian: octave octave-instrument-control)"
)
@pytest.mark.parametrize("cut", [0.0, 0.02])
def test_the_matlab_client(tmp_path: Path, cut: float):
    """In Octave: a whole session, over a good connection and over one that breaks."""
    script = tmp_path / "session.m"
    folder = Path(cortexloop.rig.__file__).parent / "matlab"
    command = ["octave-cli", "--quiet", "--no-history", str(script)]
    with (
        make_session(tmp_path / "kept", within_ms=1000.0) as session,
        serving(session, zmq=None, secret="correct horse") as server,
        closing(FaultyTcp(split_address(str(server.tcp_address)), 2, cut)) as network,
    ):
        script.write_text(OCTAVE.format(folder=folder, port=network.port), encoding="utf-8")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (network.cuts > 0) == (cut > 0)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["test", "8 exchanges", "RigClient:BAD_SHAPE", "RigClient:STALE_BATCH"]
    assert lines[4] == "finished"
    assert (lines[5] != "0 resent") == (cut > 0)
    entries = list(scan(tmp_path / "kept" / "session.rigj").records())
    assert any(isinstance(x, records.Control) and x.text == "größer" for x in entries)
    made = {x.batch_id: x for x in entries if isinstance(x, records.BatchMade)}
    told = [x for x in entries if isinstance(x, records.Told)]
    assert len(told) == 4  # three batches, and what was missing of the first again
    images = {x.tobytes(): x for x in [*pictures(12), *pictures(2, seed=99)]}
    by_sha = {sha: image for image in images.values() for sha in [_sha(image)]}
    weights = np.arange(12 * 10 * 3).reshape(12, 10, 3, order="F")
    for entry in told:
        batch, rows = made[entry.header.batch_id], entry.responses.numpy()
        assert (entry.header.kind, entry.header.window_ms) == ("count", (50.0, 200.0))
        status = entry.header.status or []
        for row, index, ok in zip(rows, batch.order, status, strict=True):
            image = by_sha[batch.shas[index]].astype(np.float64)
            if ok == "ok":
                np.testing.assert_array_equal(row, [(image * weights).sum(), image[1, 2, 0]])
    shown = [x for x in entries if isinstance(x, records.ShownEvents)]
    assert shown[0].events[1].t_on == pytest.approx(0.2)
    assert shown[0].events[1].frame is None


def _sha(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()
