"""`functional.factorized_readout` and `point_readout`: kinds, copies, and one clear sentence for bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cortexloop.functional import factorized_readout, point_readout
from readout_problems import FACTORIZED, POINT, factorized, interpolated, point, weighted_factors

FACTORS, PLACES = factorized(FACTORIZED[0], exact=False)[0], point(POINT[0], exact=False)[0]


def test_numpy_in_numpy_out():
    arrays = [x.numpy() for x in FACTORS]
    got = factorized_readout(*arrays)
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, factorized_readout(*FACTORS).numpy())
    got = point_readout(*(x.numpy() for x in PLACES))
    np.testing.assert_array_equal(got, point_readout(*PLACES).numpy())


def test_equivalent_to_what_the_docstrings_say():
    doubles = [x.double() for x in FACTORS]
    torch.testing.assert_close(
        factorized_readout(*doubles, backend="reference"), torch.einsum("bchw,trhw,trc->bt", *doubles)
    )
    torch.testing.assert_close(factorized_readout(*doubles, backend="reference"), weighted_factors(*doubles))
    features, positions, vectors = (x.double() for x in PLACES)
    grid = positions.expand(len(features), -1, -1)
    for align_corners in (True, False):
        sampled = torch.nn.functional.grid_sample(features, grid[:, :, None], align_corners=align_corners)
        expected = torch.einsum("bct,tc->bt", sampled[..., 0], vectors)
        got = point_readout(features, positions, vectors, align_corners=align_corners, backend="reference")
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got, interpolated(features, positions, vectors, align_corners))


def test_arrays_that_are_not_contiguous_are_copied(engine: str):
    features, masks, vectors = FACTORS
    expected = factorized_readout(features, masks, vectors, backend=engine)
    leaf = features.permute(0, 2, 3, 1).contiguous().requires_grad_()
    got = factorized_readout(leaf.permute(0, 3, 1, 2), masks, vectors, backend=engine)
    assert torch.equal(got, expected)
    got.sum().backward()
    assert leaf.grad is not None
    wide = np.asfortranarray(masks.numpy())
    np.testing.assert_array_equal(factorized_readout(features.numpy(), wide, vectors.numpy(), backend=engine), expected)
    maps, positions, weights = PLACES
    last = maps.to(memory_format=torch.channels_last)
    assert torch.equal(point_readout(last, positions, weights, backend=engine), point_readout(*PLACES, backend=engine))


BAD: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (
        factorized_readout,
        {"features": [1.0]},
        TypeError,
        "features should be a NumPy array or a torch",
    ),
    (
        factorized_readout,
        {"masks": FACTORS[1].numpy()},
        TypeError,
        "masks should be of the kind of",
    ),
    (
        factorized_readout,
        {"masks": FACTORS[1].double()},
        TypeError,
        "masks should be float32 like the",
    ),
    (
        factorized_readout,
        {"features": FACTORS[0].half()},
        TypeError,
        "float32 or float64, got float16",
    ),
    (factorized_readout, {"features": FACTORS[0][0]}, ValueError, "add a batch axis"),
    (factorized_readout, {"masks": FACTORS[1][..., :2]}, ValueError, r"masks should be \[T, R, 5, 4\]"),
    (factorized_readout, {"vectors": FACTORS[2][:3]}, ValueError, r"vectors should be \[7, 1, 3\]"),
    (point_readout, {"vectors": PLACES[2][:, :2]}, ValueError, r"vectors should be \[T, 3\]"),
    (point_readout, {"positions": PLACES[1][None]}, ValueError, r"positions should be \[7, 2\], or \[2, 7, 2\]"),
]


@pytest.mark.parametrize(("function", "change", "error", "match"), BAD)
def test_bad_input_gets_one_sentence(
    function: Callable[..., Any], change: dict[str, Any], error: type[Exception], match: str
):
    second = "masks" if function is factorized_readout else "positions"
    inputs = FACTORS if function is factorized_readout else PLACES
    held: dict[str, Any] = {**dict(zip(("features", second, "vectors"), inputs, strict=True)), **change}
    with pytest.raises(error, match=match):
        function(**held)


def test_numpy_arrays_are_inspected():
    arrays = [x.numpy().copy() for x in FACTORS]
    arrays[1][0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="masks holds NaN or infinity"):
        factorized_readout(*arrays)
    with pytest.raises(TypeError, match="features should be float32 or float64, got int64"):
        factorized_readout(arrays[0].astype(int), *arrays[1:])
