"""The keys that a configuration of `fit` may have: others are typing errors, which would be passed over in silence."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from meshbolt.config.load import Loaded
from meshbolt.errors import ConfigError

# Of Lightning's command line and ours, beside the arguments of `Trainer.fit`.
_SECTIONS = frozenset({"trainer", "model", "data", "optimizer", "lr_scheduler", "seed_everything", "meta"})


def top_level_keys() -> frozenset[str]:
    """Return the keys at the top of a configuration of `fit`."""
    of_fit = set(inspect.signature(pl.Trainer.fit).parameters) - {"self"} - LightningCLI.subcommands()["fit"]
    return _SECTIONS | of_fit


def trainer_keys() -> frozenset[str]:
    """Return the keys below `trainer:`."""
    return frozenset(inspect.signature(pl.Trainer).parameters)


def check_keys(loaded: Loaded) -> None:
    """Refuse keys that `fit` does not take, at the top and below `trainer:`.

    Args:
        loaded: a configuration of `fit`.

    Raises:
        ConfigError: there is one; or `trainer:` is no mapping.
    """
    for key in loaded.values:
        _check(key, key, top_level_keys(), "a key of `meshbolt fit`", loaded)
    trainer = loaded.get("trainer", {})
    if not isinstance(trainer, Mapping):
        raise ConfigError(f"trainer={trainer!r} has no flags. Write `trainer:` and the flags of the Trainer below it.")
    for key in trainer:
        _check(str(key), f"trainer.{key}", trainer_keys(), "a flag of the Trainer", loaded)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name: the known one that is closest, or where they are listed.

    Args:
        name: as it was written.
        known: names that would do.
    """
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f": did you mean {close[0]!r}?" if close else ". `meshbolt fit --help` lists them all."


def _check(name: str, key: str, known: frozenset[str], what: str, loaded: Loaded) -> None:
    if name not in known:
        origin = next(origin for given, origin in loaded.origins.items() if f"{given}.".startswith(f"{key}."))
        raise ConfigError(f"{key} ({origin}) is not {what}{nearest(name, known)}")
