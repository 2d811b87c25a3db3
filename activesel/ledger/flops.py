# SPDX-License-Identifier: Apache-2.0
"""FLOPs counted by torch's own counter on tensors without data, which first has to prove itself."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from activesel.ledger.lines import TRAIN, Cost

Shape: TypeAlias = tuple[int, ...]
Spec: TypeAlias = "Shape | tuple[Shape, torch.dtype]"
Inputs: TypeAlias = "Spec | Mapping[str, Spec]"
Model: TypeAlias = "nn.Module | Callable[..., Any]"


class Counter(FlopCounterMode):
    """torch's counter, which also tells what runs inside a backward pass from what does not.

    What a backward pass computes anew (activation checkpointing) is part of the backward pass.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.forward = self.backward = 0

    def _count_flops(self, *args: Any, **kwargs: Any) -> Any:
        before = self.get_total_flops()
        out = super()._count_flops(*args, **kwargs)
        flops = self.get_total_flops() - before
        if torch._C._current_graph_task_id() < 0:
            self.forward += flops
        else:
            self.backward += flops
        return out


def countable(device: torch.device | str) -> AbstractContextManager[Any]:
    """Inside, attention on a CPU is made of products that torch's counter sees."""
    return sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()


def forward_flops(model: Model, *inputs: Inputs) -> float:
    """FLOPs of one forward pass per row: matrix products, convolutions and attention, 2 per MAC.

    Counted on meta tensors, because on CPU tensors torch's counter misses fused attention. What
    is done once a call, whatever the rows (resizing weights), is no row's.

    Args:
        model: a module or one of its methods, which is copied without its data and not touched; or
            any other callable on CPU tensors, run with fake ones (which a batch norm counts).
        inputs: shape of one row of each argument, without the batch dimension; `(shape, dtype)`
            where it is not float32; or one mapping of names to these, for keyword arguments.

    Raises:
        TypeError, ValueError: an input that is no shape; nothing countable ran.
        RuntimeError: torch's counter is off, see `self_check`.

    >>> forward_flops(nn.Linear(30, 10), (30,))
    600.0
    >>> tower = nn.Sequential(nn.Embedding(100, 8), nn.Flatten(), nn.Linear(7 * 8, 5))
    >>> forward_flops(tower, ((7,), torch.int64))  # looking up is not counted
    560.0
    """
    self_check()
    return _counted(model, inputs, train=False).forward


def training_flops(model: Model, *inputs: Inputs, convention: bool = False) -> float:
    """FLOPs to train on a row: both passes as counted by `cost`, or 3 forward by convention.

    >>> training_flops(nn.Linear(30, 10), (30,), convention=True)
    1800.0
    """
    return TRAIN * forward_flops(model, *inputs) if convention else cost(model, *inputs).train


def cost(model: Model, *inputs: Inputs) -> Cost:
    """FLOPs of a row, forward and backward, as counted; arguments and errors of `forward_flops`.

    The backward pass is a little less than two forward passes, as no gradient of the first layer's
    input is computed; attention counts as its products do, without what fused kernels compute anew.
    Frozen parameters get no gradient, unless all are: the model was trained before.

    >>> cost(nn.Linear(30, 10), (30,))
    Cost(forward=600.0, backward=600.0)
    """
    self_check()
    return _counted(model, inputs, train=True)


def _counted(model: Model, inputs: tuple[Inputs, ...], train: bool) -> Cost:
    """What two rows more add, of which a batch norm needs two to begin with."""
    run, device, fake = _without_data(model, train)

    def batch(rows: int) -> tuple[int, int]:
        with ExitStack() as stack:
            if fake:
                from torch._subclasses.fake_tensor import FakeTensorMode

                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(countable(device))
            stack.enter_context(torch.set_grad_enabled(train))
            args, named = _rows(inputs, rows, device)
            counter = stack.enter_context(Counter())
            out = run(*args, **named)
            if train:
                backward(out)
        if counter.forward + counter.backward != counter.get_total_flops():
            raise RuntimeError(f"torch {torch.__version__}'s FLOP counter calls no _count_flops")
        return counter.forward, counter.backward

    more = [(b - a) / 2 for a, b in zip(batch(2), batch(4), strict=True)]
    if more[0] <= 0:
        raise ValueError(
            f"model must run at least one countable operation, got {more[0]:g} FLOPs a row"
        )
    return Cost(more[0], more[1])


