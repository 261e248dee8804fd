"""The reader of shared compact models."""

from __future__ import annotations

import random

import numpy as np
import pytest
from model_formats import keras_tensors, random_weights, v4_data

from cortexloop import io


def write_shared(path, *names: str, neurons: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for name in names:
        own = dict(keras_tensors(random_weights("m")))
        for key in ("readout/kernel", "readout/bias"):
            del own[key]
        own["mixing/kernel"] = rng.standard_normal((1, 1, 3, neurons), np.float32)
        own["mixing/bias"] = rng.standard_normal(neurons, np.float32)
        own["spatial_pool/depthwise_kernel"] = rng.standard_normal((28, 28, neurons, 1), np.float32)
        own["spatial_pool/bias"] = rng.standard_normal(neurons, np.float32)
        tensors.update({f"{name}/{key}": value for key, value in own.items()})
    np.savez_compressed(path, **tensors)
    return tensors


def test_all_tensors_arrive(tmp_path):
    tensors = write_shared(tmp_path / "s.npz", "from_x/filters4", "linear_from_x/filters4")
    plain, linear = io.load_shared(tmp_path / "s.npz")
    assert (plain.name, plain.relu, plain.neurons) == ("from_x/filters4", True, 4)
    assert (linear.name, linear.relu) == ("linear_from_x/filters4", False)
    np.testing.assert_array_equal(plain.mixing, tensors["from_x/filters4/mixing/kernel"][0, 0])
    np.testing.assert_array_equal(plain.mixing_bias, tensors["from_x/filters4/mixing/bias"])
    np.testing.assert_array_equal(plain.spatial, tensors["from_x/filters4/spatial_pool/depthwise_kernel"][..., 0])
    np.testing.assert_array_equal(plain.spatial_bias, tensors["from_x/filters4/spatial_pool/bias"])
    np.testing.assert_array_equal(plain.layers[3].variance, tensors["from_x/filters4/layer3/moving_variance"])
    assert [layer.stride for layer in plain.layers] == [1, 2, 2, 1, 1]
    assert [w.name for w in io.load_shared(tmp_path / "s.npz", names=["linear_from_x/filters4"])] == [linear.name]


def test_what_cannot_be_loaded_is_said(tmp_path):
    tensors = write_shared(tmp_path / "s.npz", "a/b")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        io.load_shared(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="should be a file"):
        io.load_shared(tmp_path)
    with pytest.raises(ValueError, match="no model 'c'"):
        io.load_shared(tmp_path / "s.npz", names=["c"])
    with pytest.raises(ValueError, match="5 layers; give a stride for each"):
        io.load_shared(tmp_path / "s.npz", strides=(1, 2))
    with pytest.raises(ValueError, match="readout should be"):
        io.load_shared(tmp_path / "s.npz", strides=(1, 2, 1, 1, 1))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="holds no shared compact model"):
        io.load_shared(tmp_path / "other.npz")
    for key, value, message in [
        ("a/b/mixing/bias", np.zeros(5, np.float32), r"mixing should be \(3, 5\)"),
        ("a/b/spatial_pool/bias", np.full(4, np.inf, np.float32), "finite"),
        ("a/b/mixing/kernel", np.zeros((3, 4), np.float32), "4 axes"),
        ("a/b/mixing/bias", np.zeros((), np.float32), "1 dimensions"),
        ("a/b/layer4/bias", np.zeros((), np.float32), "layer 4|mixing should be"),
        ("a/b/layer2/gamma", np.zeros(7, np.float32), "layer 2 gamma should be"),
    ]:
        np.savez(tmp_path / "broken.npz", **{**tensors, key: value})
        with pytest.raises(ValueError, match=message):
            io.load_shared(tmp_path / "broken.npz")


def test_damaged_packs_raise_value_errors_only(tmp_path):
    write_shared(tmp_path / "s.npz", "a/b")
    data = (tmp_path / "s.npz").read_bytes()
    path = tmp_path / "damaged.npz"
    read = 0
    for i in range(200):
        rng = random.Random(i)
        out = bytearray(data)
        if i % 3 == 0:
            out = out[: rng.randrange(len(out))]
        else:
            for place in (rng.randrange(len(out)), len(out) - 1 - rng.randrange(4000)):
                out[place] ^= 1 << rng.randrange(8)
        path.write_bytes(out)
        try:
            io.load_shared(path)
            read += 1
        except ValueError as error:
            message = str(error)
        else:
            continue
        assert message.startswith(f"{str(path)!r} cannot be read: ")
    assert read < 200


def test_published_pack():
    models = io.load_shared(v4_data() / "shared_compact_models.npz")
    assert [(w.name, w.relu, w.neurons) for w in models] == [
        ("from_ensemble_model/filters35", True, 219),
        ("from_V4data_direct_fit/filters35", True, 219),
        ("linear_from_ensemble_model/filters35", False, 219),
    ]
