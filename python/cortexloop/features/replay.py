"""Backward passes of many cotangents at once, along the graph that torch has recorded of one forward pass.

torch runs a graph for one cotangent. Here its nodes are walked in the same order with all cotangents in one batch:
those that cost (convolutions, ReLU, batch normalisation of evaluation, max pooling, sums) by a batched form of their
derivative, any other by calling it once for each cotangent. Batch norm's scale is folded into the convolution before
it, whose weights are all that its derivative needs. Gradients of maps are kept with their channels last in memory,
whatever the forward pass did: measured on a CPU, derivatives of convolutions take a half to a tenth of the time so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Node = Any
"""torch.autograd.graph.Node"""

AT_ONCE = 16
"""Cotangents in one batch. More of them leave the caches: with 64, a residual network took a third longer."""


class Replay:
    """The part of a graph between features and images.

    Args:
        output: with a graph.
        leaf: the images that it started from.

    Raises:
        ValueError: the features do not depend on the images.

    Attributes:
        reason: None, or one sentence why this graph cannot be replayed.
    """

    def __init__(self, output: Tensor, leaf: Tensor) -> None:
        if output.grad_fn is None:
            raise ValueError("the features do not depend on the images")
        self._root, self._root_output = output.grad_fn, output.output_nr
        self._leaf = leaf
        self._order = _order(output.grad_fn, leaf)
        self._users = _users(self._order)
        self._scales: dict[Node, Tensor] = {}
        self._weights: dict[Node, Tensor] = {}
        self._phases: dict[Node, Tensor] = {}
        python = [n for n in self._order if isinstance(n, torch.autograd.function.BackwardCFunction)]
        self.reason = f"{type(python[0]).__name__} is a derivative written in Python" if python else None

    @torch.no_grad()
    def run(self, cotangents: Tensor) -> Tensor:
        """Gradients [k, *leaf] of cotangents [k, *output]."""
        start = (_channels_last(cotangents), False)
        waiting: dict[tuple[Node, int], tuple[Tensor, bool]] = {(self._root, self._root_output): start}
        result = cotangents.new_zeros((len(cotangents), *self._leaf.shape), dtype=self._leaf.dtype)
        for node in self._order:
            arrived = [waiting.pop((node, nr), None) for nr in range(max(1, len(node._input_metadata)))]
            if all(grad is None for grad in arrived):
                continue
            if _is_leaf(node):
                assert arrived[0] is not None
                result += arrived[0][0]
                continue
            for (target, nr), grad in zip(node.next_functions, self._back(node, arrived), strict=True):
                if target is None or grad is None or target not in self._users:
                    continue
                before = waiting.get((target, nr))
                if before is None:
                    waiting[target, nr] = grad
                elif before[1]:
                    before[0].add_(grad[0])
                else:
                    waiting[target, nr] = (before[0] + grad[0], True)
        return result

    def _back(self, node: Node, arrived: list[tuple[Tensor, bool] | None]) -> list[tuple[Tensor, bool] | None]:
        """Gradients for each of the node's inputs, with whether they may be written to."""
        rule = _RULES.get(node.name())
        if rule is not None and arrived[0] is not None and all(grad is None for grad in arrived[1:]):
            found = rule(self, node, *arrived[0])
            if found is not None:
                return [*found, *[None] * (len(node.next_functions) - len(found))]
        return _one_by_one(node, [None if grad is None else grad[0] for grad in arrived])

    def alone(self, node: Node) -> bool:
        """Whether only one node hands gradients to this one."""
        return self._users.get(node, 0) == 1

    def weights(self, node: Node) -> Tensor:
        """Those of a convolution, times the scale of a batch norm behind it, output by output."""
        if node not in self._weights:
            weight = node._saved_weight
            scale = self._scales.get(node)
            weight = weight if scale is None else (weight * scale[:, None, None, None]).to(weight.dtype)
            self._weights[node] = weight.contiguous(memory_format=torch.channels_last)
        return self._weights[node]

    def phases(self, node: Node) -> Tensor:
        """See `_phases`."""
        if node not in self._phases:
            self._phases[node] = _phases(self.weights(node), node._saved_padding)
        return self._phases[node]


Rule = Callable[[Replay, Node, Tensor, bool], list[tuple[Tensor, bool] | None] | None]


