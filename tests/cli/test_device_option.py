"""`--device`: what runs where, told before any work is done; GPUs are pretended."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cortexloop as cl
from cortexloop import ops
from cortexloop.cli.console import BadInputError
from cortexloop.cli.inputs import settle_device, where_it_runs


class Bank:
    """A bank that can be sent anywhere."""

    def __init__(self, bank: cl.ModelBank, device: str = "cpu") -> None:
        self.bank, self.device = bank, torch.device(device)
        self.table = bank.table

    def to(self, device: torch.device) -> Bank:
        return Bank(self.bank, str(device))


@pytest.fixture
def bank(small_bank: cl.ModelBank) -> Any:
    return Bank(small_bank)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")


def settle(bank: Any, device: str, backend: str = "auto") -> Any:
    return settle_device(bank, device, backend=backend, precision="exact", dtype="uint8")


def verdicts(monkeypatch: pytest.MonkeyPatch, chosen: str) -> list[ops.Problem]:
    """Let the backends of a GPU say who runs; returns the problems that they are asked about."""
    asked: list[ops.Problem] = []

    def explain(problem: ops.Problem) -> ops.Explanation:
        from cortexloop.backends.registry import Verdict

        asked.append(problem)
        reasons = {"cuda": "built without CUDA", "triton": "no triton here", "reference": None}
        return ops.Explanation(
            problem.op,
            tuple(
                Verdict(name, name == chosen, None if name == chosen else reason, None)
                for name, reason in reasons.items()
            ),
        )

    monkeypatch.setattr(ops, "explain", explain)
    return asked


def test_auto_takes_a_gpu_whose_kernels_take_the_bank(
    bank: Any, two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = verdicts(monkeypatch, "triton")
    there = settle(bank, "auto")
    assert there.device == torch.device("cuda", 0)
    assert (asked[0].device, asked[0].index, asked[0].dtype) == ("cuda", 0, torch.uint8)
    assert asked[0].bank == ops.bank_shape(bank.table)
    assert where_it_runs(there, 2) == "GPU number 0"


def test_auto_says_why_a_gpu_is_not_used(
    bank: Any, two_gpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts(monkeypatch, "reference")
    assert settle(bank, "auto") is bank
    assert capsys.readouterr().err == "the GPU is not used (cuda: built without CUDA; triton: no triton here)\n"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_of_the_processor_stay_there(bank: Any, two_gpus: None, backend: str) -> None:
    assert settle(bank, "auto", backend) is bank


def test_without_a_gpu_auto_is_the_processor(bank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert settle(bank, "auto") is bank
    assert settle(bank, "cpu") is bank
    assert (where_it_runs(bank, 1), where_it_runs(bank, 4)) == ("1 thread", "4 threads")


def test_a_named_gpu_is_taken(bank: Any, two_gpus: None) -> None:
    assert settle(bank, "cuda").device == torch.device("cuda", 0)
    assert settle(bank, "cuda:1").device == torch.device("cuda", 1)
    with pytest.raises(BadInputError, match=r"--device cuda:2: torch .* sees cuda:0, cuda:1 here"):
        settle(bank, "cuda:2")


def test_devices_that_are_not_there(bank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BadInputError, match=r"--device cuda: torch .* sees no GPU here"):
        settle(bank, "cuda")
    for name in ("gpu", "cuda:", "cuda:-1", "CPU"):
        with pytest.raises(BadInputError, match="--device should be auto, cpu, cuda or a numbered one"):
            settle(bank, name)
