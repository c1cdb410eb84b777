"""Building objects from a configuration such that an error of meshbolt's stays what it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jsonargparse

from meshbolt.errors import MeshboltError


@contextmanager
def typed_errors(parser: jsonargparse.ArgumentParser) -> Iterator[None]:
    """Raise the error that a constructor of meshbolt raised, while a parser builds the objects of a configuration.

    jsonargparse tries every type that a value may have, and raises one `ValueError` over what it met in all of them.

    Args:
        parser: it builds objects inside the context, once.
    """
    refusals: list[MeshboltError] = []

    def build(kind: Any, *args: Any, **kwargs: Any) -> Any:
        try:
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
    except (TypeError, ValueError):
        if refusals:
            raise refusals[-1] from None
        raise
