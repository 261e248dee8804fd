"""The host side of the Triton kernels, which needs neither Triton nor a GPU: layout, launches, float16, refusals."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from float16_model import float16_responses

import cortexloop as cl
from cortexloop.backends import triton as backend
from cortexloop.backends.registry import Problem
from cortexloop.backends.triton import plan as planning
from cortexloop.backends.triton.layout import Field, Head, Scale, lay_out, unsupported_table
from cortexloop.backends.triton.plan import BankPlan, blocking
from cortexloop.packing import LayerField, ModelField, layer_fields
from cortexloop.testing import CASES, Case, ModelShape, random_inputs
from cortexloop.weights import CompactWeights, LayerWeights

MIXED = CASES[11]


@pytest.mark.parametrize("columns", range(16, 1025, 16))
def test_blocks_cover_the_columns(columns: int) -> None:
    main, rest = blocking(columns)
    covered = main + rest if rest else -(-columns // main) * main
    assert columns <= covered < columns + 128
    assert all(n == 0 or (n >= 16 and n & (n - 1) == 0) for n in (main, rest))
    if columns in (16, 32, 48, 64, 80, 96, 128, 144, 160):
        assert covered == columns


@pytest.mark.parametrize("gradient", [False, True])
def test_maps_do_not_overlap(gradient: bool) -> None:
    """Every map of every model has its place, at a multiple of 16, and units of one image lie side by side."""
    table = random_inputs(MIXED).bank.table.numpy()
    layers, heads, sizes, extent = lay_out(table, gradient=gradient)
    assert extent <= random_inputs(MIXED).bank.weights.numel()
    starts = heads[:, Head.UNIT]
    assert starts.tolist() == [sum(sizes[:n]) for n in range(len(sizes))]
    for n, row in enumerate(table):
        taken = []
        for index, f in enumerate(layers[n, : row[ModelField.DEPTH]]):
            pixels = f[Field.OUT_HEIGHT] * f[Field.OUT_WIDTH]
            taken.append((f[Field.OUTPUT], pixels * f[Field.OUT_PADDED]))
            if gradient:
                taps = 3 * layer_fields(row, 0)[LayerField.KERNEL_SIZE] ** 2
                taken.append((f[Field.GRADIENT], pixels * (f[Field.IN_PADDED] if index else taps)))
        taken.sort()
        for (start, size), (following, _) in zip(taken, [*taken[1:], (sizes[n], 0)], strict=True):
            assert start % 16 == 0
            assert start + size <= following


def test_groups_fit_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are made of neighbours, follow from the bank alone, and one model may be larger than the workspace."""
    bank = random_inputs(MIXED).bank
    sizes = lay_out(bank.table.numpy(), gradient=False)[2]
    for workspace in (1, max(sizes), sum(sizes) - 16, 3 * sum(sizes) + 10_000):
        monkeypatch.setattr(planning, "WORKSPACE", workspace)
        program = BankPlan(bank.table).program(gradient=False, paired=False)
        models = [n for group in program.groups for n in group.readout.members.tolist()]
        assert models == list(range(len(bank)))
        for group in program.groups:
            assert group.stride == sum(sizes[n] for n in group.readout.members.tolist())
            assert group.stride <= workspace or group.readout.count == 1
    assert program.images_per_round == 2 or program.images_per_round == 3
    paired = BankPlan(bank.table).program(gradient=False, paired=True)
    assert [group.stride for group in paired.groups] == [max(sizes)]


def test_every_layer_of_every_model_is_launched_once() -> None:
    bank = random_inputs(MIXED).bank
    plan = BankPlan(bank.table)
    depths = plan.rows[:, ModelField.DEPTH].tolist()
    for paired in (False, True):
        program = plan.program(gradient=True, paired=paired)
        for kind in ("forward", "backward"):
            served = [
                (launch.layer, n)
                for group in program.groups
                for launch in getattr(group, kind)
                for n in (torch.nonzero(launch.members)[:, 0] if paired else launch.members).tolist()
            ]
            assert sorted(served) == sorted((layer, n) for n, depth in enumerate(depths) for layer in range(depth))
            layers = [layer for layer, _ in served]
            assert layers == sorted(layers, reverse=kind == "backward")


