"""Every Triton kernel compiled ahead of time for GPUs that need not be there: run by test_triton_kernels.py.

The launches of real calls are recorded instead of made, so that what compiles here is what runs there.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cortexloop.backends.triton import bank as operators
from cortexloop.testing import Case, ModelShape, random_inputs

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
POINTERS = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
}
SHARED_MEMORY = 48 * 1024  # bytes; every GPU has that much for each of several programs
STACK = 64  # bytes; ptxas may trade a few registers for another program per multiprocessor


@dataclass(frozen=True)
class Variant:
    """A kernel with what is compiled in; types: of the other arguments."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    compiled: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        shown = (f"{k}={int(v)}" for k, v in self.compiled if k not in OPTIONS)
        return f"{self.kernel.strip('_')} {' '.join(shown)}"


def published(*filters: int) -> ModelShape:
    return ModelShape(filters, (5, 5, 5, 5, 5), (1, 2, 2, 1, 1))


PUBLISHED = Case("published", 1, 9, 9, (
    published(33, 16, 3, 3, 3),
    published(48, 32, 17, 3, 3),
    published(58, 48, 3, 33, 3),
    published(58, 64, 48, 3, 11),
    published(58, 77, 74, 46, 3),
))  # fmt: skip
OTHERS = Case("others", 1, 9, 9, (
    ModelShape((3,), (1,), (2,)),
    ModelShape((16, 20), (3, 7), (2, 2)),
    ModelShape((16, 150), (7, 1), (2, 1)),
    ModelShape((100, 16), (7, 3), (1, 1)),
))  # fmt: skip


def record(monkeypatch: pytest.MonkeyPatch) -> dict[Variant, None]:
    """What is launched by all kinds of calls."""
    seen: dict[Variant, None] = {}

    def launch(kernel: Any, programs: int, *arguments: Any, **compiled: int) -> None:
        names = [name for name in kernel.arg_names if name not in compiled]
        types = []
        for name, value in zip(names, arguments, strict=True):
            is_long = kernel.signature.parameters[name].annotation is not inspect.Parameter.empty
            integer = "i64" if is_long else "i32"
            types.append((name, POINTERS[value.dtype] if isinstance(value, torch.Tensor) else integer))
        seen[Variant(kernel.__name__, tuple(types), tuple(sorted(compiled.items())))] = None

    monkeypatch.setattr(operators, "_launch", launch)
    kernels = operators.BankOperators()
    for case in (PUBLISHED, OTHERS):
        inputs = random_inputs(case)
        bank, planes = inputs.bank, inputs.images.permute(0, 3, 1, 2).contiguous()
        weights, table = bank.weights, bank.table
        for precision in ("exact", "fast"):
            kernels.bank_forward(inputs.images_uint8, weights, table, None, "NHWC", precision)
            kernels.bank_forward(planes, weights, table, None, "NCHW", precision)
        kernels.bank_input_gradient(inputs.images, weights, table, None, inputs.cotangent, "NHWC")
    inputs = random_inputs(Case("pairs", 1, 9, 9, (ModelShape((48, 64, 3), (5, 5, 5), (1, 2, 1)),)))
    bank, planes = inputs.bank, inputs.images_uint8.permute(0, 3, 1, 2).contiguous()
    cotangent = inputs.cotangent[:, 0].contiguous()
    kernels.bank_forward(planes, bank.weights, bank.table, inputs.pairs, "NCHW", "fast")
    kernels.bank_input_gradient(planes, bank.weights, bank.table, inputs.pairs, cotangent, "NCHW")
    return seen


with pytest.MonkeyPatch.context() as patch:
    VARIANTS = list(record(patch))
KERNELS = sorted({variant.kernel for variant in VARIANTS})


NVIDIA = {80: GPUTarget("cuda", 80, 32), 90: GPUTarget("cuda", 90, 32)}
AMD = GPUTarget("hip", "gfx942", 64)


def compile_for(variant: Variant, target: GPUTarget) -> Any:
    kernel = getattr(operators.bank_fwd, variant.kernel, None) or getattr(operators.bank_bwd, variant.kernel)
    constants = {name: value for name, value in variant.compiled if name not in OPTIONS}
    types = dict(variant.types)
    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or types.get(name) == "i64"]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {name: value for name, value in variant.compiled if name in OPTIONS}
    return triton.compile(source, target=target, options=options)


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers per thread and bytes of stack, as the tool that comes with Triton reads them from machine code."""
    package = importlib.util.find_spec("triton")
    assert package is not None
    assert package.origin is not None
    tool = Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [tool, "--dump-resource-usage", file]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def test_variants_cover_all_kernels() -> None:
    names = {
        name
        for module in (operators.bank_fwd, operators.bank_bwd)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    assert set(KERNELS) == names
    assert len(names) == 6


def test_strides_are_64_bits_whatever_their_value() -> None:
    """Units of a round may lie further apart than 2^31 numbers."""
    for variant in VARIANTS:
        types = dict(variant.types)
        assert types.get("stride", "i64") == types.get("origin", "i64") == "i64"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", NVIDIA)
def test_compiles(capability: int, kernel: str, tmp_path: Path) -> None:
    for variant in VARIANTS:
        if variant.kernel == kernel:
            compiled = compile_for(variant, NVIDIA[capability])
            used = resources(compiled.asm["cubin"], tmp_path)
            shared = compiled.metadata.shared
            print(f"sm_{capability} {used['REG']:3} registers {used['STACK']:2} stack {shared:5} shared  {variant}")
            assert shared <= SHARED_MEMORY
            assert used["STACK"] <= STACK
            assert used["LOCAL"] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_another_vendor(kernel: str) -> None:
    """One variant in exact and, where there is one, in fast precision."""
    wanted = [variant for variant in VARIANTS if variant.kernel == kernel]
    kinds = {dict(variant.types).get("maps"): variant for variant in wanted}
    for variant in kinds.values():
        compiled = compile_for(variant, AMD)
        print(f"{AMD.arch} {compiled.metadata.shared:5} shared  {variant}")
        assert compiled.asm["hsaco"]


def test_exact_products_are_float32() -> None:
    """No tensor core rounds their operands; the fast kernels use them."""
    for name in ("_first_layer_kernel", "_separable_layer_kernel", "_layer_gradient_kernel"):
        for variant in [variant for variant in VARIANTS if variant.kernel == name][::4]:
            code = compile_for(variant, NVIDIA[90]).asm["ptx"]
            fast = dict(variant.compiled).get("FAST", False)
            assert ("mma" in code) == fast
            assert "tf32" not in code
            assert fast or "fma.rn.f32" in code


def test_small_numbers_are_not_compiled_in() -> None:
    """One image or one model must not make Triton compile again."""
    for kernel in (operators.bank_fwd._first_layer_kernel, operators.bank_bwd._layer_gradient_kernel):
        free = {p.name for p in kernel.params if p.do_not_specialize}
        assert {"first", "count", "tiles", "layers", "models", "layer"} <= free
