"""The Triton kernel of streaming moments, compiled ahead of time: run by test_triton_kernels.py.

Its launches are recorded instead of made, so that what compiles here is what runs on a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from compiled_kernels import AMD, NVIDIA, SHARED_MEMORY, STACK, resources
from triton.compiler import ASTSource

from cortexloop.backends.triton import moments
from cortexloop.backends.triton.moments_kernel import _feature_moments_kernel
from moment_problems import exact_moments

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def compiled(dtype: torch.dtype, weighted: bool, precision: str, target: Any) -> Any:
    """The kernel as a call with such features launches it."""
    recorded: dict[str, Any] = {}

    def record(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        assert kernel is _feature_moments_kernel
        names = [name for name in kernel.arg_names if name not in options]
        recorded.update(arguments=dict(zip(names, arguments, strict=True)), options=options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "launch", record)
        patch.setattr(moments, "input_precision", lambda device: precision)
        problem = exact_moments(4, 32, 2, dtype=dtype, weighted=weighted)
        moments.feature_moments(*problem.inputs, *vars(problem.state).values())
    types = {}
    for name, value in recorded["arguments"].items():
        kind = "i64" if name == "columns" else "i32" if isinstance(value, int) else "fp32"
        types[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else kind
    names = _feature_moments_kernel.arg_names
    constants = {name: value for name, value in recorded["options"].items() if name not in OPTIONS}
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name == "columns"]
    source = ASTSource(
        fn=_feature_moments_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {name: recorded["options"][name] for name in OPTIONS}
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("dtype", moments.FEATURE_DTYPES, ids=str)
@pytest.mark.parametrize("capability", NVIDIA)
def test_compiles(capability: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Three products of tf32 for each of float32, summed by chunks: the sums of a chunk begin at 0."""
    kernel = compiled(dtype, dtype == torch.float32, "tf32x3", NVIDIA[capability])
    used = resources(kernel.asm["cubin"], tmp_path)
    print(f"sm_{capability} {dtype}: {used['REG']} registers, {used['STACK']} stack, {kernel.metadata.shared} shared")
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert used["STACK"] <= STACK
    assert used["LOCAL"] == 0
    assert re.search(r"mma.*tf32\.tf32", kernel.asm["ptx"])
    products = [line for line in kernel.asm["ttgir"].splitlines() if re.search(r"tt\.dot |warp_group_dot ", line)]
    assert len(products) == 3
    assert re.search(r"dot %\S+, %\S+, %cst", products[0]), "the first of them does not begin at 0"


def test_compiles_for_another_vendor() -> None:
    kernel = compiled(torch.float32, True, "ieee", AMD)
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert kernel.asm["hsaco"]
