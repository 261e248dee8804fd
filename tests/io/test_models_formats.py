"""Every reader of model files against files written here by other libraries, and against the published ones."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from model_formats import (
    ARRAYS,
    WRITERS,
    differences,
    keras_tensors,
    pt_state,
    random_weights,
    v4_data,
    write_h5,
    write_keras,
    write_npy,
    write_npz,
    write_pt,
    write_weights_h5,
)

from cortexloop import io
from cortexloop.io.hdf5 import Hdf5File

EXACT = [suffix for suffix in WRITERS if suffix != ".pt"]
PUBLISHED = {
    "model_weights_npy": ".npy",
    "model_weights_h5": ".weights.h5",
    "models_keras": ".keras",
    "models_h5": ".h5",
    "models_torch": ".pt",
}


@pytest.mark.parametrize("suffix", EXACT)
def test_every_format_gives_the_written_bits(tmp_path, suffix):
    weights = random_weights("neuron3")
    WRITERS[suffix](tmp_path / f"neuron3{suffix}", weights)
    (loaded,) = io.load_models(tmp_path / f"neuron3{suffix}")
    assert differences(loaded, weights) == []


@pytest.mark.parametrize("suffix", EXACT)
def test_float64_and_other_depths_survive(tmp_path, suffix):
    weights = random_weights("m", (2, 3, 2), (3, 1, 7), (2, 1, 2), (21, 34), np.float64)
    WRITERS[suffix](tmp_path / f"m{suffix}", weights)
    given = {} if suffix in (".keras", ".h5") else {"strides": (2, 1, 2), "input_size": (21, 34)}
    (loaded,) = io.load_models(str(tmp_path / f"m{suffix}"), **given)
    assert differences(loaded, weights) == []


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_model_of_one_layer(tmp_path, suffix):
    weights = random_weights("m", (2,), (3,), (1,))
    WRITERS[suffix](tmp_path / f"m{suffix}", weights)
    (loaded,) = io.load_models(tmp_path / f"m{suffix}")  # stride deduced: the readout covers the whole image
    assert differences(loaded, weights) == []


def test_arrays_are_writable_native_and_contiguous(tmp_path):
    for suffix, write in WRITERS.items():
        write(tmp_path / f"m{suffix}", random_weights("m"))
        (loaded,) = io.load_models(tmp_path / f"m{suffix}")
        arrays = [loaded.readout, *(getattr(layer, key) for layer in loaded.layers for key in ARRAYS)]
        for array in arrays:
            assert array is None or (array.flags.writeable and array.dtype.isnative and array.flags.c_contiguous), (
                suffix
            )


def test_pt_gives_the_keras_model_up_to_the_lost_digits_of_the_variance(tmp_path):
    weights = random_weights("m", (8, 9, 7, 6, 5))
    write_pt(tmp_path / "m.pt", weights)
    (loaded,) = io.load_models(tmp_path / "m.pt")
    assert {what.split()[1] for what in differences(loaded, weights)} <= {"variance"}
    assert loaded.layers[0].variance.tobytes() == weights.layers[0].variance.tobytes()
    for got, expected in zip(loaded.layers[1:], weights.layers[1:], strict=True):
        total = expected.variance + np.float32(1e-3)  # what the file holds
        error = np.abs(got.variance.astype(np.float64) - expected.variance)
        assert np.all(error <= np.spacing(total) / 2)
        lossless = np.spacing(total) <= np.spacing(expected.variance)
        assert lossless.any()
        np.testing.assert_array_equal(got.variance[lossless], expected.variance[lossless])


def test_pt_of_true_doubles_stays_double(tmp_path):
    weights = random_weights("m", dtype=np.float64)
    write_pt(tmp_path / "m.pt", weights)
    (loaded,) = io.load_models(tmp_path / "m.pt")
    assert loaded.readout.dtype == np.float64
    for got, expected in zip(loaded.layers, weights.layers, strict=True):
        np.testing.assert_allclose(got.variance, expected.variance, rtol=0, atol=2e-16 * 20)


def test_pt_reads_strided_tensors_parameters_and_float32(tmp_path):
    weights = random_weights("m", (4, 3), (5, 3), (1, 2))
    state = pt_state(weights)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    key = "layers.layer0_conv.weight"
    state[key] = torch.nn.Parameter(state[key].permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1))
    torch.save(state, tmp_path / "m.pt")
    (loaded,) = io.load_models(tmp_path / "m.pt", strides=(1, 2))
    assert set(differences(loaded, weights)) <= {"layer1 variance"}


def test_pt_of_a_module_with_metadata(tmp_path):
    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleDict(
                {
                    "layer0_conv": torch.nn.Conv2d(3, 2, 3),
                    "layer0_bn": torch.nn.BatchNorm2d(2),
                    "Beta": torch.nn.Linear(2 * 112 * 112, 1),
                }
            )

    torch.manual_seed(0)
    holder = Holder()
    torch.save(holder.state_dict(), tmp_path / "m.pt")
    (loaded,) = io.load_models(tmp_path / "m.pt")
    assert loaded.filters == (2,)
    expected = holder.layers["layer0_conv"].weight.detach().numpy()
    np.testing.assert_array_equal(loaded.layers[0].kernel.transpose(3, 2, 0, 1), expected)


def test_pt_below_the_shifted_variance_is_refused(tmp_path):
    state = pt_state(random_weights("m"))
    state["layers.layer2_bn.running_var"] = torch.full((3,), 5e-4, dtype=torch.float64)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt.*layer2/moving_variance is below 0\.001"):
        io.load_models(tmp_path / "m.pt")


def test_pt_with_an_unknown_tensor_is_refused(tmp_path):
    state = pt_state(random_weights("m"))
    state["head.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="not named as in the published"):
        io.load_models(tmp_path / "m.pt")


def test_npy_pickled_by_every_protocol_of_numpy(tmp_path):
    # NumPy 1 pickled under numpy.core, NumPy 2 under numpy._core.
    weights = random_weights("m")
    write_npy(tmp_path / "m.npy", weights)
    data = (tmp_path / "m.npy").read_bytes()
    assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
    for module in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        old = b"numpy._core.multiarray" if b"numpy._core.multiarray" in data else b"numpy.core.multiarray"
        shift = len(module) - len(old)
        place = data.index(old)
        changed = data[: place - 1] + bytes([data[place - 1] + shift]) + data[place:].replace(old, module)
        (tmp_path / "m.npy").write_bytes(changed)
        assert differences(io.load_models(tmp_path / "m.npy")[0], weights) == []


def test_pack_reads_only_what_is_asked_for(tmp_path):
    models = [random_weights(f"s/neuron{i}", seed=i) for i in range(4)]
    write_npz(tmp_path / "pack.npz", *models)
    loaded = io.load_models(tmp_path / "pack.npz", names=["s/neuron3", "s/neuron1"])
    assert [w.name for w in loaded] == ["s/neuron3", "s/neuron1"]
    assert differences(loaded[0], models[3]) == []
    assert differences(loaded[1], models[1]) == []
    with io.open_models(tmp_path / "pack.npz") as files:
        assert files.names == tuple(f"s/neuron{i}" for i in range(4))
        assert differences(files.read("s/neuron2"), models[2]) == []


def test_pack_model_without_a_folder_in_its_name(tmp_path):
    write_npz(tmp_path / "p.npz", random_weights("a"), random_weights("a/b", seed=1))
    with pytest.raises(ValueError, match="not part of a compact model"):
        io.load_models(tmp_path / "p.npz", names=["a"])
    assert io.load_models(tmp_path / "p.npz", names=["a/b"])[0].name == "a/b"


def test_folder_in_natural_order_and_by_name(tmp_path):
    for i in (10, 2, 1):
        write_npy(tmp_path / f"compact_model_neuron{i}.npy", random_weights(seed=i))
    write_weights_h5(tmp_path / "compact_model_neuron3.weights.h5", random_weights(seed=3))
    (tmp_path / "notes.txt").write_text("not a model")
    (tmp_path / ".hidden.npy").write_text("not a model")
    (tmp_path / "inner").mkdir()
    np.savez(tmp_path / "responses.npz", counts=np.zeros(3))  # intact, but no models: passed over in a folder
    names = [w.name for w in io.load_models(tmp_path)]
    assert names == [f"compact_model_neuron{i}" for i in (1, 2, 3, 10)]
    (one,) = io.load_models(tmp_path, names=["compact_model_neuron3"])
    assert one.name == "compact_model_neuron3"


def test_list_of_files_keeps_its_order(tmp_path):
    write_npy(tmp_path / "a.npy", random_weights())
    write_pt(tmp_path / "b.pt", random_weights())
    loaded = io.load_models([tmp_path / "b.pt", str(tmp_path / "a.npy")])
    assert [w.name for w in loaded] == ["b", "a"]


def test_what_cannot_be_loaded_is_said_in_one_sentence(tmp_path):
    (tmp_path / "twice").mkdir()
    write_npy(tmp_path / "a.npy", random_weights())
    write_npy(tmp_path / "twice" / "a.npy", random_weights())
    write_pt(tmp_path / "twice" / "a.pt", random_weights())
    np.savez(tmp_path / "responses.npz", counts=np.zeros(3))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.h5").write_bytes(b"")
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "folder.npz").mkdir()
    np.save(tmp_path / "nums_filters.npy", np.arange(5))
    cases = [
        (tmp_path / "none.npz", FileNotFoundError, r"there is no file or folder '.*none\.npz'"),
        (tmp_path / "twice", ValueError, r"the model 'a' is in '.*a\.npy' and in '.*a\.pt'"),
        (tmp_path / "empty", ValueError, "holds no model file"),
        (tmp_path / "folder.npz", ValueError, "holds no model file"),
        (tmp_path / "empty.h5", ValueError, r"empty\.h5' cannot be read: the file is empty"),
        (tmp_path / "x.txt", ValueError, r"x\.txt' is of no known kind; model files end in \.safetensors"),
        (tmp_path / "responses.npz", ValueError, r"responses\.npz' cannot be read: it holds no compact model"),
        (tmp_path / "nums_filters.npy", ValueError, "an array of numbers and no list of weights"),
        ([], ValueError, "the list of files holds no model file"),
        ([tmp_path / "empty"], ValueError, "is a folder; give one folder, or a list of files"),
    ]
    for source, kind, message in cases:
        with pytest.raises(kind, match=message):
            io.load_models(source)
    with pytest.raises(ValueError, match="there is no model 'b'; there are 1: 'a'"):
        io.load_models(tmp_path / "a.npy", names=["b"])
    with pytest.raises(ValueError, match="asked for twice"):
        io.load_models(tmp_path / "a.npy", names=["a", "a"])
    with pytest.raises(TypeError, match="list of model names"):
        io.load_models(tmp_path / "a.npy", names="a")


def test_strides_are_deduced_only_where_they_can_be(tmp_path):
    write_npy(tmp_path / "all2.npy", random_weights("all2", (2, 2), (3, 3), (2, 2)))
    assert [layer.stride for layer in io.load_models(tmp_path / "all2.npy")[0].layers] == [2, 2]
    write_npy(tmp_path / "mixed.npy", random_weights("mixed", (2, 2), (3, 3), (1, 2)))
    with pytest.raises(ValueError, match="does not tell the strides of its 2 layers; give strides"):
        io.load_models(tmp_path / "mixed.npy")
    loaded = io.load_models(tmp_path / "mixed.npy", strides=[2, 1])[0]
    assert [layer.stride for layer in loaded.layers] == [2, 1]
    with pytest.raises(ValueError, match=r"give a map of 28 x 28, but the readout has 3136"):
        io.load_models(tmp_path / "mixed.npy", strides=[2, 2])
    with pytest.raises(ValueError, match="strides should be 2 numbers"):
        io.load_models(tmp_path / "mixed.npy", strides=[1, 2, 3])
    write_npy(tmp_path / "other.npy", random_weights("other", size=(64, 48)))
    with pytest.raises(ValueError, match="no strides give the readout's 192 positions; give input_size"):
        io.load_models(tmp_path / "other.npy")
    assert io.load_models(tmp_path / "other.npy", input_size=(64, 48))[0].width == 48


def test_configured_files_refuse_contradicting_arguments(tmp_path):
    write_keras(tmp_path / "m.keras", random_weights("m"))
    assert io.load_models(tmp_path / "m.keras", strides=(1, 2, 2, 1, 1))
    with pytest.raises(ValueError, match="the file itself says"):
        io.load_models(tmp_path / "m.keras", strides=(2, 2, 1, 1, 1))


def test_configured_epsilon_is_kept(tmp_path):
    weights = random_weights("m", epsilon=3e-4)
    for suffix in (".keras", ".h5"):
        WRITERS[suffix](tmp_path / f"m{suffix}", weights)
        assert differences(io.load_models(tmp_path / f"m{suffix}")[0], weights) == []


def test_strides_written_as_floats_are_read(tmp_path, monkeypatch):
    import model_formats

    weights = random_weights("m")
    config = model_formats.keras_config(weights)
    config["config"]["layers"][4]["config"]["strides"] = [2.0, 2.0]
    monkeypatch.setattr(model_formats, "keras_config", lambda _: config)
    write_keras(tmp_path / "m.keras", weights)
    assert differences(io.load_models(tmp_path / "m.keras")[0], weights) == []


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        (1, "padding", "valid"),
        (1, "activation", "relu"),
        (1, "strides", [1, 2]),
        (1, "strides", [3, 3]),
        (4, "depth_multiplier", 2),
        (1, "dilation_rate", [2, 2]),
        (2, "scale", False),
        (2, "epsilon", -1.0),
        (3, "activation", "elu"),
        (0, "batch_shape", [None, None, None, 3]),
        (-1, "units", 2),
    ],
)
def test_other_keras_architectures_are_refused(tmp_path, monkeypatch, place, key, value):
    import model_formats

    config = model_formats.keras_config(random_weights("m"))
    config["config"]["layers"][place]["config"][key] = value
    monkeypatch.setattr(model_formats, "keras_config", lambda _: config)
    write_keras(tmp_path / "m.keras", random_weights("m"))
    with pytest.raises(ValueError, match=r"m\.keras' cannot be read: .*should"):
        io.load_models(tmp_path / "m.keras")


def test_invalid_numbers_and_shapes_name_the_model(tmp_path):
    weights = random_weights("m")
    broken = replace(weights, readout=np.full_like(weights.readout, np.nan))
    write_npy(tmp_path / "m.npy", broken)
    with pytest.raises(ValueError, match=r"m\.npy' cannot be read: model 'm': readout should be finite"):
        io.load_models(tmp_path / "m.npy")
    tensors = keras_tensors(weights)
    np.savez(tmp_path / "m.npz", **{f"m/{key}": value.astype(np.float16) for key, value in tensors})
    with pytest.raises(ValueError, match="should be float32 or float64, got float16"):
        io.load_models(tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", **{f"m/{key}": value for key, value in tensors if key != "layer2/gamma"})
    with pytest.raises(ValueError, match="'layer2/gamma' is missing"):
        io.load_models(tmp_path / "m.npz")


def test_hdf5_reader_agrees_with_h5py(tmp_path):
    path = tmp_path / "t.h5"
    with h5py.File(path, "w") as file:
        file.attrs["text"] = "µ" * 30_000
        file.attrs["empty"] = ""
        file.attrs["names"] = [b"abc", b"de"]
        file.attrs["number"] = 3.5
        for i in range(300):  # several levels of the group index
            file[f"group/{i}"] = np.arange(i % 5, dtype=np.float64)
        for code in ("f4", "f8", "i1", "u2", "i8"):
            file[f"types/{code}"] = np.arange(6, dtype=code).reshape(2, 3)
        file["scalar"] = np.float32(2.5)
    read = Hdf5File(path.read_bytes())
    assert read.attribute("", "text") == "µ" * 30_000
    assert read.attribute("", "empty") == ""
    assert read.attribute("", "names") == ["abc", "de"]
    assert read.attribute("", "none") is None
    assert len(read.group("group")) == 300
    with h5py.File(path) as file:
        for name in [*(f"group/{i}" for i in range(300)), *(f"types/{c}" for c in file["types"]), "scalar"]:
            got, expected = read.dataset(name), file[name][()]
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)


def test_hdf5_that_is_not_written_by_keras_is_refused(tmp_path):
    path = tmp_path / "t.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("packed", data=np.zeros(100), compression="gzip")
        file["text"] = "words"
        file["big_endian"] = np.arange(3, dtype=">f4")
        file.attrs["number"] = 1
    read = Hdf5File(path.read_bytes())
    with pytest.raises(ValueError, match="without compression"):
        read.dataset("packed")
    with pytest.raises(ValueError, match="should hold numbers"):
        read.dataset("text")
    with pytest.raises(ValueError, match="datatype"):
        read.dataset("big_endian")
    with pytest.raises(ValueError, match="should hold text"):
        read.attribute("", "number")
    with pytest.raises(ValueError, match="does not hold 'none'"):
        read.dataset("none")
    with h5py.File(path, "w", libver="latest") as file:
        file["layers/x"] = np.zeros(3)
    with pytest.raises(ValueError, match="superblock has version"):
        io.load_models(path)
    with h5py.File(path, "w") as file:
        file["something"] = np.zeros(3)
    with pytest.raises(ValueError, match="neither a Keras 3 weight file"):
        io.load_models(path)


def test_suffixes_of_hdf5_are_told_apart_by_content(tmp_path):
    weights = random_weights("m")
    write_h5(tmp_path / "m.weights.h5", weights)
    assert differences(io.load_models(tmp_path / "m.weights.h5")[0], weights) == []
    write_weights_h5(tmp_path / "m.h5", weights)
    assert differences(io.load_models(tmp_path / "m.h5")[0], weights) == []


# --- the published files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_files_are_the_models_of_the_pack(folder):
    data = v4_data()
    loaded = io.load_models(data / "published_formats" / folder)
    assert [w.name for w in loaded] == ["compact_model_190923_neuron0", "compact_model_201025_neuron2"]
    pack = io.load_models(data / "compact_models.npz", names=["190923/neuron0", "201025/neuron2"])
    for got, expected in zip(loaded, pack, strict=True):
        found = differences(replace(got, name=expected.name), expected)
        if PUBLISHED[folder] != ".pt":
            assert found == []
            continue
        assert {what.split()[1] for what in found} <= {"variance"}
        for x, y in zip(got.layers, expected.layers, strict=True):
            total = y.variance + np.float32(1e-3)
            assert np.all(np.abs(x.variance.astype(np.float64) - y.variance) <= np.spacing(total) / 2)


def test_the_whole_pack_and_its_folder():
    data = v4_data()
    loaded = io.load_models(data / "compact_models.npz")
    assert [w.name for w in loaded][:2] == ["190923/neuron0", "190923/neuron1"]
    assert len(loaded) == 33 + 89
    with np.load(data / "compact_models.npz") as arrays:
        for w in loaded:
            assert w.filters == tuple(arrays[f"{w.name}/nums_filters"])
    with io.open_models(data) as files:  # the folder: packs of images, responses and shared models are passed over
        assert files.names == tuple(w.name for w in loaded)
