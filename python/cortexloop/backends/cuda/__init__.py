"""The CUDA kernels: a whole bank in one or two launches, on NVIDIA's GPUs from compute capability 8.0 on."""

from __future__ import annotations

from cortexloop.backends.cuda.bank import BankOperators
from cortexloop.backends.registry import Problem


class CudaBackend(BankOperators):
    """The operators of a bank on a GPU."""

    name = "cuda"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.op in ("bank_forward", "bank_input_gradient"):
            return self.bank_unsupported(problem)
        return f"there is no CUDA kernel for {problem.op}"

    def note(self, problem: Problem) -> str | None:
        return self.bank_note(problem)


BACKEND = CudaBackend()