def _without_data(model: Model, train: bool) -> tuple[Callable[..., Any], str, bool]:
    """Something to call instead of `model`, the device of its inputs, and whether to fake them."""
    owner = getattr(model, "__self__", None)
    if isinstance(model, functools.partial):
        run, device, fake = _without_data(model.func, train)
        return functools.partial(run, *model.args, **model.keywords), device, fake
    if isinstance(owner, nn.Module):
        return getattr(_shadow(owner, train), model.__name__), "meta", False
    if isinstance(model, nn.Module):
        return _shadow(model, train), "meta", False
    if not callable(model):
        raise TypeError(f"model must be a module or a callable, got {type(model).__name__}")
    return model, "cpu", True


def _shadow(model: nn.Module, train: bool) -> nn.Module:
    """A copy on the meta device; no data is copied on the way."""
    frozen = not any(p.requires_grad for p in model.parameters())
    memo: dict[int, Any] = {}
    for x in model.buffers():
        memo[id(x)] = x.detach().to("meta")
    for p in model.parameters():
        wanted = p.is_floating_point() and (p.requires_grad or frozen)
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=train and wanted)
    return copy.deepcopy(model, memo)


def _rows(
    inputs: tuple[Inputs, ...], rows: int, device: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    def zeros(spec: Any) -> Tensor:
        shape, dtype = spec, torch.float32
        if isinstance(spec, tuple | list) and len(spec) == 2 and isinstance(spec[1], torch.dtype):
            shape, dtype = spec
        whole = isinstance(shape, tuple | list) and all(
            isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in shape
        )
        if not whole:
            raise TypeError(f"inputs must be shapes of one row or (shape, dtype), got {spec!r}")
        return torch.zeros(rows, *shape, dtype=dtype, device=device)

    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return [], {name: zeros(spec) for name, spec in inputs[0].items()}
    return [zeros(spec) for spec in inputs], {}


def backward(out: Any) -> None:
    """Backward from all that a model returned; no parameter's `grad` is touched."""
    ends = [t for t in tensors(out) if t.requires_grad]
    leaves, seen, todo = [], set(), [t.grad_fn for t in ends]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.append(variable)
        todo += [parent for parent, _ in node.next_functions]
    if not leaves:
        raise ValueError("model must return something that its parameters have a gradient of")
    torch.autograd.grad([t.sum() for t in ends], leaves)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Tensors of what a model takes or returns: a tree, or an object that holds some."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type):
            yield from (x for x in vars(leaf).values() if isinstance(x, Tensor))


@functools.lru_cache(maxsize=1)
def self_check() -> None:
    """Hold torch's counter against arithmetic on a small vision transformer, once a process.

    RuntimeError if it counts something else.

    >>> self_check()
    """
    from activesel.models import SIZES, vit

    (width, depth, _), tokens, pixels = SIZES["nano"], 16, 3 * 8**2
    with torch.device("meta"):
        model = vit("nano", image_size=32, patch=8, classes=10)
    attention = 2 * depth * 2 * tokens**2 * width  # FLOPs are twice the MACs
    embedding = 2 * tokens * pixels * width
    wanted = embedding + attention + 2 * (depth * 12 * tokens * width**2 + width * 10)
    got = _counted(model, ((3, 32, 32),), train=True)
    if got == Cost(wanted, 2 * wanted - embedding):
        return
    causes = {
        0.0: "the backward pass",
        attention: "attention (twice)",
        -attention: "attention (not at all)",
    }
    raise RuntimeError(
        f"torch {torch.__version__}'s FLOP counter must count {wanted:g} forward in a small vision"
        f" transformer and {2 * wanted - embedding:g} backward, got {got.forward:g} and"
        f" {got.backward:g}: {causes.get(got.forward - wanted, 'forward passes')} counted wrongly;"
        " use another version of torch"
    )
