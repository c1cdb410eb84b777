"""Building the model of a configuration without its values, where that can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import nn

from meshbolt.cli.strategy import is_own_strategy
from meshbolt.engine.deferred import REMEDY, Deferred, attach
from meshbolt.errors import ConfigError
from meshbolt.strategies import PRESETS
from meshbolt.units import format_bytes

HELP = (
    "Build the model on the meta device, so that no rank ever holds all its weights; each is computed when it is sharded, "
    "and is what it would be on the CPU. auto: do so where it can be, else build on the CPU and say why; true: end with an "
    "error where it cannot be; false: build on the CPU, whole on every rank."
)


class CannotDeferError(Exception):
    """The model has to be built with its values; the message says why."""


def check_strategy(strategy: Any) -> None:
    """Find out whether the strategy would give a model its values.

    Args:
        strategy: as the configuration has it: a name, or a class path with its arguments.

    Raises:
        CannotDeferError: it would not.
    """
    if isinstance(strategy, str):
        if strategy.lower() not in PRESETS:
            raise CannotDeferError(f"the strategy {strategy!r} is none of meshbolt's")
        return
    path = str(strategy["class_path"])
    if not is_own_strategy(path):
        raise CannotDeferError(f"the strategy {path.rpartition('.')[2]} is none of meshbolt's")
    start_method = (strategy.get("init_args") or {}).get("start_method", "popen")
    if start_method != "popen":
        raise CannotDeferError(f"start_method={start_method!r} hands it to other processes")


class Building:
    """Builds one model without its values.

    Attributes:
        refusal: why it could not; jsonargparse may have raised an error of its own over it.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._deferred = Deferred()
        self.refusal: CannotDeferError | None = None

    @contextmanager
    def around(self, kind: Any) -> Iterator[None]:
        """Build an object; large tensors of a module get no values.

        Args:
            kind: its class.

        Raises:
            CannotDeferError: it needs values, or cannot be built at all.
        """
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            yield
            return
        try:
            with self._deferred.building():
                yield
        except CannotDeferError:
            raise
        except Exception as error:
            said = str(error).removesuffix(REMEDY).removesuffix(".")
            self.refusal = CannotDeferError(f"{kind.__name__}: {said}")
            raise self.refusal from error

    def finish(self, model: pl.LightningModule) -> str:
        """Leave what is to be computed with the model, and return in words how much that is.

        Args:
            model: everything that was built belongs to it.

        Raises:
            CannotDeferError: it would not be what a plain build makes.
        """
        if (gap := self._deferred.gap(model)) is not None:
            raise CannotDeferError(gap)
        tensors = [*model.parameters(), *model.buffers()]
        num_later = sum(tensor.nbytes for tensor in tensors if self._deferred.knows(tensor))
        if not num_later:
            raise CannotDeferError("it has no large tensors")
        attach(model, self._deferred)
        return f"{format_bytes(num_later)} of {format_bytes(sum(tensor.nbytes for tensor in tensors))}"


def insist(error: CannotDeferError) -> ConfigError:
    """Return what to raise where the user insists.

    Args:
        error: why it cannot be.
    """
    return ConfigError(f"--meta true asks for a model that is built without its values, but {error}. Use --meta auto.")
