"""Random numbers that do not depend on how many stages there are: every call of a unit draws from a stream of its own.

With one stream, what a stage draws would depend on what it leaves to others: noise that is an input on the first stage and the
target on the last would be two different noises. Units draw by their name, the rest of the step by the number of the
microbatch, on every stage alike.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from meshbolt.compat import TorchDispatchMode
from meshbolt.pipeline.plan import Call


def stream_seed(seed: int, microbatch: int, call: Call | None = None) -> int:
    """Return the seed of a stream.

    Args:
        seed: of the step.
        microbatch: its number in the step.
        call: whose stream; None: that of the code outside of units.
    """
    named = f"{seed}/{microbatch}/{'' if call is None else f'{call.unit}/{call.number}'}"
    return int.from_bytes(hashlib.blake2b(named.encode(), digest_size=7).digest(), "big")


@contextmanager
def stream(seed: int, *, device: torch.device, python_too: bool = False) -> Iterator[None]:
    """Draw from a stream inside, and go on with the surrounding one after it.

    Args:
        seed: of the stream.
        device: whose generator is used beside that of the host.
        python_too: the generators of Python and numpy as well.
    """
    host, other = torch.default_generator, _generator(device)
    before = host.get_state(), None if other is None else other.get_state()
    numpy = sys.modules.get("numpy") if python_too else None
    before_python = random.getstate() if python_too else None
    before_numpy = numpy.random.get_state() if numpy is not None else None
    try:
        _seed_generators(seed, device)
        if python_too:
            random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        yield
    finally:
        if before_python is not None:
            random.setstate(before_python)
        if numpy is not None:
            numpy.random.set_state(before_numpy)
        host.set_state(before[0])
        if other is not None and before[1] is not None:
            other.set_state(before[1])


def draws(operation: Any, kwargs: Mapping[str, Any] | None) -> bool:
    """Return whether an operation draws from a default generator.

    Args:
        operation: as a dispatch mode gets it.
        kwargs: its arguments by name.
    """
    return _is_random(operation) and (kwargs or {}).get("generator") is None


@functools.cache
def _is_random(operation: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operation.tags


class DrawByNumber(TorchDispatchMode):
    """Gives every operation that draws a stream of its own, by its number among those that do.

    Code outside of units runs on every stage, and draws for values that a stage does not have without drawing: what it draws
    next would differ.
    """

    def __init__(self, seed: int, *, device: torch.device) -> None:
        """Begin with the first.

        Args:
            seed: of the code outside of units.
            device: whose generator is used beside that of the host.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed, self._device, self._count = seed, device, 0
        self.is_in_unit = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if not self.is_in_unit and draws(func, kwargs):
            _seed_generators(stream_seed(self._seed, self._count), self._device)
            self._count += 1
        return func(*args, **(kwargs or {}))


def _seed_generators(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    other = _generator(device)
    if other is not None:
        other.manual_seed(seed)


def _generator(device: torch.device) -> torch.Generator | None:
    if device.type != "cuda":
        return None
    return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
