"""Choosing a backend: order, reasons, warnings."""

from __future__ import annotations

import warnings

import pytest
import torch

import cortexloop as cl
from cortexloop import _native, ops
from cortexloop.backends import registry
from cortexloop.testing import Case, ModelShape, random_inputs


@pytest.fixture(autouse=True)
def _forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_warned", set())


def test_auto_takes_the_kernels(kernels: None, small_bank: cl.ModelBank) -> None:
    explanation = cl.explain(bank=small_bank)
    assert explanation.chosen == "cpu"
    assert explanation.reason("reference") is None
    assert "cpu" in str(explanation)
    assert _native.isa() in str(explanation)


def test_float64_goes_to_the_reference_with_one_warning(small_bank: cl.ModelBank) -> None:
    images = torch.zeros(1, 17, 13, 3, dtype=torch.float64)
    with pytest.warns(cl.BackendWarning, match=r"slower 'reference' backend.*'cpu'") as caught:
        result = cl.responses(images, small_bank)
    assert len(caught) == 1
    assert result.dtype == torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cl.responses(images, small_bank)  # said once, not at every call


def test_naming_a_backend_that_cannot_run_raises_its_reason(kernels: None, small_bank: cl.ModelBank) -> None:
    images = torch.zeros(1, 17, 13, 3, dtype=torch.float64)
    with pytest.raises(cl.BackendError, match=r"'cpu' backend cannot run bank_forward: .*float64"):
        cl.responses(images, small_bank, backend="cpu")


def test_a_bank_beyond_the_kernels_goes_to_the_reference_with_their_reason(kernels: None) -> None:
    deep = ModelShape((3,) * 17, (1,) * 17, (1,) * 17)
    inputs = random_inputs(Case("deep", 1, 4, 4, (deep,)))
    reason = cl.explain(bank=inputs.bank).reason("cpu")
    assert reason is not None
    with pytest.warns(cl.BackendWarning) as caught:
        got = cl.responses(inputs.images, inputs.bank)
    assert reason in str(caught[0].message)
    assert torch.equal(got, cl.responses(inputs.images, inputs.bank, backend="reference"))
    with pytest.raises(cl.BackendError) as raised:
        cl.responses(inputs.images, inputs.bank, backend="cpu")
    assert reason in str(raised.value)
    with pytest.warns(cl.BackendWarning):
        plan = _fresh_plan(inputs.bank)
    assert plan.backend == "reference"


def _fresh_plan(bank: cl.ModelBank) -> cl.Plan:
    registry._warned.clear()
    return cl.Plan(bank)


def test_without_the_compiled_module_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, small_bank: cl.ModelBank
) -> None:
    monkeypatch.setattr(_native, "unavailable", lambda: "no compiler here")
    monkeypatch.setattr(registry, "_first_supported", registry._first_supported.__wrapped__)
    images = torch.zeros(1, 17, 13, 3)
    with pytest.warns(cl.BackendWarning, match="no compiler here"):
        cl.responses(images, small_bank)
    with pytest.raises(cl.BackendError, match="no compiler here"):
        cl.responses(images, small_bank, backend="cpu")
    assert cl.explain().chosen == "reference"
    assert cl.explain().reason("cpu") == "no compiler here"


def test_other_devices_are_served_by_the_reference() -> None:
    explanation = cl.explain(device="meta")
    assert explanation.chosen == "reference"
    assert explanation.reason("cpu") == "the cpu backend does not serve this device"


def test_on_a_gpu_every_backend_says_why_not() -> None:
    explanation = cl.explain(device="cuda")
    assert [v.backend for v in explanation.verdicts] == ["cuda", "triton", "reference"]
    for verdict in explanation.verdicts:
        assert verdict.chosen or verdict.reason or verdict.backend == "reference"


def test_explain_of_a_named_backend() -> None:
    explanation = cl.explain(backend="reference")
    assert explanation.chosen == "reference"
    assert [v.chosen for v in explanation.verdicts] == [False, True]


@pytest.mark.parametrize("op", ["bank_forward", "bank_input_gradient"])
def test_explain_says_that_the_reference_runs_fast_exactly(op: str) -> None:
    note = cl.explain(op, precision="fast").verdicts[-1].note
    assert note is not None
    assert "exactly" in note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "sepconv"}, "op should be one of 'bank_forward', .*'lasso_path', got 'sepconv'"),
        ({"backend": "gpu"}, "backend should be one of 'auto', 'cpu', 'cuda', 'triton', 'reference', got 'gpu'"),
    ],
)
def test_explain_refuses_unknown_names(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cl.explain(**arguments)


def test_use_backend_governs_auto_and_nests(small_bank: cl.ModelBank) -> None:
    with cl.use_backend("reference"):
        assert cl.explain(bank=small_bank).chosen == "reference"
        assert cl.Plan(small_bank).backend == "reference"
        with cl.use_backend("auto"):
            assert cl.explain(bank=small_bank).chosen == ops.explain(registry.Problem("bank_forward")).chosen
        assert cl.explain(bank=small_bank).chosen == "reference"
    with pytest.raises(ValueError, match="got 'gpu'"), cl.use_backend("gpu"):
        pass


def test_a_table_is_checked() -> None:
    with pytest.raises(TypeError, match=r"table should be torch.int64"):
        ops.bank_shape(torch.zeros(2, 20))
    with pytest.raises(ValueError, match=r"table should be \[N, 6 \+ 16 \* layers\]"):
        ops.bank_shape(torch.zeros(2, 20, dtype=torch.int64))
