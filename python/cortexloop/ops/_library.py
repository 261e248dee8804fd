"""`define_op`: register an operator of the `cortexloop` namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIB = torch.library.Library("cortexloop", "DEF")  # type: ignore[no-untyped-call]


def define_op(
    name: str,
    impl: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `cortexloop::name`. The schema comes from the annotations of `impl`; outputs never alias inputs.

    Without `backward`, differentiating the operator raises. (Left unregistered, torch would only warn, and second
    derivatives would be silently wrong.)
    """
    # Kernels read dense memory: the compiler has to hand over tensors laid out as in eager mode.
    schema = name + torch.library.infer_schema(impl, mutates_args=())
    _LIB.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))  # type: ignore[no-untyped-call]
    _LIB.impl(name, impl, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"cortexloop::{name}", fake, lib=_LIB)
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(f"cortexloop::{name} has no derivative")

    torch.library.register_autograd(f"cortexloop::{name}", backward, setup_context=setup_context, lib=_LIB)
    op: Callable[..., Any] = getattr(torch.ops.cortexloop, name).default
    return op
