from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from cortexloop.io import load_responses, response_keys

DATA = Path(os.environ.get("CORTEXLOOP_V4_DATA", Path(__file__).parents[3] / "shared" / "data" / "v4_compact"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the V4 data pack is not here (set CORTEXLOOP_V4_DATA)")

VALUES = np.array([[1.0, 2.0, np.nan], [4.0, 5.0, 6.0]])
RAW = np.array([[[1, 3], [2, np.nan], [np.nan, np.nan]], [[4, 4], [5, 5], [6, 6]]], dtype=np.float32)
AVERAGED = np.array([[2.0, 2.0, np.nan], [4.0, 5.0, 6.0]])


def test_npz_with_averages_and_repeats(tmp_path):
    path = tmp_path / "r.npz"
    np.savez(path, **{"repeat_averaged/a": VALUES, "raw/a": RAW, "raw/b": RAW})
    assert response_keys(path) == ("a", "b")
    a = load_responses(path, "a")
    np.testing.assert_array_equal(a.values, VALUES)
    np.testing.assert_array_equal(a.raw, RAW)
    assert a.neurons == ("neuron0", "neuron1")
    b = load_responses(path, "b")
    np.testing.assert_array_equal(b.values, AVERAGED)
    with pytest.raises(ValueError, match="contains the recordings a, b: choose one"):
        load_responses(path)
    with pytest.raises(ValueError, match="no recording 'c'; it has a, b"):
        load_responses(path, "c")


def test_npy_of_either_shape(tmp_path):
    np.save(tmp_path / "two.npy", VALUES)
    two = load_responses(tmp_path / "two.npy")
    np.testing.assert_array_equal(two.values, VALUES)
    assert two.raw is None
    assert two.key == "two"
    np.save(tmp_path / "three.npy", RAW)
    three = load_responses(tmp_path / "three.npy")
    np.testing.assert_array_equal(three.values, AVERAGED)
    np.testing.assert_array_equal(three.raw, RAW)


@pytest.mark.parametrize("names", [True, False])
def test_csv_with_and_without_image_names(tmp_path, names):
    lines = ["n1,n2", "1,4", "2.0,5", ",6"]
    if names:
        lines = [f"{first},{line}" for first, line in zip(("image", "im1", "im2", "im3"), lines, strict=True)]
    (tmp_path / "r.csv").write_text("\n".join(lines))
    got = load_responses(tmp_path / "r.csv")
    np.testing.assert_array_equal(got.values, VALUES)
    assert got.neurons == ("n1", "n2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n3", "line 3 should have 2 cells"),
        ("a,b\n1,2\n3,x", "line 3, column 'b': expected a number, got 'x'"),
        ("a,b", "got 1 rows"),
        ("a,b\n,\n", "nothing but NaN"),
    ],
)
def test_unsuitable_csv(tmp_path, text, message):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_responses(tmp_path / "r.csv")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), r"shape \[neurons, images\] or .*, got \[3\]"),
        (np.zeros((0, 3)), r"got \[0, 3\]"),
        (np.full((2, 3), np.nan), "nothing but NaN"),
        (np.full((2, 3), np.inf), "infinity"),
        (np.array([["a"]]), "should hold real numbers"),
        (np.array([{}]), "no readable .npy file"),
    ],
    ids=["vector", "empty", "nan", "infinity", "text", "objects"],
)
def test_unsuitable_arrays(tmp_path, array, message):
    np.save(tmp_path / "r.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        load_responses(tmp_path / "r.npy")


def test_averages_and_repeats_that_do_not_match(tmp_path):
    np.savez(tmp_path / "r.npz", **{"repeat_averaged/a": VALUES[:1], "raw/a": RAW})
    with pytest.raises(ValueError, match="do not match"):
        load_responses(tmp_path / "r.npz")


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_responses(tmp_path / "nowhere.npz")
    for name in ("r.npz", "r.npy"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and then nothing")
        with pytest.raises(ValueError, match="no readable"):
            load_responses(tmp_path / name)
    (tmp_path / "r.mat").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected \.npz, \.npy or \.csv"):
        load_responses(tmp_path / "r.mat")
    (tmp_path / "r.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"no readable \.csv"):
        load_responses(tmp_path / "r.csv")
    with pytest.raises(ValueError, match="takes no key"):
        load_responses(tmp_path / "r.csv", "a")


def test_truncated_and_flipped_files_raise_value_error(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "r.npz"
    np.savez_compressed(path, **{"repeat_averaged/a": rng.normal(size=(4, 30))})
    whole = path.read_bytes()
    for trial in range(100):
        data = bytearray(whole)
        if trial % 2:
            data = data[: rng.integers(len(data))]
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            load_responses(path)
        except ValueError as error:
            assert len(str(error)) > 10  # noqa: PT017 - a flipped time stamp of the archive harms nothing


@needs_data
def test_published_responses():
    path = DATA / "responses.npz"
    assert set(response_keys(path)) == {"190923", "201025", "210325", "201016"}
    assert load_responses(path, "190923").values.shape == (33, 1200)
    bashivan = load_responses(path, "210325")
    assert bashivan.raw.shape == (50, 640, 10)
    np.testing.assert_allclose(np.nanmean(bashivan.raw, axis=2), bashivan.values, atol=1e-6)
    assert load_responses(path, "201016").values.shape == (82, 600)
