"""The best images of a stream are those of all images at once."""

from __future__ import annotations

import numpy as np
import pytest

import cortexloop as cl
from cortexloop.screening import TopK, top_images


def expected(responses: np.ndarray, k: int, lowest: bool) -> tuple[np.ndarray, np.ndarray]:
    keys = responses if lowest else -responses
    order = np.argsort(np.where(np.isnan(keys), np.inf, keys), axis=0, kind="stable")[:k]
    return order, np.take_along_axis(responses, order, axis=0)


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_in_batches_as_at_once(rng: np.random.Generator, batch: int, k: int, lowest: bool) -> None:
    """With many equal responses, of which the earlier images count."""
    responses = rng.integers(-4, 5, size=(40, 6)).astype(np.float32)
    best = TopK(6, k, lowest=lowest)
    for start in range(0, 40, batch):
        best.add(responses[start : start + batch])
    found = best.result()
    positions, values = expected(responses, k, lowest)
    assert np.array_equal(found.positions, positions)
    assert np.array_equal(found.responses, values)
    assert found.seen == 40


def test_fewer_images_than_asked_for_and_nan(rng: np.random.Generator) -> None:
    best = TopK(2, 3)
    assert np.array_equal(best.result().positions, np.full((3, 2), -1))
    best.add(np.array([[1.0, np.nan], [np.nan, np.nan]], np.float32))
    best.add(np.empty((0, 2), np.float32))
    best.add(np.array([[2.0, -np.inf]], np.float32))
    found = best.result()
    assert np.array_equal(found.positions, [[2, -1], [0, -1], [-1, -1]])
    assert np.array_equal(found.responses, [[2, np.nan], [1, np.nan], [np.nan, np.nan]], equal_nan=True)
    assert found.seen == 3


@pytest.mark.parametrize(("models", "k"), [(0, 1), (1, 0)])
def test_numbers_below_one(models: int, k: int) -> None:
    with pytest.raises(ValueError, match="models and k should be at least 1"):
        TopK(models, k)


def test_another_number_of_models() -> None:
    with pytest.raises(ValueError, match=r"responses should be \[B, 3\], one column per model, got \[4, 2\]"):
        TopK(3, 1).add(np.zeros((4, 2), np.float32))


@pytest.mark.parametrize("lowest", [False, True])
def test_top_images_of_a_bank(small_bank: cl.ModelBank, rng: np.random.Generator, lowest: bool) -> None:
    images = rng.integers(0, 256, size=(20, 17, 13, 3), dtype=np.uint8)
    found = top_images((images[i : i + 6] for i in range(0, 20, 6)), small_bank, 4, lowest=lowest, backend="reference")
    positions, values = expected(cl.responses(images, small_bank, backend="reference"), 4, lowest)
    assert np.array_equal(found.positions, positions)
    assert np.array_equal(found.responses, values)
