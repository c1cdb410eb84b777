"""Whole parameters for a while, of the modules that a strategy has sharded: who may ask for which, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.config import Plan
from meshbolt.engine import Engine, gathered
from meshbolt.engine.gathered import Place, places_of
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.strategies.checks import refuse_foreign
from meshbolt.strategies.compat import plain_optimizer
from meshbolt.strategies.pipelined import StagedModule
from meshbolt.strategies.replicas import take_from_rank_zero, whole_tensors

Wanted: TypeAlias = "nn.Module | nn.Parameter | Iterable[nn.Parameter]"
State: TypeAlias = "dict[str, dict[str, torch.Tensor]]"
Settled = Callable[[], AbstractContextManager[Mapping[nn.Parameter, str]]]


@contextmanager
def whole_weights(
    wanted: Wanted,
    optimizer: Optimizer | None,
    *,
    engines: Mapping[nn.Module, Engine],
    plan: Plan,
    pipeline: StagedModule | None,
    settled: Settled,
) -> Iterator[State]:
    """Hold whole parameters instead of shards; `MeshCore.gathered` says what users are promised.

    Args:
        wanted: a module, or parameters.
        optimizer: whose state to gather too.
        engines: by the users' modules.
        plan: of the run.
        pipeline: the stages of the module, where there are some and it is set up.
        settled: leaves nothing gathered for a while, and yields the names of all sharded parameters.
    """
    if plan.mesh.pp > 1:
        _refuse_in_step(engines.values())
    wanted = wanted if isinstance(wanted, (nn.Module, nn.Parameter)) else list(wanted)
    optimizers = [] if optimizer is None else [plain_optimizer(optimizer)]
    # Inside of a step the user's parameters may be whole copies, which stand in the places of the shards.
    places = places_of(wanted, modules=engines)
    with settled() as names, ExitStack() as shown:
        for engine in engines.values():
            for each in optimizers:
                shown.enter_context(engine.shown_state(each))
        _refuse_others(wanted, places, engines=engines, names=names)
        group = None if pipeline is None else pipeline.group
        with gathered(places, names=names, optimizers=optimizers, pipeline=group) as state:
            yield state
        if pipeline is None:
            # What every rank holds whole was not replaced, and ranks may have changed it differently.
            parameters = (getattr(child, key) for child, key in places)
            take_from_rank_zero(whole_tensors(parameters, optimizers))


def _refuse_in_step(engines: Iterable[Engine]) -> None:
    """Refuse to gather where ranks of a pipeline are in different stages of a step, or it is only looked at.

    Raises:
        UnsupportedError: they are.
    """
    inside = [engine.inside for engine in engines]
    if inside and not any(inside):
        return
    raise UnsupportedError(
        "strategy.gathered(...) was called in a step, or before the module was set up. Under pipeline parallelism ranks go "
        "through different stages of a step at a time, and cannot meet there. Call it in a hook outside of the step, such as "
        "on_train_batch_end or on_before_optimizer_step; in Fabric after pipeline_step."
    )


def _refuse_others(
    wanted: Wanted, places: list[Place], *, engines: Mapping[nn.Module, Engine], names: Mapping[nn.Parameter, str]
) -> None:
    if isinstance(wanted, nn.Module):
        refuse_foreign(wanted, sharded=engines, parameters=names)
        return
    asked = [wanted] if isinstance(wanted, nn.Parameter) else list(wanted)
    if len({id(parameter) for parameter in asked}) > len({id(getattr(child, key)) for child, key in places}):
        kinds = ", ".join(type(module).__name__ for module in engines) or "none yet"
        raise ConfigError(
            f"gathered() was given {len(asked)} parameters, of which one is in no module that this strategy has sharded "
            f"({kinds}). Give parameters as they stand in the module now: those from before it was sharded are others."
        )
