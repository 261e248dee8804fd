"""Batch after batch: the same numbers as one call, in order, with the reader's errors, on any device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import _device
from cortexloop.functional import bank as functional_bank
from cortexloop.functional.pipeline import read_ahead, through_device

CPU = torch.device("cpu")


def batches(images: np.ndarray, sizes: list[int]) -> Iterator[np.ndarray]:
    start = 0
    for size in sizes:
        yield images[start : start + size]
        start += size


@pytest.fixture
def images(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, size=(12, 17, 13, 3), dtype=np.uint8)


def test_streamed_responses_are_those_of_one_call(small_bank: cl.ModelBank, images: np.ndarray) -> None:
    expected = cl.responses(images, small_bank)
    results = list(cl.stream_responses(batches(images, [2, 5, 1, 4]), small_bank))
    assert [len(result) for result in results] == [2, 5, 1, 4]
    assert np.array_equal(np.concatenate(results), expected)


def test_streams_take_other_layouts_and_dtypes(small_bank: cl.ModelBank, images: np.ndarray) -> None:
    planes = np.ascontiguousarray(cl.recenter(images).transpose(0, 3, 1, 2))
    results = list(cl.stream_responses(batches(planes, [3, 9]), small_bank, layout="NCHW", backend="reference"))
    expected = cl.responses(planes, small_bank, layout="NCHW", backend="reference")
    assert np.array_equal(np.concatenate(results), expected)


def test_streams_refuse_what_responses_refuses(small_bank: cl.ModelBank, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images should be"):
        list(cl.stream_responses([images[:, :5]], small_bank))
    with pytest.raises(ValueError, match="backend should be one of"):
        list(cl.stream_responses([images], small_bank, backend="gpu"))
    assert list(cl.stream_responses([], small_bank)) == []


def test_an_error_of_the_reader_comes_in_its_turn(small_bank: cl.ModelBank, images: np.ndarray) -> None:
    def reader() -> Iterator[np.ndarray]:
        yield images[:3]
        raise OSError("the disk is gone")

    results = cl.stream_responses(reader(), small_bank)
    assert len(next(results)) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_a_stream_that_is_not_read_to_its_end_closes_its_reader(small_bank: cl.ModelBank, images: np.ndarray) -> None:
    closed = threading.Event()

    def reader() -> Iterator[np.ndarray]:
        try:
            while True:
                yield images[:1]
        finally:
            closed.set()

    before = threading.active_count()
    results = cl.stream_responses(reader(), small_bank)
    next(results)
    results.close()
    assert closed.wait(10)
    assert threading.active_count() == before


def test_the_reader_is_one_item_ahead_and_no_more() -> None:
    read: list[int] = []
    asked = threading.Event()

    def source() -> Iterator[int]:
        for i in range(5):
            read.append(i)
            if i == 1:
                asked.set()
            yield i

    items = read_ahead(source())
    assert next(items) == 0
    assert asked.wait(10)
    assert read == [0, 1]
    assert list(items) == [1, 2, 3, 4]


class FakeDevice:
    """Notes what a device is asked for, in the place of streams and events."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.marks = 0

    def lane(self) -> Any:
        device = self

        class Lane(_device.Lane):
            def finish(self) -> None:
                device.log.append("finish")

            def follow_caller(self) -> None:
                device.log.append("follow")

        return Lane

    def mark(self) -> Any:
        device = self

        class Mark(_device.Mark):
            def __init__(self, where: torch.device) -> None:
                super().__init__(where)
                self.number = device.marks
                device.marks += 1

            def set(self) -> None:
                device.log.append(("set", self.number))

            def hold_caller(self) -> None:
                device.log.append(("hold", self.number))

            def wait(self) -> None:
                device.log.append(("wait", self.number))

        return Mark


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    fake = FakeDevice()
    monkeypatch.setattr(_device, "Lane", fake.lane())
    monkeypatch.setattr(_device, "Mark", fake.mark())
    return fake


def test_the_next_batch_is_given_before_the_last_is_waited_for(fake_device: FakeDevice) -> None:
    """Each slot has the marks (copied, done): 0 and 1, 2 and 3."""
    given = [torch.full((2, 3), float(i)) for i in range(4)]
    results = through_device(iter(given), lambda x: x.sum(dim=1), CPU)
    totals = [next(results)]
    assert fake_device.log == [
        "follow", ("set", 0), ("hold", 0), ("set", 1),
        "follow", ("set", 2), ("hold", 2), ("set", 3),
        ("wait", 1),
    ]  # fmt: skip
    totals += list(results)
    assert [t.tolist() for t in totals] == [[3.0 * i] * 2 for i in range(4)]
    assert fake_device.marks == 4  # two slots serve all batches
    assert fake_device.log[-1] == "finish"


def test_slots_grow_and_results_are_copies() -> None:
    given = [torch.arange(n, dtype=torch.float32) + 10 * n for n in (2, 3, 1, 5, 4)]
    results = list(through_device(iter(given), lambda x: x * 2, CPU))
    assert all(torch.equal(result, 2 * batch) for result, batch in zip(results, given, strict=True))
    doubles = list(through_device(iter([given[0], given[1].double()]), lambda x: x + 1, CPU))
    assert doubles[1].dtype == torch.float64


@pytest.mark.parametrize(
    "finish", [lambda stream: stream.close(), lambda stream: pytest.raises(ValueError, next, stream)]
)
def test_a_broken_stream_waits_for_its_lane(fake_device: FakeDevice, finish: Callable[[Any], Any]) -> None:
    def source() -> Iterator[torch.Tensor]:
        for _ in range(3):
            yield torch.zeros(1)
        raise ValueError

    stream = through_device(source(), lambda x: x, CPU)
    next(stream)
    finish(stream)
    assert fake_device.log[-1] == "finish"


class ElsewhereBank:
    """A bank that says it is on another device, although its tensors are not."""

    def __init__(self, bank: cl.ModelBank) -> None:
        self._bank, self.device = bank, torch.device("cpu", 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bank, name)

    def __len__(self) -> int:
        return len(self._bank)


def test_numpy_images_go_where_the_bank_is(
    small_bank: cl.ModelBank, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy arrays have no device: they are copied to the bank's, in chunks, and the results come back."""
    monkeypatch.setattr(functional_bank, "CHUNK", 5)
    bank: Any = ElsewhereBank(small_bank)
    assert np.array_equal(cl.responses(images, bank), cl.responses(images, small_bank))
    assert np.array_equal(cl.responses(images[:4], bank), cl.responses(images[:4], small_bank))
    assert np.array_equal(np.concatenate(list(cl.stream_responses([images], bank))), cl.responses(images, small_bank))
    pairs = np.arange(12) % len(small_bank)
    assert np.array_equal(cl.responses(images, bank, pairs=pairs), cl.responses(images, small_bank, pairs=pairs))
    cotangent = np.ones((12, len(small_bank)), np.float32)
    got = cl.input_gradient(images, bank, cotangent, return_responses=True)
    expected = cl.input_gradient(images, small_bank, cotangent, return_responses=True)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    maps = cl.activations(images, bank, 0)
    assert all(np.array_equal(a, b) for a, b in zip(maps, cl.activations(images, small_bank, 0), strict=True))
