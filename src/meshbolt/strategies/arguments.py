"""The arguments of a strategy beside its settings, those that Lightning's own strategies have: what each may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

from meshbolt.config import Settings
from meshbolt.errors import ConfigError

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]
DEFAULT_TIMEOUT = timedelta(minutes=30)


class Argument(NamedTuple):
    """What an argument may be.

    Attributes:
        is_right: tells of a value other than the default.
        expected: ends the message about a wrong one: what it must be, and how to say so.
        default: what stands for nothing given.
    """

    is_right: Callable[[Any], bool]
    expected: str
    default: Any = None


def _is_backend(value: Any) -> bool:
    """Return whether a value names backends that torch knows, such as "gloo" or "cpu:gloo,cuda:nccl"."""
    if not isinstance(value, str):
        return False
    return all(part.rpartition(":")[2].lower() in dist.Backend.backend_list[1:] for part in value.split(","))


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, kind) for each in value)


def _anything(_value: Any) -> bool:
    """Leave it to the code that takes the value."""
    return True


ARGUMENTS: Mapping[str, Argument] = MappingProxyType(
    {
        "accelerator": Argument(
            lambda value: isinstance(value, Accelerator),
            "must be an Accelerator of Lightning's. Leave it out here and give its name to the Trainer or Fabric: "
            'accelerator="cpu"',
        ),
        "parallel_devices": Argument(
            lambda value: _is_list_of(torch.device, value),
            'must be a list of torch.device, such as [torch.device("cpu")] * 2. Leave it out here and give their number to the '
            "Trainer or Fabric: devices=2",
        ),
        "cluster_environment": Argument(
            lambda value: isinstance(value, ClusterEnvironment),
            "must be a ClusterEnvironment of Lightning's, such as SLURMEnvironment(). Leave it out to have it found",
        ),
        "checkpoint_io": Argument(_anything, ""),
        "precision_plugin": Argument(_anything, ""),
        "process_group_backend": Argument(
            _is_backend,
            'must be a backend that torch knows: "gloo", "nccl" or such. Leave it out for the device\'s own',
        ),
        "timeout": Argument(
            lambda value: isinstance(value, timedelta) and value > timedelta(0),
            "must be a positive timedelta. Write datetime.timedelta(seconds=30), for half a minute",
            DEFAULT_TIMEOUT,
        ),
        "start_method": Argument(
            lambda value: value in get_args(StartMethod), f"must be one of {', '.join(get_args(StartMethod))}", "popen"
        ),
    }
)


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check values as soon as they are given, whatever will be made of them.

    Args:
        given: by name.

    Raises:
        ConfigError: one of them is wrong by itself.
    """
    for name, value in given.items():
        argument = ARGUMENTS[name]
        if value != argument.default and not argument.is_right(value):
            raise ConfigError(f"{name}={value!r} {argument.expected}.")


def written_call(call: str, settings: Settings, others: Mapping[str, Any]) -> str:
    """Return the call that makes a strategy: its stage, and whatever is not the default.

    Args:
        call: what is called.
        settings: of the strategy.
        others: its other arguments.
    """
    written = settings.written()
    written.update({name: repr(value) for name, value in others.items() if value != ARGUMENTS[name].default})
    return f"{call}({', '.join(f'{name}={value}' for name, value in written.items())})"
