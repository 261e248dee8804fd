"""The native format: bit-exact, lazy, verified, versioned, written whole or not at all."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_formats import differences, random_weights, v4_data
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cortexloop import io
from cortexloop.io.native import FORMAT


def edit(path: Path, tensors=None, **metadata: str) -> None:
    """Rewrite a native file with other metadata or tensors."""
    with safe_open(path, framework="numpy") as file:
        old = file.metadata()
    save_file({**load_file(path), **(tensors or {})}, path, {**old, **metadata})


@st.composite
def architectures(draw):
    depth = draw(st.integers(1, 6))
    each = st.lists(st.integers(1, 9), min_size=depth, max_size=depth)
    return random_weights(
        draw(st.text(min_size=1, max_size=20).filter(lambda t: t.isprintable())),
        draw(each),
        draw(st.lists(st.sampled_from((1, 3, 5, 7)), min_size=depth, max_size=depth)),
        draw(st.lists(st.sampled_from((1, 2)), min_size=depth, max_size=depth)),
        (draw(st.integers(1, 40)), draw(st.integers(1, 40))),
        draw(st.sampled_from((np.float32, np.float64))),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from((1e-3, 1e-5, 0.1, 3.3e-4))),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(architectures(), min_size=1, max_size=4, unique_by=lambda w: w.name), st.randoms())
def test_any_bank_round_trips_bit_for_bit(models, random):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.safetensors"
        io.save_models(path, models)
        loaded = io.load_models(path)
        assert [differences(a, b) for a, b in zip(loaded, models, strict=True)] == [[]] * len(models)
        chosen = random.choice(models)
        assert differences(io.load_models(path, names=[chosen.name])[0], chosen) == []


def test_special_values_and_layouts_keep_their_bits(tmp_path):
    w = random_weights("m")
    readout = np.asfortranarray(w.readout)
    readout[0, 0, 0], readout[0, 0, 1] = -0.0, 1e-42  # negative zero and a denormal number
    w = replace(w, readout=readout, readout_bias=-0.0, image_mean=(1 / 3, 0.1, -2.5))
    io.save_models(tmp_path / "m.safetensors", [w])
    (loaded,) = io.load_models(tmp_path / "m.safetensors")
    assert differences(loaded, replace(w, readout=np.ascontiguousarray(readout))) == []


def test_the_file_is_as_documented(tmp_path):
    w = random_weights("a/b", (2, 3), (5, 3), (1, 2), (8, 6))
    io.save_models(tmp_path / "m.safetensors", [w])
    tensors = load_file(tmp_path / "m.safetensors")  # readable by the safetensors library alone
    assert tensors["a/b/layer0/kernel"].shape == (5, 5, 3, 2)
    assert tensors["a/b/layer1/depthwise"].shape == (3, 3, 2)
    assert tensors["a/b/layer1/pointwise"].shape == (2, 3)
    assert tensors["a/b/readout/kernel"].shape == (4, 3, 3)
    assert tensors["a/b/readout/bias"].dtype == np.float64
    assert len(tensors) == 6 + 7 + 2
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == FORMAT
    assert metadata["version"] == "1"
    (entry,) = json.loads(metadata["models"])
    assert entry.pop("sha256")
    assert entry == {
        "name": "a/b",
        "height": 8,
        "width": 6,
        "image_mean": [116.222, 109.270, 100.381],
        "strides": [1, 2],
        "epsilons": [1e-3, 1e-3],
    }


def test_saving_refuses_what_it_could_not_give_back(tmp_path):
    path = tmp_path / "m.safetensors"
    w = random_weights("m")
    for models, message in [
        ([], "no model to save"),
        ([w, w], "two models are named 'm'"),
        ([replace(w, name="")], "needs a name"),
        ([replace(w, name="\udc80")], "UTF-8"),
        ([replace(w, readout=w.readout.astype(np.float16))], "float32 or float64"),
        ([replace(w, readout_bias=float("nan"))], "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            io.save_models(path, models)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="does not exist"):
        io.save_models(tmp_path / "none" / "m.safetensors", [w])


def test_a_failing_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    io.save_models(path, [random_weights("old")])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="two models"):
        io.save_models(path, [random_weights("new"), random_weights("new")])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_model_is_named_and_the_others_still_load(tmp_path):
    path = tmp_path / "m.safetensors"
    a, b = random_weights("a", seed=1), random_weights("b", seed=2)
    io.save_models(path, [a, b])
    tensor = load_file(path)["b/layer1/pointwise"].copy()
    tensor.view(np.uint32)[0, 0] ^= 1  # one bit
    edit(path, {"b/layer1/pointwise": tensor})
    assert differences(io.load_models(path, names=["a"])[0], a) == []
    with pytest.raises(ValueError, match=r"m\.safetensors' cannot be read: model 'b' is damaged: its checksum differs"):
        io.load_models(path)


def test_damaged_descriptions_are_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    io.save_models(path, [random_weights("m")])
    with safe_open(path, framework="numpy") as file:
        (entry,) = json.loads(file.metadata()["models"])
    good = path.read_bytes()
    for change, message in [
        ({"strides": [1, 2, 2, 1, 2]}, "checksum differs"),
        ({"epsilons": [1e-3] * 4 + [1e-5]}, "checksum differs"),
        ({"image_mean": [1.0, 2.0, 3.0]}, "checksum differs"),
        ({"height": 111}, "checksum differs"),
        ({"strides": [1, 2, 2, 1]}, "list of models is damaged"),
        ({"name": ""}, "list of models is damaged"),
        ({"name": "other"}, "checksum differs"),
        ({"sha256": 3}, "list of models is damaged"),
        ({"extra": 3}, "list of models is damaged"),
        ({"epsilons": [float("nan")] * 5}, "checksum differs"),
    ]:
        path.write_bytes(good)
        edit(path, models=json.dumps([{**entry, **change}]))
        with pytest.raises(ValueError, match=message):
            io.load_models(path)
    for models, message in [
        ("[]", "empty or damaged"),
        ("{", "list of models is damaged"),
        ("[" * 100_000, "list of models is damaged"),
        (json.dumps([entry, entry]), "list of models is damaged"),
    ]:
        path.write_bytes(good)
        edit(path, models=models)
        with pytest.raises(ValueError, match=message):
            io.load_models(path)


def test_versions_and_other_formats(tmp_path):
    path = tmp_path / "m.safetensors"
    io.save_models(path, [random_weights("m")])
    edit(path, version="2")
    with pytest.raises(ValueError, match="has format version 2, this cortexloop reads up to 1; upgrade"):
        io.load_models(path)
    edit(path, version="one")
    with pytest.raises(ValueError, match="version is damaged"):
        io.load_models(path)
    edit(path, version="1", format="other")
    with pytest.raises(ValueError, match=f"not of the format {FORMAT}"):
        io.load_models(path)
    save_file({"x": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match=f"not of the format {FORMAT}"):
        io.load_models(path)


def test_opening_reads_the_header_only(tmp_path):
    path = tmp_path / "m.safetensors"
    io.save_models(path, [random_weights("a"), random_weights("b")])
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = bytes(len(data) - start)  # every number lost
    path.write_bytes(data)
    with io.open_models(path) as files:
        assert files.names == ("a", "b")
        with pytest.raises(ValueError, match="model 'a' is damaged"):
            files.read("a")


def test_published_models_round_trip(tmp_path):
    models = io.load_models(v4_data() / "compact_models.npz")
    io.save_models(tmp_path / "bank.safetensors", models)
    loaded = io.load_models(tmp_path / "bank.safetensors")
    assert [differences(a, b) for a, b in zip(loaded, models, strict=True)] == [[]] * len(models)
