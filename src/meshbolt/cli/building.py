"""Building objects from a configuration such that an error of meshbolt's stays what it is."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jsonargparse
from lightning.pytorch.cli import LightningCLI, _InstantiatorFn
from typing_extensions import override

from meshbolt.errors import MeshboltError

Around = Callable[[Any], AbstractContextManager[None]]


class ModelMaker(_InstantiatorFn):
    """Lightning's own way to build the model of a command line, which keeps its hyperparameters, inside a context."""

    def __init__(self, cli: LightningCLI, *, around: Around) -> None:
        """Take the command line.

        Args:
            cli: has the model's configuration.
            around: makes the context for a class.
        """
        super().__init__(cli=cli, key="model")
        self._around = around

    @override
    def __call__(self, class_type: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        """Build the model."""
        with self._around(class_type):
            return super().__call__(
                class_type, *args, applied_instantiation_links=applied_instantiation_links, **kwargs
            )


def plainly(_kind: Any) -> AbstractContextManager[None]:
    """Return a context that changes nothing."""
    return nullcontext()


@contextmanager
def typed_errors(parser: jsonargparse.ArgumentParser, *, around: Around = plainly) -> Iterator[None]:
    """Raise the error that a constructor of meshbolt raised, while a parser builds the objects of a configuration.

    jsonargparse tries every type that a value may have, and raises one `ValueError` over what it met in all of them.

    Args:
        parser: it builds objects inside the context, once.
        around: makes the context in which a class is called.
    """
    refusals: list[MeshboltError] = []

    def build(kind: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with around(kind):
                return kind(*args, **kwargs)
        except MeshboltError as error:
            refusals.append(error)
            raise

    try:
        with warnings.catch_warnings():
            # jsonargparse 4.49 renamed what Lightning still calls; the new names do not exist in older versions.
            warnings.filterwarnings(
                "ignore", message=r"\s*(``|By default only one Jsonargparse)", category=DeprecationWarning
            )
            parser.add_instantiator(build, object)
            yield
    except (TypeError, ValueError) as error:
        if refusals:
            raise refusals[-1] from None
        if (refusal := _cause(error)) is not None:
            raise refusal from None
        raise


def _cause(error: BaseException) -> MeshboltError | None:
    """Return the error of ours that another came from; a function that makes an object goes through no instantiator.

    jsonargparse raises from the first of the errors that it met, and keeps the others in a list of its innermost frame.
    """
    met: list[Any] = [error.__cause__]
    for frame, _ in traceback.walk_tb(error.__traceback__):
        met += [each for value in frame.f_locals.values() if isinstance(value, list) for each in value]
    return next((each for each in met if isinstance(each, MeshboltError)), None)
