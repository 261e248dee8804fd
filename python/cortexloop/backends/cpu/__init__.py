"""The C++ kernels, compiled once per instruction set."""

from __future__ import annotations

from cortexloop import _native
from cortexloop.backends.cpu.bank import BankOperators
from cortexloop.backends.cpu.evolution import CodeOperators
from cortexloop.backends.cpu.lasso import LassoOperators
from cortexloop.backends.cpu.moments import MomentOperators
from cortexloop.backends.cpu.nmf import NmfOperators
from cortexloop.backends.cpu.pullback import PullbackOperators
from cortexloop.backends.cpu.readout import ReadoutOperators
from cortexloop.backends.registry import Problem


class CpuBackend(
    BankOperators, PullbackOperators, CodeOperators, MomentOperators, LassoOperators, NmfOperators, ReadoutOperators
):
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
        if problem.op == "nmf":
            return self.nmf_unsupported(problem)
        if problem.op == "lasso_path":
            return self.lasso_unsupported(problem)
        if problem.op in ("factorized_readout", "point_readout"):
            return self.readout_unsupported(problem)
        return self.bank_unsupported(problem)

    def note(self, problem: Problem) -> str | None:
        if problem.op in ("bank_forward", "bank_input_gradient", "bank_pullback"):
            return self.bank_note(problem)
        return f"instruction set {_native.isa()}"


BACKEND = CpuBackend()