def test_plans_live_as_long_as_their_table() -> None:
    bank = random_inputs(CASES[0]).bank
    plan = planning.plan_of(bank.table)
    assert planning.plan_of(bank.table) is plan
    assert planning.plan_of(bank.table.clone()) is not plan


def edited(**changes: int) -> np.ndarray:
    """The table of a bank with two layers, changed in the second layer of its only model."""
    table = random_inputs(CASES[4]).bank.table.numpy().copy()
    start = len(ModelField) + len(LayerField)
    for name, value in changes.items():
        table[0, LayerField[name] + start if name in LayerField.__members__ else ModelField[name]] = value
    return table


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"KERNEL_SIZE": 9}, "layer 1 of model 0 has a kernel of size 9 and a stride of 2, the kernels take"),
        ({"STRIDE": 3}, "a stride of 3"),
        ({"IN_CHANNELS": 4}, "layer 1 of model 0 has 4 input and 7 output channels behind 3"),
        ({"OUT_CHANNELS": 0}, "0 output channels"),
        ({"OUT_HEIGHT": 5}, 'layer 1 of model 0 does not have "same" padding'),
        ({"PAD_LEFT": 5}, "padding"),
        ({"DEPTH": 0}, "model 0 has 0 layers, which its table row cannot hold"),
        ({"DEPTH": 3}, "model 0 has 3 layers"),
        ({"HEIGHT": 0}, "model 0 takes images of 0 x 7"),
        ({"HEIGHT": 1 << 15, "WIDTH": 1 << 15}, "images of 32768 x 32768 pixels are too large"),
        ({"OUT_CHANNELS": 1 << 29}, "layer 1 of model 0 has maps of 3 x 4 x 536870912 numbers, the kernels take fewer"),
    ],
)
def test_tables_that_the_kernels_do_not_take(changes: dict[str, int], reason: str) -> None:
    table = edited(**changes)
    assert reason in str(unsupported_table(table))
    with pytest.raises(ValueError, match="the Triton kernels cannot run this bank: "):
        BankPlan(torch.from_numpy(table))


def test_models_of_different_image_sizes_are_refused() -> None:
    tables = [random_inputs(case).bank.table.numpy() for case in (CASES[3], CASES[0])]
    table = np.concatenate(tables)
    assert unsupported_table(table) == "model 1 takes images of 1 x 1, the first model of 5 x 7"


def test_a_section_before_the_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="the table refers to section -5 of the weights"):
        BankPlan(torch.from_numpy(edited(BIAS=-5)))


def test_scales_are_powers_of_two_and_hold_the_maps() -> None:
    """The largest image of pixels, with every sign the weights could wish for, stays below float16's limit."""
    bank = random_inputs(CASES[12]).bank
    scales = BankPlan(bank.table).scales(bank.weights)
    assert torch.equal(scales.log2(), scales.log2().round())
    images = torch.where(random_inputs(CASES[12]).images > 0, 255.0, -255.0)
    activity = cl.activations(images, bank, 0)[0]
    assert (activity * scales[0, 0, Scale.MAP]).max() < 2**15


def test_scales_follow_the_weights() -> None:
    bank = random_inputs(CASES[4]).bank
    plan, weights = BankPlan(bank.table), bank.weights.clone()
    before = plan.scales(weights)
    assert plan.scales(weights) is before
    weights[16:] *= 1024
    assert not torch.equal(plan.scales(weights), before)


def model_of_scale(factor: float) -> CompactWeights:
    """Two layers whose maps are `factor` times as large as usual."""
    plain = random_inputs(Case("one", 1, 12, 9, (ModelShape((5, 4), (3, 5), (1, 2)),))).bank.models[0]
    first, second = plain.layers
    layers = (
        LayerWeights(**{**vars(first), "gamma": first.gamma * factor, "beta": first.beta * factor}),
        LayerWeights(
            **{**vars(second), "beta": second.beta * factor, "mean": second.mean * 0, "bias": second.bias * 0}
        ),
    )
    return CompactWeights("scaled", layers, plain.readout / np.float32(factor), 0.0, 12, 9)


