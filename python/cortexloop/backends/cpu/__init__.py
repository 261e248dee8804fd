"""The C++ kernels, compiled once per instruction set."""

from __future__ import annotations

import torch

from cortexloop import _native
from cortexloop.backends.cpu.bank import BankOperators
from cortexloop.backends.cpu.evolution import CodeOperators
from cortexloop.backends.registry import Problem


class CpuBackend(BankOperators, CodeOperators):
    """All operators on the CPU."""

    name = "cpu"

    def unsupported(self, problem: Problem) -> str | None:
        reason = _native.unavailable()
        if reason or problem.op != "sample_codes":
            return reason or self.bank_unsupported(problem)
        if problem.device != "cpu":
            return f"the C++ kernels work in host memory, the codes are on {problem.device}"
        if problem.dtype != torch.float32:
            return f"the C++ kernels take float32 codes, these are {str(problem.dtype).removeprefix('torch.')}"
        return None

    def note(self, problem: Problem) -> str | None:
        if problem.op == "sample_codes":
            return f"instruction set {_native.isa()}"
        return self.bank_note(problem)


BACKEND = CpuBackend()
