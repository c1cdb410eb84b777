"""A stage's backward pass, in one or in halves, and the trial that shows whether its halves are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meshbolt.compat import local_tensor
from meshbolt.pipeline.halves import backward_to_inputs

# A gradient made in halves may differ by so many roundings of its largest value, and at most by this part of it.
_ROUNDINGS, _MOST = 64, 0.05


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """The ends of a microbatch's graph in a stage.

    Attributes:
        received: what the stage was sent; for halves some of it requires a gradient.
        sent: what it hands on, or its loss; only what needs a gradient.
        gradients: of `sent`.
    """

    received: Sequence[Tensor]
    sent: Sequence[Tensor]
    gradients: Sequence[Tensor]

    def run(self) -> None:
        """Make all gradients at once."""
        torch.autograd.backward(list(self.sent), list(self.gradients))

    def run_to_inputs(self, parameters: Sequence[nn.Parameter]) -> Callable[..., None]:
        """Make the gradients of what was received; return what makes those of the parameters later.

        Args:
            parameters: of the stage; those without a part in the graph are left as they are.

        Raises:
            CannotSplitError: halves would compute more.
        """
        inputs = [tensor for tensor in self.received if tensor.requires_grad]
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        return backward_to_inputs(self.sent, self.gradients, inputs, wanted)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What has come of a backward pass that was run in one, and then in halves.

    Attributes:
        reason: why halves are not to be used; empty if they may.
        is_sound: gradients were such that wrong ones would have been seen.
    """

    reason: str
    is_sound: bool


def try_halves(leaving: Leaving, parameters: Sequence[nn.Parameter]) -> Trial:
    """Run a backward pass in one, whose gradients stay, and then in halves, whose gradients are compared with them.

    For the length of the call a second copy of the parameters' gradients is in memory. It is meant for the first microbatch of
    a run, when optimizers have no state yet.

    Args:
        leaving: the microbatch's; its graph is gone afterwards.
        parameters: of the stage.
    """
    ends, gradients = [get_gradient_edge(tensor) for tensor in leaving.sent], list(leaving.gradients)
    tensors = [*leaving.received, *parameters]
    earlier = _take_gradients(parameters)
    torch.autograd.backward(leaving.sent, gradients, retain_graph=True)
    whole = _take_gradients(tensors)
    try:
        with _calls_of_modules() as called:
            # A sharding engine may have taken some to where it adds them up.
            again = _once_more(ends, gradients, tensors) if any(each is None for each in whole) else whole
            leaving.run_to_inputs(parameters)(retain_graph=True)
        reason = f"{called[0]} is computed again in the backward pass, and would be in each half" if called else ""
    except Exception as error:  # what was made in one is whole
        reason, again = str(error).strip().splitlines()[-1] or type(error).__name__, whole
    halves = _take_gradients(tensors)
    for tensor, made, before in zip(tensors, whole, [*(None for _ in leaving.received), *earlier], strict=True):
        tensor.grad = before if made is None else made if before is None else before + made
    expected = [each if made is None else made for made, each in zip(whole, again, strict=True)]
    differ = sum(not _are_close(*pair) for pair in zip(halves, expected, strict=True))
    if not reason and differ:
        reason = f"{differ} of {len(expected)} gradients would not be those of a backward pass in one"
    return Trial(reason=reason, is_sound=any(each is not None and _says_something(each) for each in expected))


def _once_more(
    ends: Sequence[GradientEdge], gradients: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    made = torch.autograd.grad(ends, wanted, gradients, retain_graph=True, allow_unused=True)
    found = dict(zip(wanted, made, strict=True))
    return [found.get(tensor) for tensor in tensors]


def _says_something(gradient: Tensor) -> bool:
    values = local_tensor(gradient)
    return bool((values.isfinite() & (values != 0.0)).any())


def _take_gradients(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    taken = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    return taken


def _are_close(half: Tensor | None, whole: Tensor | None) -> bool:
    if half is None or whole is None:
        return half is whole
    half, whole = local_tensor(half), local_tensor(whole)
    # Sums in another order; a lost gradient is off by its own size.
    precision = min(_ROUNDINGS * torch.finfo(whole.dtype).eps, _MOST)
    largest = whole.nan_to_num(0.0, 0.0, 0.0).abs().amax() if whole.numel() else 0.0
    overflown = ~half.isfinite() & ~whole.isfinite()
    return bool((((half - whole).abs() <= precision * largest) | overflown).all())


@contextmanager
def _calls_of_modules() -> Iterator[list[str]]:
    """Give the names of the classes of modules that are called inside, as they are."""
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.append(type(module).__name__))
    try:
        yield called
    finally:
        handle.remove()
