"""`_device` on a GPU, as far as a CPU can tell: which of torch's functions are called, in which order.

The stand-ins have the signatures of torch's own classes, so that a wrong name or argument fails here.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cortexloop import _device

GPU = torch.device("cuda", 1)
CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """torch.cuda with everything that needs a GPU replaced; the mock's `mock_calls` are the log."""
    log = mock.MagicMock()
    for name in (
        "Stream", "Event", "CUDAGraph", "graph", "stream", "device", "current_stream", "current_device",
        "is_current_stream_capturing",
    ):  # fmt: skip
        stand_in = mock.create_autospec(getattr(torch.cuda, name))
        log.attach_mock(stand_in, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    torch.cuda.current_device.return_value = 1  # type: ignore[attr-defined]
    return log


def names(log: mock.Mock) -> list[str]:
    return [call[0] for call in log.mock_calls]


def test_numbers_and_streams(cuda: mock.Mock) -> None:
    assert _device.index(torch.device("cuda")) == 1
    assert _device.index(torch.device("cuda", 3)) == 3
    assert _device.index(CPU) == 0
    cuda.current_stream.return_value.cuda_stream = 1234
    assert _device.stream_address(GPU) == 1234
    assert _device.stream_address(CPU) == 0
    cuda.current_stream.assert_called_once_with(GPU)


def test_capture_is_asked_of_the_right_device(cuda: mock.Mock) -> None:
    cuda.is_current_stream_capturing.return_value = True
    assert _device.capturing(GPU)
    cuda.device.assert_called_once_with(GPU)
    with pytest.raises(RuntimeError, match="this bank has not run on cuda:1 yet, and a CUDA graph is being captured"):
        _device.refuse_capture(GPU)
    assert not _device.capturing(CPU)
    _device.refuse_capture(CPU)


def test_a_lane_is_a_stream(cuda: mock.Mock) -> None:
    lane = _device.Lane(GPU, urgent=True)
    cuda.Stream.assert_called_once_with(GPU, priority=-1)
    with lane.entered():
        cuda.stream.assert_called_once_with(lane.stream)
    lane.follow_caller()
    lane.stream.wait_stream.assert_called_once_with(cuda.current_stream(GPU))
    lane.finish()
    lane.stream.synchronize.assert_called_once_with()
    _device.wait(GPU)
    cuda.current_stream(GPU).synchronize.assert_called_once_with()


def test_a_mark_is_an_event(cuda: mock.Mock) -> None:
    mark = _device.Mark(GPU)
    mark.set()
    mark.event.record.assert_called_once_with(cuda.current_stream(GPU))
    mark.hold_caller()
    cuda.current_stream(GPU).wait_event.assert_called_once_with(mark.event)
    mark.wait()
    mark.event.synchronize.assert_called_once_with()


def test_work_is_warmed_up_and_then_captured_on_its_lane(cuda: mock.Mock) -> None:
    lane = _device.Lane(GPU)
    work = mock.Mock()
    cuda.attach_mock(work, "work")
    replay = _device.captured(work, lane)
    assert replay == cuda.CUDAGraph.return_value.replay
    cuda.graph.assert_called_once_with(
        cuda.CUDAGraph.return_value, stream=lane.stream, capture_error_mode="thread_local"
    )
    seen = [name for name in names(cuda) if name in ("work", "graph", "stream", "CUDAGraph")]
    assert seen == ["stream", "work", "work", "CUDAGraph", "graph", "work"]


def test_without_a_gpu_everything_happens_at_once(cuda: mock.Mock) -> None:
    lane, mark = _device.Lane(CPU), _device.Mark(CPU)
    with lane.entered(), _device.selected(CPU):
        mark.set()
    mark.hold_caller()
    mark.wait()
    lane.follow_caller()
    lane.finish()
    _device.wait(CPU)
    work = mock.Mock()
    assert _device.captured(work, lane) is work
    assert work.call_count == 1
    assert cuda.mock_calls == []


@pytest.mark.parametrize("size", [0, 1, 255, 256, 10_000])
def test_buffers_are_aligned(size: int) -> None:
    buffer = _device.aligned_buffer(size, CPU)
    assert buffer.shape == (size,)
    assert size == 0 or buffer.data_ptr() % 256 == 0
    assert buffer.is_contiguous()
