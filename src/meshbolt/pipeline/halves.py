"""A backward pass in two halves: gradients of inputs first, those of parameters when there is time.

Nodes of the graph through which gradients of inputs pass run in the first half. Most parameters hang on exactly one of them, such
as a layer's weight on its matrix product: what arrives there is kept, and the second half runs that node again for the parameter
alone. A parameter that hangs on several nodes, or on none, gets its gradient in the first half.

`torch.distributed.pipelining` has halves of its own (`stage_backward_input`), which group parameters by the order of a set: for
some models they make wrong gradients in some microbatches and right ones in others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

_COMPILED = "CompiledFunction"


class CannotSplitError(Exception):
    """A graph whose halves would compute more than the whole."""


def backward_to_inputs(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> Callable[..., None]:
    """Add the gradients of inputs to their `.grad`; return what does so for the parameters.

    Args:
        outputs: with a graph.
        gradients: of the outputs.
        inputs: leaves that require a gradient, one or more.
        parameters: leaves that require a gradient; those that the graph does not use are left as they are.

    Raises:
        CannotSplitError: the second half would run a compiled function as a whole again.
    """
    graph = _Graph([get_gradient_edge(tensor).node for tensor in outputs])
    nodes = {get_gradient_edge(parameter).node: parameter for parameter in parameters}
    nodes = {node: parameter for node, parameter in nodes.items() if node in graph}
    early, hanging = _divide(graph, [get_gradient_edge(tensor).node for tensor in inputs], nodes.keys())
    if any(_COMPILED in node.name() for node in hanging):
        raise CannotSplitError("a compiled function makes all of its gradients at once")
    wanted = [*inputs, *(nodes[node] for node in early)]
    arrived: dict[Node, tuple[Tensor | None, ...]] = {}
    handles = [node.register_prehook(_keep(arrived, node)) for node in hanging]
    try:
        made = torch.autograd.grad(outputs, wanted, gradients, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    _add(wanted, made)
    later = {node: [nodes[each] for each in below] for node, below in hanging.items()}

    def backward_to_parameters(*, retain_graph: bool = False) -> None:
        while later:
            node, below = later.popitem()
            came = arrived.pop(node, ())
            edges = [(GradientEdge(node, i), each) for i, each in enumerate(came) if each is not None]
            if edges:
                ends, values = zip(*edges, strict=True)
                # What hooks of activations have made of the gradients is in them: here they run again, for nothing.
                handle = node.register_prehook(_put_back(came))
                try:
                    made = torch.autograd.grad(ends, below, values, retain_graph=retain_graph, allow_unused=True)
                finally:
                    handle.remove()
                _add(below, made)

    return backward_to_parameters


def _keep(arrived: dict[Node, tuple[Tensor | None, ...]], node: Node) -> Callable[[tuple[Tensor | None, ...]], None]:
    def keep(gradients: tuple[Tensor | None, ...]) -> None:
        arrived[node] = gradients

    return keep


def _put_back(gradients: tuple[Tensor | None, ...]) -> Callable[[Any], tuple[Tensor | None, ...]]:
    return lambda _gradients: gradients


def _add(tensors: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is None:
            continue
        # Autograd may give one tensor to several, or what it still needs itself, and the next gradient is added to it.
        tensor.grad = gradient.clone() if tensor.grad is None else tensor.grad.add_(gradient)


class _Graph:
    """The nodes above some leaves, each after those that its gradients go on to."""

    def __init__(self, outputs: Sequence[Node]) -> None:
        self.outputs = outputs
        self.next: dict[Node, list[Node]] = {}
        waiting = [(node, False) for node in outputs]
        seen: set[Node] = set()
        while waiting:
            node, is_done = waiting.pop()
            if is_done:
                self.next[node] = [each for each, _ in node.next_functions if each is not None]
            elif node not in seen:
                seen.add(node)
                waiting.append((node, True))
                waiting += [(each, False) for each, _ in node.next_functions if each is not None and each not in seen]

    def __contains__(self, node: Node) -> bool:
        return node in self.next

    def above(self, leaves: Iterable[Node]) -> set[Node]:
        """Return the nodes from which gradients come to leaves, and these."""
        found = set(leaves)
        for node, following in self.next.items():
            if not found.isdisjoint(following):
                found.add(node)
        return found


def _divide(
    graph: _Graph, inputs: Sequence[Node], parameters: Iterable[Node]
) -> tuple[list[Node], Mapping[Node, list[Node]]]:
    """Return the parameters whose gradients are made together with those of inputs, and on what each other one hangs."""
    early: dict[Node, None] = {}
    while True:
        on_way = graph.above([*inputs, *early])
        hangs = _hangs_on(graph, on_way)
        others = {node: hangs.get(node, frozenset()) for node in parameters if node not in early}
        odd = [node for node, places in others.items() if len(places) != 1 or None in places]
        if not odd:
            break
        early.update(dict.fromkeys(odd))
    hanging: dict[Node, list[Node]] = {}
    for node, places in others.items():
        hanging.setdefault(next(iter(places)), []).append(node)  # type: ignore[arg-type]
    return list(early), hanging


def _hangs_on(graph: _Graph, on_way: set[Node]) -> dict[Node, frozenset[Node | None]]:
    """Return of each node beside the way of the inputs' gradients on which nodes of the way it hangs; None: on an output."""
    places: dict[Node, set[Any]] = {}
    for node in graph.outputs:
        if node not in on_way:
            places.setdefault(node, set()).add(None)
    for node, following in reversed(graph.next.items()):
        own = {node} if node in on_way else places.get(node, set())
        for each in following:
            if each not in on_way:
                places.setdefault(each, set()).update(own)
    return {node: frozenset(each) for node, each in places.items()}
