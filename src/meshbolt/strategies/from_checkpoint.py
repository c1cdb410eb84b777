"""A LightningModule from a checkpoint directory, whole and in any process: what Lightning's own method does with a file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch

from meshbolt.checkpoint.deepspeed import is_deepspeed, open_deepspeed
from meshbolt.checkpoint.directory import is_remote
from meshbolt.checkpoint.lazy import read_all
from meshbolt.checkpoint.optimizers import OWN
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.compat import StoredTensor, tree_leaves
from meshbolt.errors import CheckpointError, ConfigError
from meshbolt.strategies.compat import built_from
from meshbolt.strategies.deepspeeds import renaming
from meshbolt.strategies.directories import left_out_of

Module = TypeVar("Module", bound=pl.LightningModule)

_LEFT_LAZY = ("state_dict", "optimizer_states")
_REFUSED_BY_TORCH = "Error(s) in loading state_dict"
_REFUSED_BY_LIGHTNING = "is in conflict with"


def load_from_checkpoint(
    module_class: type[Module],
    path: str | os.PathLike[str],
    *,
    map_location: str | torch.device | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **overrides: Any,
) -> Module:
    """Build a module from a checkpoint, with its hyperparameters and weights, in this process alone.

    Weights are read tensor by tensor into the module, so that memory holds one model and the tensor at hand. No process
    group is needed, and one that is there is not used.

    Args:
        module_class: the LightningModule's class.
        path: the checkpoint's directory, a directory that DeepSpeed has written, or a file of Lightning's, which goes to
            Lightning's own method.
        map_location: the device that the module is moved to; None for the CPU.
        strict: refuse weights that the module does not have, and parameters that the checkpoint does not have; None for
            what the module's `strict_loading` says. Of a tied parameter one of the names is enough.
        weights_only: False builds objects of any class, which runs code from the checkpoint; else plain data only.
        overrides: arguments of the constructor, instead of the saved hyperparameters.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, it does not fit the module, or it holds objects of classes
            that `weights_only` does not allow.
        ConfigError: a value is wrong by itself.

    Example:
        >>> model = meshbolt.load_from_checkpoint(Model, "run.ckpt")
    """
    if not (isinstance(module_class, type) and issubclass(module_class, pl.LightningModule)):
        raise ConfigError(f"load_from_checkpoint takes the class of a LightningModule first, not {module_class!r}.")
    if Path(os.path.expanduser(path)).is_file():  # noqa: PTH111 - as everywhere, the home of nobody stays as it is written
        return module_class.load_from_checkpoint(
            os.fspath(path), map_location=map_location, strict=strict, weights_only=weights_only, **overrides
        )
    device = _device(map_location)
    if "hparams_file" in overrides and "hparams_file" not in inspect.signature(module_class).parameters:
        raise ConfigError(
            f"hparams_file={overrides['hparams_file']!r} is for files of Lightning's; a checkpoint directory has the "
            "hyperparameters in it. Give those that differ as arguments: load_from_checkpoint(Model, path, width=8)."
        )
    with ExitStack() as stack:
        name, lazy, renames = _opened(path, weights_only=weights_only, closing=stack)
        # What a constructor or a hook may keep is read; moments, which nobody keeps, are not.
        checkpoint = {key: value if key in _LEFT_LAZY else read_all(value) for key, value in lazy.items()}
        left_out = left_out_of("state_dict", checkpoint.pop(OWN, {}))
        if not isinstance(checkpoint.get("state_dict"), Mapping):
            raise CheckpointError(
                f"Checkpoint {name!r} has no 'state_dict', so that no Trainer has saved it. Its entries: "
                f"{', '.join(sorted(map(str, checkpoint)))}. Read one that Fabric saved with fabric.load."
            )
        if renames:
            checkpoint["state_dict"] = _renamed(module_class, checkpoint, overrides, name)
        try:
            module = built_from(module_class, checkpoint, strict=strict, overrides=overrides)
        except RuntimeError as error:
            if _REFUSED_BY_TORCH not in str(error):
                raise
            refusal = CheckpointError(
                f"Checkpoint {name!r} does not fit {module_class.__name__}. {error}\nBuild the module as it was when it "
                "was saved, or load what fits with strict=False."
            )
        else:
            return _whole(module).to(device)
        # Torch cannot tell what may be missing: other names of tied parameters, and what was left out on purpose.
        again = None if strict is False else _forgiving(module_class, checkpoint, overrides)
        if again is None or not _lacks_nothing(again, checkpoint["state_dict"], left_out=left_out):
            raise refusal
        return _whole(again).to(device)


def _opened(
    path: str | os.PathLike[str], *, weights_only: bool | None, closing: ExitStack
) -> tuple[str, dict[str, Any], bool]:
    """Return a checkpoint's name, what it holds, and whether its weights may be those of an attribute of the module."""
    if not is_remote(path) and is_deepspeed(path):
        opened = open_deepspeed(path, weights_only=weights_only is not False)
        return opened.name, opened.as_lightning(), not opened.is_lightnings
    reader = closing.enter_context(CheckpointReader(path))
    return reader.name, reader.tree(weights_only=weights_only), False


def _renamed(
    module_class: type[pl.LightningModule], checkpoint: dict[str, Any], overrides: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Return weights that an engine of DeepSpeed's has saved, under the names that a module has them."""
    saved = checkpoint["state_dict"]
    module = _forgiving(module_class, checkpoint, overrides)
    name_of = str if module is None else renaming(saved, module, within=True, source=source)
    return {name_of(name): value for name, value in saved.items()}


def _whole(module: Module) -> Module:
    """Read what parts of a module have kept of the checkpoint, instead of copying it, while it can be read."""
    for child in module.modules():
        for name, value in list(vars(child).items()):
            if any(isinstance(leaf, StoredTensor) for leaf in tree_leaves(value)):
                vars(child)[name] = read_all(value)
    return module


def _device(map_location: Any) -> torch.device:
    try:
        device = torch.device("cpu" if map_location is None else map_location)
        torch.empty(0, device=device)
        return device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"map_location={map_location!r} names no device that is there ({error}). Give one such as 'cpu' or 'cuda:0'; "
            "mappings and functions are for files, not for checkpoint directories."
        ) from error


def _forgiving(module_class: type[Module], checkpoint: dict[str, Any], overrides: Mapping[str, Any]) -> Module | None:
    try:
        return built_from(module_class, checkpoint, strict=False, overrides=overrides, quiet=True)
    except (RuntimeError, ValueError) as error:
        if _REFUSED_BY_TORCH in str(error) or _REFUSED_BY_LIGHTNING in str(error):
            return None
        raise


def _lacks_nothing(module: pl.LightningModule, saved: Mapping[str, Any], *, left_out: frozenset[str]) -> bool:
    own = module.state_dict(keep_vars=True)
    held = {id(own[key]) for key in own if key in saved or key in left_out}
    return saved.keys() <= own.keys() and all(id(value) in held for value in own.values())
