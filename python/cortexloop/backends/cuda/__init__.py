"""The CUDA kernels for NVIDIA's GPUs from compute capability 8.0 on: a bank, or a batch of moments, in few launches."""

from __future__ import annotations

from cortexloop.backends.cuda.bank import BankOperators
from cortexloop.backends.cuda.moments import MomentOperators
from cortexloop.backends.registry import Problem


class CudaBackend(BankOperators, MomentOperators):
    """The operators of a bank, and streaming moments, on a GPU."""

    name = "cuda"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.op in ("bank_forward", "bank_input_gradient"):
            return self.bank_unsupported(problem)
        if problem.op == "feature_moments":
            return self.moments_unsupported(problem)
        return f"there is no CUDA kernel for {problem.op}"

    def note(self, problem: Problem) -> str | None:
        if problem.op == "feature_moments":
            return self.moments_note(problem)
        return self.bank_note(problem)


BACKEND = CudaBackend()
