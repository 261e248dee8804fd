"""The journal and its writer's death, at random moments and on a disk that fills up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cortexloop.realtime.journal import Journal, JournalError, scan
from cortexloop.realtime.pixels import PixelStore
from session_files import SHAPE, note, start

# One process is forked for each kill, because to import everything anew would take longer than all of the test. The
# number of a record goes into a pipe once `sync` has returned: that is what a rig was told.
KILLS = """
import json, os, random, signal, sys, time
import numpy as np
from cortexloop.realtime.journal import Journal
from cortexloop.realtime.pixels import PixelStore
from session_files import SHAPE, note, start

folder, kills = sys.argv[1], int(sys.argv[2])
Journal.create(folder, start()).close()
chance = random.Random(11)


def write(pipe):
    journal, records = Journal.open(folder)
    pixels = PixelStore(folder, SHAPE)
    rng = np.random.default_rng(len(records))
    number = len({record.text.split(" ")[0] for record in records[1:]})
    while True:
        image = rng.integers(0, 256, (1, *SHAPE), dtype=np.uint8)
        image[0, 0, 0, :2] = divmod(number % 65536, 256)
        sha = pixels.put(image)[0]
        pixels.sync()
        # Records of very different sizes, several at a time.
        for part in range(1 + number % 3):
            journal.append(note(number, size=chance.choice((0, 50, 5000, 60000))))
        journal.sync()
        os.write(pipe, f"{number} {sha}\\n".encode())
        number += 1


told = []
for _ in range(kills):
    read, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write(pipe)
        finally:
            os._exit(3)
    os.close(pipe)
    first = b""
    while b"\\n" not in first:  # so that each process has written something
        part = os.read(read, 100)
        if not part:
            sys.exit("the writer ended by itself")
        first += part
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(read, 65536):
        first += part
    os.close(read)
    told += [line.split(" ") for line in first.decode().split("\\n")[:-1]]
print(json.dumps(told))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_no_acknowledged_record_is_lost_when_the_writer_is_killed(tmp_path):
    kills = 20
    search = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), str(kills)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told) >= kills
    journal, records = Journal.open(tmp_path)
    journal.close()
    written = [int(record.text.split(" ")[0]) for record in records[1:]]
    assert written == sorted(written)
    with PixelStore(tmp_path, SHAPE) as pixels:
        for number, sha in told:
            assert written.count(int(number)) >= 1 + int(number) % 3, f"record {number} is lost"
            assert pixels.get(sha).shape == SHAPE


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_really_full(small_disk):
    journal = Journal.create(small_disk, start())
    written = 0

    def fill():
        nonlocal written
        for number in range(1000):
            journal.append(note(number, size=3000))
            journal.sync()
            written += 1

    with pytest.raises(JournalError, match="no space left"):
        fill()
    journal.close()
    assert 10 < written < 100
    found = scan(small_disk)
    assert (found.count, found.torn_bytes, found.problem) == (written + 1, 0, None)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_too_full_for_images(small_disk, rng):
    shape = (64, 64, 3)
    images = rng.integers(0, 256, (100, *shape), dtype=np.uint8)
    kept = []
    with PixelStore(small_disk, shape) as pixels:

        def fill():
            for image in images:
                kept.extend(pixels.put(image[None]))

        with pytest.raises(JournalError, match="no space left"):
            fill()
        assert len(pixels) == len(kept)
    with PixelStore(small_disk, readonly=True) as pixels:
        assert (pixels.shas(), pixels.torn_bytes) == (kept, 0)
        assert np.array_equal(pixels.get(kept[-1]), images[len(kept) - 1])
