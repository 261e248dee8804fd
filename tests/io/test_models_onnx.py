"""The ONNX graph against ONNX Runtime, an inference engine that shares no code with this package."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from model_formats import random_weights, v4_data
from onnx.reference import ReferenceEvaluator

from cortexloop import io
from cortexloop.models import CompactModel
from cortexloop.weights import IMAGE_MEAN

CASES = {
    "published shapes": {},
    "one layer": {"filters": (3,), "kernels": (7,), "strides": (2,), "size": (9, 14)},
    "odd and even sizes": {"filters": (2, 3, 4), "kernels": (1, 3, 7), "strides": (1, 2, 2), "size": (17, 22)},
    "double": {"filters": (2, 3), "kernels": (5, 5), "strides": (1, 2), "size": (16, 15), "dtype": np.float64},
}


def run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    if images.dtype == np.float64:  # ONNX Runtime has no convolution in double
        return ReferenceEvaluator(model).run(None, {"images": images})[0]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == ["responses"]
    return session.run(None, {"images": images})[0]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_graph_gives_the_responses_of_the_module(case, fold):
    weights = random_weights("m", **CASES[case])
    rng = np.random.default_rng(0)
    dtype = weights.readout.dtype
    images = rng.uniform(-116, 155, (3, weights.height, weights.width, 3)).astype(dtype)
    with torch.no_grad():
        expected = CompactModel.from_weights(weights).double()(torch.from_numpy(images).double()).numpy()
    got = run(io.onnx_model(weights, fold=fold), images)
    assert got.shape == (3,)
    assert got.dtype == dtype
    tolerance = 1e-11 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    for batch in (0, 1) if dtype == np.float32 else (1,):
        assert run(io.onnx_model(weights, fold=fold), images[:batch]).shape == (batch,)


def test_folding_removes_the_normalisation_nodes():
    weights = random_weights("m")
    kinds = [node.op_type for node in io.onnx_model(weights).graph.node]
    folded = [node.op_type for node in io.onnx_model(weights, fold=True).graph.node]
    assert kinds.count("BatchNormalization") == 5
    assert folded == [kind for kind in kinds if kind != "BatchNormalization"]


def test_the_file_carries_name_and_mean(tmp_path):
    io.export_onnx(random_weights("s/neuron1"), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    assert model.graph.name == "s/neuron1"
    assert {entry.key: entry.value for entry in model.metadata_props} == {"image_mean": "116.222 109.27 100.381"}
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "cortexloop\[onnx\]"'):
        io.export_onnx(random_weights("m"), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fold", [False, True])
def test_published_models_reach_their_reference_responses(fold):
    data = v4_data()
    (weights,) = io.load_models(data / "compact_models.npz", names=["201025/neuron2"])
    with np.load(data / "reference_predictions.npz") as reference:
        images = (reference["images_uint8"] - np.array(IMAGE_MEAN)).astype(np.float32)
        expected = reference["predictions/201025"][2]
    assert np.abs(run(io.onnx_model(weights, fold=fold), images) - expected).max() < 5e-6