def _convolution(replay: Replay, node: Node, grad: Tensor, owned: bool) -> list[tuple[Tensor, bool] | None] | None:
    if node._saved_transposed or grad.ndim != 5:
        return None
    weight = replay.weights(node)
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    height, width = node._saved_input.shape[2:]
    maps = _channels_last(grad).flatten(0, 1).to(weight.dtype)
    if weight.shape[1] <= 4 and stride == (2, 2) and dilation == (1, 1) and node._saved_groups == 1:
        kernel = (weight.shape[2], weight.shape[3])
        back = _from_phases(maps, replay.phases(node), kernel, padding, height, width)
        return [(_split(back, len(grad)), True)]
    # rows and columns behind the last stride, which the convolution never read
    unread = [
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, s, p, d, k in zip(
            (height, width), maps.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    back = F.conv_transpose2d(maps, weight, None, stride, padding, unread, node._saved_groups, dilation)
    return [(_split(back, len(grad)), True)]


def _reach(kernel: int, padding: int) -> tuple[int, int]:
    """Which rows u + d of the output of a stride-2 convolution see rows 2 u and 2 u + 1 of its input: d from, to."""
    return -((kernel - 1 - padding) // 2), (1 + padding) // 2


def _phases(weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The kernel [4 C, O, m, n] of `_from_phases`, from the weights [O, C, k, l] of a stride-2 convolution.

    Input row 2 u + a gets tap i of output row u + d with 2 d = a + padding - i.
    """
    (low_y, high_y), (low_x, high_x) = (_reach(k, p) for k, p in zip(weight.shape[2:], padding, strict=True))
    out_c, in_c, k_y, k_x = weight.shape
    phases = weight.new_zeros(in_c, 2, 2, out_c, high_y - low_y + 1, high_x - low_x + 1)
    for a in range(2):
        for b in range(2):
            for y in range(low_y, high_y + 1):
                for x in range(low_x, high_x + 1):
                    i, j = a + padding[0] - 2 * y, b + padding[1] - 2 * x
                    if 0 <= i < k_y and 0 <= j < k_x:
                        phases[:, a, b, :, y - low_y, x - low_x] = weight[:, :, i, j].T
    return phases.flatten(0, 2).contiguous(memory_format=torch.channels_last)


def _from_phases(
    grad: Tensor, phases: Tensor, kernel: tuple[int, int], padding: tuple[int, int], height: int, width: int
) -> Tensor:
    """Gradient [B, C, height, width] of the input of a stride-2 convolution.

    With few colours C, a convolution fills its vectors of channels badly. The rows and columns of the input that are
    even or odd see taps of their own, so these four phases can be channels: four times as many.
    """
    pads = []
    for size, out, k, p, taps in zip((height, width), grad.shape[2:], kernel, padding, phases.shape[2:], strict=True):
        before = -_reach(k, p)[0]
        pads.append((before, (size + 1) // 2 - 1 + taps - out - before))
    padded = F.pad(grad, (*pads[1], *pads[0])).contiguous(memory_format=torch.channels_last)
    rows = F.conv2d(padded, phases)
    return F.pixel_shuffle(rows, 2)[:, :, :height, :width]


def _relu(replay: Replay, node: Node, grad: Tensor, owned: bool) -> list[tuple[Tensor, bool] | None]:
    result = node._saved_result
    if result.ndim == 4:  # converted for each batch of cotangents anew, which costs less than to keep it
        result = result.contiguous(memory_format=torch.channels_last)
    if owned:  # in place
        torch.ops.aten.threshold_backward.grad_input(grad, result, 0, grad_input=grad)
        return [(grad, True)]
    return [(torch.ops.aten.threshold_backward(grad, result, 0), True)]


def _batch_norm(replay: Replay, node: Node, grad: Tensor, owned: bool) -> list[tuple[Tensor, bool] | None] | None:
    if node._saved_training or grad.ndim != 5:
        return None
    before = node.next_functions[0][0]
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    if node._saved_weight is not None:
        scale = scale * node._saved_weight
    if replay.alone(before) and before.name() == "ConvolutionBackward0" and not before._saved_transposed:
        replay._scales.setdefault(before, scale)
        return [(grad, owned)]
    scale = scale[:, None, None]
    return [(grad.mul_(scale) if owned else grad * scale, True)]


def _max_pool(replay: Replay, node: Node, grad: Tensor, owned: bool) -> list[tuple[Tensor, bool] | None] | None:
    if grad.ndim != 5:
        return None
    index = node._saved_result1.flatten(2).transpose(1, 2)  # [B, pixels, C]
    batch, channels, height, width = node._saved_self.shape
    back = grad.new_zeros(len(grad), batch, height * width, channels)
    back.scatter_add_(2, index.expand(len(grad), *index.shape), grad.flatten(3).transpose(2, 3))
    return [(back.transpose(2, 3).view(len(grad), batch, channels, height, width), True)]


def _channels_last(maps: Tensor) -> Tensor:
    """The same maps [k, B, C, H, W] with channels last in memory; others as they are."""
    if maps.ndim != 5:
        return maps
    return _split(maps.flatten(0, 1).contiguous(memory_format=torch.channels_last), len(maps))


def _split(maps: Tensor, count: int) -> Tensor:
    """[k B, C, H, W] as [k, B, C, H, W]."""
    return maps.view(count, len(maps) // count, *maps.shape[1:])


def _clone(replay: Replay, node: Node, grad: Tensor, owned: bool) -> list[tuple[Tensor, bool] | None]:
    return [(grad, owned)]


def _add(replay: Replay, node: Node, grad: Tensor, owned: bool) -> list[tuple[Tensor, bool] | None] | None:
    if node._saved_alpha != 1 or any(_output_shape(target) != grad.shape[1:] for target, _ in node.next_functions):
        return None
    return [(grad, False), (grad, False)]


_RULES: dict[str, Rule] = {
    "ConvolutionBackward0": _convolution,
    "ReluBackward0": _relu,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "MaxPool2DWithIndicesBackward0": _max_pool,
    "AddBackward0": _add,
    "CloneBackward0": _clone,
}


def _one_by_one(node: Node, grads: list[Tensor | None]) -> list[tuple[Tensor, bool] | None]:
    """The node's own derivative, called for each cotangent.

    As torch's engine does it, gradients of inputs that were repeated (broadcast) are summed to the inputs' shape.
    """
    count = next(len(grad) for grad in grads if grad is not None)
    columns: list[list[Tensor]] = [[] for _ in node.next_functions]
    for k in range(count):
        back = node(*[None if grad is None else grad[k] for grad in grads])
        for (target, nr), grad, column in zip(
            node.next_functions, back if isinstance(back, tuple) else (back,), columns, strict=True
        ):
            if target is not None and grad is not None:
                expected = target._input_metadata[nr]
                column.append(grad.sum_to_size(expected.shape).to(expected.dtype))
    return [(torch.stack(column), True) if column else None for column in columns]


def _is_leaf(node: Node) -> bool:
    return bool(node.name().endswith("AccumulateGrad"))


def _output_shape(node: Node) -> torch.Size | None:
    """The shape of a node's first output; None if there is no node."""
    return None if node is None else torch.Size(node._input_metadata[0].shape)


def _order(root: Node, leaf: Tensor) -> list[Node]:
    """The nodes between root and leaf, every node before those that it hands gradients to."""
    reaches: dict[Node, bool] = {}
    finished: list[Node] = []
    stack: list[tuple[Node, Iterator[Node]]] = []

    def enter(node: Node) -> None:
        reaches[node] = _is_leaf(node) and node.variable is leaf
        stack.append((node, iter([target for target, _ in node.next_functions if target is not None])))

    enter(root)
    while stack:
        node, targets = stack[-1]
        for target in targets:
            if target not in reaches:
                enter(target)
                break
            reaches[node] = reaches[node] or reaches[target]
        else:
            stack.pop()
            reaches[node] = reaches[node] or any(reaches[t] for t, _ in node.next_functions if t is not None)
            finished.append(node)
    return [node for node in reversed(finished) if reaches[node]]


def _users(order: list[Node]) -> dict[Node, int]:
    """How many edges lead to each node."""
    users = dict.fromkeys(order, 0)
    for node in order:
        for target, _ in node.next_functions:
            if target in users:
                users[target] += 1
    return users
