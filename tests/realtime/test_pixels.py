"""The store of images: each once, found by its checksum, whatever a crash or a bad disk did to the others."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import tracemalloc
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from cortexloop.realtime import durable
from cortexloop.realtime import pixels as pixels_module
from cortexloop.realtime.pixels import PIXELS, JournalError, PixelStore, pixel_sha

SHAPE = (6, 8, 3)


@pytest.fixture
def images(rng):
    """Noise and flat images."""
    noise = rng.integers(0, 256, (3, *SHAPE), dtype=np.uint8)
    flat = np.full((3, *SHAPE), np.array([1, 128, 255]).reshape(3, 1, 1, 1), np.uint8)
    return np.concatenate([noise, flat])[[0, 3, 1, 4, 2, 5]]


def test_images_come_back(tmp_path, images):
    with PixelStore(tmp_path, SHAPE) as store:
        shas = store.put(images)
        assert shas == [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        assert shas == [pixel_sha(image) for image in images]
        store.sync()
        assert all(np.array_equal(store.get(sha), image) for sha, image in zip(shas, images, strict=True))
    with PixelStore(tmp_path) as store:
        assert store.shape == SHAPE
        assert store.shas() == shas
        assert (len(store), store.torn_bytes, store.damaged_bytes) == (6, 0, 0)
        for sha, image in zip(shas, images, strict=True):
            assert store.has(sha)
            assert np.array_equal(store.get(sha), image)
            assert not store.get(sha).flags.writeable
        assert not store.has("0" * 64)
        with pytest.raises(KeyError):
            store.get("0" * 64)


def test_the_layout_is_the_documented_one(tmp_path, images):
    """Read by hand, so that another program can."""
    with PixelStore(tmp_path, SHAPE) as store:
        shas = store.put(images)
    data = (tmp_path / PIXELS).read_bytes()
    assert data[:8] == b"rigp\r\n\x1a\x01"
    assert np.frombuffer(data, "<u4", 3, 8).tolist() == list(SHAPE)
    entries = np.frombuffer(
        data, np.dtype([("sha", "V32"), ("length", "<u4"), ("crc", "<u4"), ("px", "u1", SHAPE)]), -1, 20
    )
    assert [entry["sha"].tobytes().hex() for entry in entries] == shas
    assert (entries["length"] == 6 * 8 * 3).all()
    assert np.array_equal(entries["px"], images)
    for entry in entries:
        assert zlib.crc32(entry["px"].tobytes(), zlib.crc32(entry.tobytes()[:36])) == entry["crc"]


def test_each_image_is_kept_once(tmp_path, images):
    with PixelStore(tmp_path, SHAPE) as store:
        assert store.put(images[[0, 1, 0]]) == store.put(images[[0, 1, 0]])
        size = (tmp_path / PIXELS).stat().st_size
    with PixelStore(tmp_path, SHAPE) as store:
        store.put(images[:2])
        store.put(images[:0])
        assert len(store) == 2
    assert (tmp_path / PIXELS).stat().st_size == size


def test_layouts_of_memory_do_not_matter(tmp_path, images):
    with PixelStore(tmp_path, SHAPE) as store:
        shas = store.put(images)
        turned = np.ascontiguousarray(images.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
        assert store.put(turned) == shas
        assert store.put(np.repeat(images, 2, axis=0)[::2]) == shas
        assert len(store) == len(images)


def test_other_images_are_refused(tmp_path, images):
    with PixelStore(tmp_path, SHAPE) as store:
        for wrong in (images.astype(np.float32), images[0], images[:, :5], images[..., :1], images.astype(np.int8)):
            with pytest.raises(ValueError, match="uint8"):
                store.put(wrong)
    with pytest.raises(ValueError, match="shape"):
        PixelStore(tmp_path, (6, 9, 3))
    for shape in ((6, 8, 1), (0, 8, 3), (6, 8), (70000, 8, 3)):
        with pytest.raises(ValueError, match="height, width, 3"):
            PixelStore(tmp_path, shape)
    with pytest.raises(FileNotFoundError):
        PixelStore(tmp_path / "elsewhere", readonly=True)


def test_reading_only(tmp_path, images):
    with PixelStore(tmp_path, SHAPE) as store:
        shas = store.put(images)
    path = tmp_path / PIXELS
    torn = path.read_bytes()[:-1]
    path.write_bytes(torn)
    with PixelStore(tmp_path, readonly=True) as store:
        assert store.shas() == shas[:-1]
        assert store.torn_bytes > 0
        for change in (lambda: store.put(images[-1:]), store.sync):
            with pytest.raises(JournalError, match="reading only"):
                change()
    assert path.read_bytes() == torn
    assert not list(tmp_path.glob("*.torn-*"))
    store.close()
    for use in (lambda: store.get(shas[0]), store.sync):
        with pytest.raises(JournalError, match="closed"):
            use()


def test_a_tail_torn_at_every_byte(tmp_path, images):
    with PixelStore(tmp_path, SHAPE) as store:
        shas = store.put(images)
    stride = 40 + images[0].size
    begins, last = 20 + stride * (len(images) - 1), 20 + stride * len(images)
    data = (tmp_path / PIXELS).read_bytes()
    for end in range(begins, last):
        for path in tmp_path.glob("*.torn-*"):
            path.unlink()
        (tmp_path / PIXELS).write_bytes(data[:end])
        with PixelStore(tmp_path, SHAPE) as store:
            assert (store.shas(), store.torn_bytes) == (shas[:-1], end - begins)
            assert store.put(images[-1:]) == shas[-1:]
        assert (tmp_path / PIXELS).read_bytes() == data
        assert end == begins or (tmp_path / f"{PIXELS}.torn-1").read_bytes() == data[begins:end]


def test_zeros_behind_the_last_image(tmp_path, images):
    """What a power cut leaves: the length of an entry, and zeros for its content or for all of it."""
    with PixelStore(tmp_path, SHAPE) as store:
        shas = store.put(images)
    data = (tmp_path / PIXELS).read_bytes()
    for broken in (data + bytes(1000), data[:-10] + bytes(10), data[:-10] + bytes(2000)):
        (tmp_path / PIXELS).write_bytes(broken)
        with PixelStore(tmp_path, SHAPE) as store:
            assert store.shas() == (shas if broken.startswith(data) else shas[:-1])
            assert store.put(images) == shas
            assert all(np.array_equal(store.get(sha), image) for sha, image in zip(shas, images, strict=True))


def comes_back(store, sha, image):
    """Whether the store hands out this image, as it was; otherwise it hands out nothing."""
    try:
        found = store.get(sha)
    except (KeyError, JournalError):
        return False
    assert np.array_equal(found, image)
    return True


def test_damage_anywhere_hides_one_image_at_most(tmp_path, images):
    """The damaged one is not handed out, and can be put again."""
    with PixelStore(tmp_path, SHAPE) as store:
        shas = store.put(images)
    data = (tmp_path / PIXELS).read_bytes()
    for offset in range(20, len(data), 3):
        damaged = bytearray(data)
        damaged[offset] ^= 0x21
        (tmp_path / PIXELS).write_bytes(damaged)
        with PixelStore(tmp_path, SHAPE) as store:
            lost = sum(not comes_back(store, sha, image) for sha, image in zip(shas, images, strict=True))
            assert lost == 1
            assert store.put(images) == shas
        with PixelStore(tmp_path, SHAPE) as store:
            assert all(np.array_equal(store.get(sha), image) for sha, image in zip(shas, images, strict=True))


@pytest.mark.parametrize("content", [b"", b"rigp", b"x" * 20, b"rigp\r\n\x1a\x01" + bytes(12)])
def test_files_that_are_none(tmp_path, content):
    (tmp_path / PIXELS).write_bytes(content)
    with pytest.raises(JournalError, match="no store"):
        PixelStore(tmp_path, SHAPE)
    assert (tmp_path / PIXELS).read_bytes() == content


HEAD = b"rigp\r\n\x1a\x01" + np.array(SHAPE, "<u4").tobytes()
BLACK = np.zeros((1, *SHAPE), np.uint8)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
    content=st.one_of(
        st.binary(max_size=100),
        st.builds(lambda tail, zeros: HEAD + tail + bytes(zeros), st.binary(max_size=400), st.integers(0, 400)),
    )
)
def test_no_bytes_break_it(content):
    """What it hands out has the checksum it is asked for, and new images find their place behind whatever is there."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PIXELS).write_bytes(content)
        try:
            store = PixelStore(folder, SHAPE)
        except JournalError:
            assert (Path(folder) / PIXELS).read_bytes() == content
            return
        except ValueError:  # of another shape
            assert content[:20] != HEAD
            return
        with store:
            assert store.torn_bytes + store.damaged_bytes + 184 * len(store) >= len(content) - 20
            (sha,) = store.put(BLACK)
        with PixelStore(folder) as store:
            assert np.array_equal(store.get(sha), BLACK[0])


