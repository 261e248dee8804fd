"""The CUDA kernels: a whole bank in one or two launches, on NVIDIA's GPUs from compute capability 8.0 on."""

from __future__ import annotations

from cortexloop.backends.cuda.bank import BankOperators
from cortexloop.backends.registry import Problem


class CudaBackend(BankOperators):
    """The operators of a bank on a GPU."""

    name = "cuda"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.op == "sample_codes":
            return "the CUDA kernels evaluate banks, plain torch works on populations of codes on a GPU"
        return self.bank_unsupported(problem)

    def note(self, problem: Problem) -> str | None:
        return self.bank_note(problem)


BACKEND = CudaBackend()
