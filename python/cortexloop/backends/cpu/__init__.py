"""The C++ kernels, compiled once per instruction set."""

from __future__ import annotations

from cortexloop import _native
from cortexloop.backends.cpu.bank import BankOperators
from cortexloop.backends.cpu.evolution import CodeOperators
from cortexloop.backends.cpu.moments import MomentOperators
from cortexloop.backends.registry import Problem


class CpuBackend(BankOperators, CodeOperators, MomentOperators):
    """All operators on the CPU."""

    name = "cpu"

    def unsupported(self, problem: Problem) -> str | None:
        reason = _native.unavailable()
        if reason is not None:
            return reason
        if problem.op == "sample_codes":
            return self.codes_unsupported(problem)
        if problem.op == "feature_moments":
            return self.moments_unsupported(problem)
        if problem.op in ("bank_forward", "bank_input_gradient"):
            return self.bank_unsupported(problem)
        return f"there is no C++ kernel for {problem.op}"

    def note(self, problem: Problem) -> str | None:
        if problem.op in ("bank_forward", "bank_input_gradient"):
            return self.bank_note(problem)
        return f"instruction set {_native.isa()}"


BACKEND = CpuBackend()
