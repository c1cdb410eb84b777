"""Whole weights of an engine: what scripts take from `module.state_dict()`, which has shards here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from meshbolt.deepspeed.answers import Answers
from meshbolt.errors import ConfigError, UnsupportedError


def whole_state(engine: Answers, *, prefix: str, exclude_frozen_parameters: bool) -> dict[str, Any]:
    """Return the whole weights of an engine, in the 16 bits of the run or as they are; on every rank.

    Args:
        engine: whose.
        prefix: put before each name.
        exclude_frozen_parameters: leave out parameters without gradients.

    Raises:
        UnsupportedError: ranks have different stages of the module.
    """
    entries = whole_entries(engine, call="module_state_dict", exclude_frozen_parameters=exclude_frozen_parameters)
    return {prefix + name: value for name, value in entries}


def whole_entries(engine: Answers, *, call: str, exclude_frozen_parameters: bool) -> Iterator[tuple[str, Any]]:
    """Yield each entry of a module's state by name, whole, one after the other; on every rank.

    Args:
        engine: whose.
        call: the method that was asked for them.
        exclude_frozen_parameters: leave out parameters without gradients.

    Raises:
        UnsupportedError: ranks have different stages of the module.
    """
    _refuse_stages(engine, call)
    parameters = dict(engine.module.named_parameters(remove_duplicate=False))
    dtype = engine.get_data_types()[0]
    strategy: Any = engine.fabric.strategy
    for name, value in strategy.get_module_state_dict(engine.module).items():
        parameter = parameters.get(name)
        if exclude_frozen_parameters and parameter is not None and not parameter.requires_grad:
            continue
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if isinstance(whole, torch.Tensor):
            whole = whole.detach()
            whole = whole.to(dtype) if parameter is not None and whole.dtype == torch.float32 else whole
        yield name, whole


def load_whole(engine: Answers, state: Any, *, strict: bool) -> None:
    """Load whole weights into the shards of an engine; on every rank.

    Args:
        engine: whose.
        state: by name, or a dictionary that has such a one as "module"; the same on every rank.
        strict: refuse missing and unknown names.

    Raises:
        ConfigError: it is no such dictionary.
        RuntimeError: names or shapes do not fit.
    """
    inner = state.get("module", state) if isinstance(state, Mapping) else state
    if not isinstance(inner, Mapping):
        raise ConfigError(
            f"load_module_state_dict was given {type(inner).__name__}. Give a dictionary of weights by name, as "
            "engine.module_state_dict() returns it."
        )
    engine.module.load_state_dict(inner, strict=strict)


def _refuse_stages(engine: Answers, call: str) -> None:
    if engine.fabric.strategy.plan.mesh.pp > 1:  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"engine.{call}(): ranks have different stages of the module. Save by engine.save_checkpoint(dir), and make one file "
            "of it by `meshbolt checkpoint export`."
        )