@pytest.mark.parametrize("takes", [0, 10, 50])
def test_a_full_disk(tmp_path, images, monkeypatch, takes):
    """The image is not there, half of it neither, and the next finds its place when there is room again."""
    with PixelStore(tmp_path, SHAPE) as store:
        shas = store.put(images[:2])
        data = (tmp_path / PIXELS).read_bytes()
        real, left = os.write, takes

        def write(fd, data):
            nonlocal left
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = real(fd, data[:left])
            left -= written
            return written

        monkeypatch.setattr(durable.os, "write", write)
        with pytest.raises(JournalError, match="no space left"):
            store.put(images[2:])
        assert (tmp_path / PIXELS).read_bytes() == data
        monkeypatch.setattr(durable.os, "write", real)
        shas += store.put(images[2:])
    with PixelStore(tmp_path) as store:
        assert store.shas() == shas


def test_a_disk_that_cannot_sync(tmp_path, images, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with PixelStore(tmp_path, SHAPE) as store:
        store.sync()
        shas = store.put(images[:1])
        monkeypatch.setattr(pixels_module, "sync_file", fail)
        with pytest.raises(JournalError, match="input/output error"):
            store.sync()
        for refused in (lambda: store.put(images[1:]), store.sync):
            with pytest.raises(JournalError, match="failed before"):
                refused()
        assert np.array_equal(store.get(shas[0]), images[0])


def test_several_threads(tmp_path, rng):
    """One renders and keeps, one syncs, others look up, as in a session."""
    images = rng.integers(0, 256, (60, *SHAPE), dtype=np.uint8)
    errors = []
    with PixelStore(tmp_path, SHAPE) as store:

        def guarded(work):
            try:
                work()
            except Exception as error:  # of whatever kind: it is what the test is about
                errors.append(error)

        def put(part):
            for image in images[part:]:
                sha = store.put(image[None])[0]
                assert np.array_equal(store.get(sha), image)

        threads = [threading.Thread(target=guarded, args=(lambda part=part: put(part),)) for part in (0, 10, 20)]
        threads.append(threading.Thread(target=guarded, args=(lambda: [store.sync() for _ in range(30)],)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(store) == 60
    with PixelStore(tmp_path) as store:
        assert store.damaged_bytes == store.torn_bytes == 0
        assert all(np.array_equal(store.get(pixel_sha(image)), image) for image in images)


def test_memory_stays_flat(tmp_path, rng):
    """Opening reads the heads of entries only."""
    shape = (112, 112, 3)
    with PixelStore(tmp_path, shape) as store:
        for _ in range(12):
            store.put(rng.integers(0, 256, (20, *shape), dtype=np.uint8))
    assert (tmp_path / PIXELS).stat().st_size > 9_000_000
    tracemalloc.start()
    try:
        with PixelStore(tmp_path) as store:
            assert len(store) == 240
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
