"""Responses to more images than fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from cortexloop import ops
from cortexloop.bank import ModelBank
from cortexloop.functional.bank import NumpyArray, check_images
from cortexloop.functional.pipeline import read_ahead, through_device


def stream_responses(
    batches: Iterable[NumpyArray],
    bank: ModelBank,
    *,
    layout: str = "NHWC",
    precision: str = "exact",
    backend: str = "auto",
) -> Iterator[NumpyArray]:
    """Responses to one batch of NumPy images after another, in order; the numbers are those of `responses`.

    A thread of its own reads the next batch meanwhile. With a bank on a GPU, batches go there through page-locked
    memory while the ones before are computed; a few hundred images per batch keep a GPU busy.

    Args:
        batches: arrays of images as `responses` takes them, of any number of images each.
        bank, layout, precision, backend: as for `responses`; the bank may be on any device.

    Yields:
        [B, N] for each batch, a new array.

    Raises:
        What reading `batches` raises, and what `responses` raises.
    """

    def compute(images: Tensor) -> Tensor:
        return ops.evaluate_forward(images, bank.weights, bank.table, None, layout, precision, backend)

    checked = (check_images(batch, bank, layout) for batch in read_ahead(batches))
    host = bank.device.type == "cpu"
    results: Iterator[Tensor] = map(compute, checked) if host else through_device(checked, compute, bank.device)
    for result in results:
        yield result.numpy()
