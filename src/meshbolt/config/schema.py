"""All settings of a strategy, as the user wrote them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from meshbolt.blocks import Recompute
from meshbolt.checkpoint.policy import Checkpoint
from meshbolt.environment import expanded
from meshbolt.errors import ConfigError
from meshbolt.offload.setting import Offload
from meshbolt.pipeline import PipelineParallel
from meshbolt.tensor import TensorParallel
from meshbolt.zero import Zero

T = TypeVar("T")

PLAIN_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "zero": "stage",
        "tensor_parallel": "size",
        "pipeline_parallel": "size",
        "offload": "optimizer",
        "recompute": "mode",
    }
)
"""Settings that may be given as a plain value, and the field that it stands for."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the arguments of a strategy say, each as its dataclass.

    Attributes:
        zero: sharding over the data-parallel ranks.
        tensor_parallel: layers divided among ranks.
        pipeline_parallel: the model cut into stages, which are distributed among ranks.
        offload: what lies in host memory or on a disk.
        recompute: activations computed again in backward.
        compile: compile each repeated block.
        checkpoint: how checkpoints are written and read.
    """

    zero: Zero = field(default_factory=Zero)
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    pipeline_parallel: PipelineParallel = field(default_factory=PipelineParallel)
    offload: Offload = field(default_factory=Offload)
    recompute: Recompute = field(default_factory=Recompute)
    compile: bool = False
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @classmethod
    def from_arguments(
        cls,
        *,
        zero: int | Zero,
        tensor_parallel: int | str | TensorParallel,
        pipeline_parallel: int | PipelineParallel,
        offload: str | Offload | None,
        recompute: str | Recompute,
        compile: bool,
        checkpoint: Checkpoint | None,
    ) -> Settings:
        """Take a strategy's arguments, each a plain value or its dataclass.

        Raises:
            ConfigError: a value is wrong by itself.
            UnsupportedError: a value asks for what this version does not have.
        """
        if not isinstance(compile, bool):
            raise ConfigError(f"compile={compile!r} is a switch. Use True or False.")
        own_zero = _setting("zero", zero, Zero)
        return cls(
            zero=own_zero,
            tensor_parallel=_setting("tensor_parallel", tensor_parallel, TensorParallel),
            pipeline_parallel=_setting("pipeline_parallel", pipeline_parallel, PipelineParallel),
            offload=_offload(_setting("offload", offload, Offload), own_zero),
            recompute=Recompute() if recompute is None else _setting("recompute", recompute, Recompute),
            compile=compile,
            checkpoint=Checkpoint() if checkpoint is None else _setting("checkpoint", checkpoint, Checkpoint),
        )

    def written(self) -> dict[str, str]:
        """Return the arguments that make these settings, as Python writes them: the stage, and all that is not default."""
        written = {}
        for name in (setting.name for setting in dataclasses.fields(self)):
            value, default = getattr(self, name), getattr(Settings(), name)
            if name == "zero" or value != default:
                written[name] = repr(_plain(name, value, default))
        return written


def _setting(name: str, value: Any, kind: type[T]) -> T:
    """Return a setting as its dataclass, where it may be a plain value that stands for one field of it."""
    if isinstance(value, kind):
        return value
    fields = [each.name for each in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if isinstance(value, Mapping) and set(value) <= set(fields):
        written = ", ".join(f"{key}={item!r}" for key, item in value.items())
        raise ConfigError(f"{name}={value!r} is a dictionary. Write {name}={kind.__name__}({written}).")
    if name not in PLAIN_FIELDS or isinstance(value, Mapping):
        raise ConfigError(
            f"{name}={value!r} is not a {kind.__name__}. Write {name}={kind.__name__}(...); it has {', '.join(fields)}."
        )
    return kind(**{PLAIN_FIELDS[name]: value})


def _offload(setting: Offload, zero: Zero) -> Offload:
    """Return what is offloaded with its path as it is meant, where it goes with the ZeRO stage.

    Raises:
        ConfigError: parameters are to lie elsewhere and are not gathered piece by piece; or the path has an unset variable.
    """
    if setting.parameters is not None and zero.stage != _GATHERS_BY_UNIT:
        raise ConfigError(
            f"Offload(parameters={setting.parameters!r}) with zero={zero.stage}: this stage holds all parameters on each device "
            "through a step, so that nothing would be saved. Use zero=3."
        )
    if setting.path is None:
        return setting
    return dataclasses.replace(setting, path=expanded(str(setting.path), asked=f"Offload(path={str(setting.path)!r})"))


_GATHERS_BY_UNIT = 3


def _plain(name: str, value: Any, default: Any) -> Any:
    """Return the plain value that stands for a setting, where there is one."""
    field = PLAIN_FIELDS.get(name)
    if field is None:
        return value
    given, usual = dataclasses.asdict(value), dataclasses.asdict(default)
    if any(given[key] != usual[key] for key in given if key != field):
        return value
    return getattr(value, field)