@pytest.mark.parametrize("factor", [2.0**-20, 1.0, 2.0**20])
def test_float16_does_not_overflow_or_vanish(factor: float) -> None:
    bank = cl.ModelBank([model_of_scale(factor)])
    images = random_inputs(Case("images", 6, 12, 9, (ModelShape((1,), (1,), (1,)),))).images
    expected = cl.responses(images.double(), bank, backend="reference")
    got = float16_responses(images, bank)
    assert (got - expected).abs().max() < 4e-3 * expected.std()


def test_fast_precision_on_published_models(v4_data: Path) -> None:
    """Float16 at the kernels' places: r over natural images, median at least 0.99999, worst at least 0.9999."""
    bank = cl.ModelBank.load(v4_data / "compact_models.npz").select(slice(5, None, 20))
    with np.load(v4_data / "reference_predictions.npz") as golden:
        pixels = torch.from_numpy(golden["images_uint8"][::2])
    images = cl.recenter(pixels, bank.image_mean)
    expected = cl.responses(images.double(), bank, backend="reference").numpy()
    got = float16_responses(images, bank).double().numpy()
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(got.T, expected.T, strict=True)]
    assert np.median(r) >= 0.99999
    assert min(r) >= 0.9999


def test_triton_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    backend._device_reason.cache_clear()
    try:
        reason = backend.BACKEND.unsupported(Problem("bank_forward", "cuda"))
        assert reason == "Triton is not installed; pip install cortexloop[triton]"
    finally:
        backend._device_reason.cache_clear()


def test_codes_are_left_to_torch() -> None:
    reason = backend.BACKEND.unsupported(Problem("sample_codes", "cuda"))
    assert reason == "there is no Triton kernel for sample_codes"


@pytest.fixture
def installed() -> None:
    """Skip where Triton is not installed."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        pytest.skip("Triton is not installed; pip install cortexloop[triton]")


@pytest.fixture
def pretended_gpu(installed: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """torch says that there is a GPU, an old one unless told otherwise."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    reasons = backend._device_reason
    reasons.cache_clear()
    yield monkeypatch
    reasons.cache_clear()


def test_old_gpus_are_refused(pretended_gpu: pytest.MonkeyPatch) -> None:
    reason = backend.BACKEND.unsupported(Problem("bank_forward", "cuda"))
    assert reason == "the Triton kernels need compute capability 8.0 or newer, this GPU has 7.5"


def test_what_triton_misses_is_the_reason(pretended_gpu: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    class Broken:
        def get_current_target(self) -> None:
            raise RuntimeError("Failed to find C compiler.\nmore")

    pretended_gpu.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    pretended_gpu.setattr(driver, "_active", Broken())
    reason = backend.BACKEND.unsupported(Problem("bank_forward", "cuda"))
    assert reason == "Triton does not work here: Failed to find C compiler."


def test_a_cpu_is_refused_by_name(installed: None) -> None:
    """Outside of the interpreter; see test_triton_kernels.py for that."""
    bank = random_inputs(CASES[0]).bank
    with pytest.raises(cl.BackendError, match="the Triton kernels work in GPU memory, the images are on cpu"):
        cl.responses(random_inputs(CASES[0]).images, bank, backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_the_reason_says_so(installed: None) -> None:
    assert backend.BACKEND.unsupported(Problem("bank_forward", "cuda")) == f"torch {torch.__version__} sees no GPU"


def test_float64_is_refused(pretended_gpu: pytest.MonkeyPatch) -> None:
    pretended_gpu.setattr(backend, "_device_reason", lambda device, index: None)
    problem = Problem("bank_forward", "cuda", dtype=torch.float64)
    assert backend.BACKEND.unsupported(problem) == "the Triton kernels take uint8 and float32 images, these are float64"
