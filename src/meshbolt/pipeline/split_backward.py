"""A stage's backward pass, in one or in halves, and the trial that shows whether its halves are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

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


def why_not_halves(leaving: Leaving, parameters: Sequence[nn.Parameter]) -> str:
    """Run a backward pass in halves and then in one; return why the halves are not to be used, or nothing.

    For the length of the call a second copy of the parameters' gradients is in memory. It is meant for the first microbatch of
    a run, when optimizers have no state yet.

    Args:
        leaving: the microbatch's; its graph is gone afterwards, and the gradients are those of the pass in one.
        parameters: of the stage.
    """
    ends, gradients = [get_gradient_edge(tensor) for tensor in leaving.sent], list(leaving.gradients)
    earlier = _take_gradients(parameters)
    reason = _try_halves(leaving, parameters)
    halves = [*_take_gradients(leaving.received), *_take_gradients(parameters)]
    torch.autograd.backward(ends, gradients)
    whole = [*(tensor.grad for tensor in leaving.received), *(parameter.grad for parameter in parameters)]
    for parameter, before in zip(parameters, earlier, strict=True):
        if before is not None:
            parameter.grad = before if parameter.grad is None else before + parameter.grad
    differ = sum(not _are_close(*pair) for pair in zip(halves, whole, strict=True))
    if not reason and differ:
        return f"{differ} of {len(whole)} gradients would not be those of a backward pass in one"
    return reason


def _try_halves(leaving: Leaving, parameters: Sequence[nn.Parameter]) -> str:
    try:
        with _calls_of_modules() as called:
            leaving.run_to_inputs(parameters)(retain_graph=True)
    except Exception as error:  # the pass in one does without them
        return str(error).strip().splitlines()[-1] or type(error).__name__
    return f"{called[0]} is computed again in the backward pass, and would be in each half" if called else ""


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
