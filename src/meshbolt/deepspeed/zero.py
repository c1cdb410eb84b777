"""`deepspeed.zero`: building a model without its values, and whole parameters for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from meshbolt.deepspeed.engine import engine_of
from meshbolt.deepspeed.whole import ZeroParamStatus, answering_as
from meshbolt.engine.deferred import REMEDY, Deferred, attach
from meshbolt.errors import ConfigError, UnsupportedError

__all__ = ["GatheredParameters", "Init", "ZeroParamStatus"]

_open: list[Init] = []
_waiting: list[Deferred] = []


class Init:
    """Builds a model whose large tensors get their values when they are sharded: no rank ever holds all of it.

    Values are bit for bit those of a plain build. Outside of such a context a model is built whole on every rank, and sharded
    by `initialize` all the same.

    Example:
        >>> with deepspeed.zero.Init(config_dict_or_path="ds_config.json"):
        ...     model = Model()
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
    ) -> None:
        """Take the arguments of DeepSpeed's.

        Args:
            module: without effect: a module that is there has its values, and `initialize` shards it.
            data_parallel_group: None; the mesh follows from the JSON.
            mem_efficient_linear: without effect: linear layers are torch's.
            remote_device: None, or "none"; where parameters lie is said by offload_param in the JSON.
            pin_memory: without effect: as the JSON says.
            config_dict_or_path: without effect: `initialize` is given it too.
            config: likewise.
            enabled: False does nothing.
            dtype: without effect: values are drawn in torch's default dtype, and the JSON says in which is computed.
            mpu: None.

        Raises:
            UnsupportedError: an argument asks for what is not there.
        """
        asked = {
            "data_parallel_group": data_parallel_group,
            "remote_device": None if remote_device == "none" else remote_device,
            "mpu": mpu,
        }
        if wrong := [name for name, value in asked.items() if value is not None]:
            raise UnsupportedError(
                f"zero.Init({', '.join(f'{name}=...' for name in wrong)}): offload and groups are said in the JSON for "
                "initialize. Leave it out."
            )
        self._is_enabled = enabled and module is None
        self._deferred = Deferred()
        self._stack = ExitStack()

    def __enter__(self) -> Init:
        """Begin to build."""
        if self._is_enabled and not _open:
            _open.append(self)
            self._stack.enter_context(self._deferred.building())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End it; an error of something that needs values says what to do."""
        if self not in _open:
            return
        _open.remove(self)
        self._stack.__exit__(kind, error, traceback)
        if error is None:
            _waiting.append(self._deferred)
        elif REMEDY in str(error):
            said = str(error).replace(REMEDY, "")
            raise UnsupportedError(
                f"zero.Init: {said} Build the model without zero.Init, whole on every rank."
            ) from error


def end_init(model: nn.Module) -> None:
    """Leave what is to be computed with the model that it belongs to.

    Args:
        model: built under `Init`, or not.

    Raises:
        UnsupportedError: it would not be what a plain build makes.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for deferred in list(_waiting):
        if not any(deferred.knows(tensor) for tensor in tensors):
            continue
        _waiting.remove(deferred)
        if (gap := deferred.gap(model)) is not None:
            raise UnsupportedError(f"zero.Init: {gap}. Build the model without zero.Init, whole on every rank.")
        attach(model, deferred)


@contextmanager
def GatheredParameters(  # noqa: N802 - DeepSpeed's name
    params: Any,
    modifier_rank: int | None = None,
    fwd_module: nn.Module | None = None,
    enabled: bool = True,
) -> Iterator[None]:
    """Hold whole parameters instead of shards for a while, on every rank; all must enter and leave together.

    Args:
        params: a parameter, several, or a module. Those that are not sharded, or not yet, stay as they are.
        modifier_rank: whose changes in place are kept; None: they are only read.
        fwd_module: without effect: parameters are found by themselves.
        enabled: False does nothing.

    Raises:
        ConfigError: parameters were changed, and `modifier_rank` is None; they have the changes of rank 0.
        UnsupportedError: parameters have no values yet, since they were built under `zero.Init`.

    Example:
        >>> with deepspeed.zero.GatheredParameters(list(model.head.parameters()), modifier_rank=0):
        ...     model.head.weight.data.zero_()
    """
    parameters = _parameters(params)
    if any(parameter.is_meta for parameter in parameters) and enabled:
        raise UnsupportedError(
            "GatheredParameters was given parameters that were built under zero.Init: they get values in initialize. Use it "
            "after initialize, or build the model without zero.Init."
        )
    engine = engine_of(parameters) if enabled else None
    if engine is None:
        yield
        return
    strategy: Any = engine.fabric.strategy
    names = engine.names_by_id()
    asked = [(names[id(parameter)], parameter) for parameter in parameters if id(parameter) in names]
    with strategy.gathered([engine.module.get_parameter(name) for name, _ in asked]):
        whole = {name: engine.module.get_parameter(name) for name, _ in asked}
        before = {name: parameter._version for name, parameter in whole.items()}
        with answering_as([(parameter, whole[name]) for name, parameter in asked]):
            yield
        changed = [name for name, parameter in whole.items() if parameter._version != before[name]]
        if modifier_rank is not None:
            for parameter in whole.values():
                dist.broadcast(parameter.data, src=modifier_rank)
        elif changed:
            raise ConfigError(
                f"{changed[0]!r} was changed inside of GatheredParameters without modifier_rank. Say whose change is kept: "
                "modifier_rank=0."
            )


def _parameters(params: Any) -> list[nn.Parameter]:
    if isinstance(params, nn.Module):
        return list(params.parameters())
    found = [params] if isinstance(params, torch.Tensor) else list(params) if isinstance(params, Iterable) else [params]
    if not all(isinstance(each, torch.Tensor) for each in found):
        raise ConfigError(f"GatheredParameters was given {type(params).__name__}. Give parameters, or a module.")
    return [each for each in found if isinstance(each, nn.Parameter)]
