"""The optimizer and the schedule that a file names, as torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch.optim import Optimizer

from meshbolt.deepspeed_json.given import Given
from meshbolt.deepspeed_json.key import IGNORED, MAPPED
from meshbolt.deepspeed_json.schedules import ONE_CYCLE, SCHEDULES
from meshbolt.errors import ConfigError, UnsupportedError, did_you_mean

_OPTIMIZER, _SCHEDULER = "optimizer", "scheduler"
_ADAM = ("adam", "adamw")
_OWN_WORDS = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")  # of DeepSpeed's Adam, beside torch's arguments
_KERNELS = ("bias_correction", "set_grad_none")
REFUSED_OPTIMIZERS: Mapping[str, str] = MappingProxyType(
    {
        "lamb": "torch has no LAMB",
        "lion": "torch has no Lion",
        "muon": "it looks at whole matrices, and its groups are chosen by hand",
        "muadam": "it needs the package mup",
        "muadamw": "it needs the package mup",
        "musgd": "it needs the package mup",
        "onebitadam": "DeepSpeed 0.19.8 has removed it",
        "onebitlamb": "DeepSpeed 0.19.8 has removed it",
        "zerooneadam": "DeepSpeed 0.19.8 has removed it",
    }
)
LATE: Mapping[str, str] = MappingProxyType(
    {"total_num_steps": "trainer.estimated_stepping_batches", "warmup_max_lr": "the optimizer's lr"}
)
"""Arguments of schedules that follow from the run where they are "auto", and from what."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """An optimizer or a schedule that a file names.

    Attributes:
        source: the file.
        kind: its class.
        arguments: for the class.
        missing: arguments that are "auto" in the file without a value and without a default.
    """

    source: str
    kind: Callable[..., Any]
    arguments: Mapping[str, Any]
    missing: tuple[str, ...] = ()

    def build(self, first: Any, **late: Any) -> Any:
        """Make it.

        Args:
            first: parameters of an optimizer; the optimizer of a schedule.
            late: values for arguments that were missing.

        Raises:
            ConfigError: an argument is missing, or a value is wrong.
        """
        if lacking := [name for name in self.missing if name.rpartition(".")[2] not in late]:
            raise ConfigError(
                f'{self.source}: {lacking[0]!r} is "auto", and nobody has filled it in. Give auto={{{lacking[0]!r}: ...}}, '
                "write it into the file, or return an optimizer from configure_optimizers."
            )
        name = getattr(self.kind, "__name__", str(self.kind))
        try:
            return self.kind(first, **self.arguments, **late)
        except ConfigError as error:
            raise ConfigError(f"{self.source}: {error}") from error
        except Exception as error:  # whatever torch makes of a wrong value
            written = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
            raise ConfigError(
                f"{self.source}: {name}({written}) cannot be made: {error}. Correct its params."
            ) from error


def optimizer_of(given: Given) -> Named | None:
    """Return the optimizer of a file; None without one.

    Raises:
        ConfigError: its type is unknown, or a parameter is wrong.
        UnsupportedError: torch has nothing of that type.
    """
    params = given.params("optimizer.params")
    kind = given.get("optimizer.type")
    if kind is None:
        _refuse_without_type(given, _OPTIMIZER)
        return None
    if reason := REFUSED_OPTIMIZERS.get(kind.lower()):
        raise UnsupportedError(
            f"{given.source}: 'optimizer.type' is {kind!r}, which is refused: {reason}. Use AdamW, or make an optimizer in "
            "configure_optimizers, and leave the block out."
        )
    if "max_grad_norm" in params:
        raise ConfigError(
            f"{given.source}: 'optimizer.params.max_grad_norm' is no argument of an optimizer. Use 'gradient_clipping'."
        )
    is_adam = kind.lower() in _ADAM
    made = _adam(given, kind.lower(), params) if is_adam else _optimizers().get(_spelled(kind))
    if made is None:
        raise ConfigError(
            f"{given.source}: 'optimizer.type' is {kind!r}, which is unknown{did_you_mean(kind, _optimizers())}."
        )
    if is_adam and not given.get("optimizer.params.torch_adam", False):
        params.setdefault("weight_decay", 0.0)
    named = _named(given, _OPTIMIZER, made, params, needs=("lr",) if "lr" in inspect.signature(made).parameters else ())
    given.note("optimizer.type", f"torch.optim.{made.__name__}")
    if not named.missing:
        named.build([torch.zeros(1, requires_grad=True)])
    return named


def scheduler_of(given: Given) -> Named | None:
    """Return the schedule of a file; None without one.

    Raises:
        ConfigError: its type is unknown, or a parameter is wrong.
    """
    kind = given.get("scheduler.type")
    if kind is None:
        _refuse_without_type(given, _SCHEDULER)
        return None
    made = SCHEDULES.get(kind)
    if made is None:
        raise ConfigError(
            f"{given.source}: 'scheduler.type' is {kind!r}, which is unknown{did_you_mean(kind, SCHEDULES)}."
        )
    params = given.params("scheduler.params")
    _take_last_batch(given, params)
    needs = ("warmup_num_steps", "cycle_min_lr", "cycle_max_lr", *LATE)
    named = _named(given, _SCHEDULER, made, params, needs=[name for name in needs if name in _arguments(made)])
    given.note("scheduler.type", f"meshbolt.deepspeed.{made.__name__}")
    for name, becomes in LATE.items():
        if given.is_auto(f"scheduler.params.{name}"):
            given.note(f"scheduler.params.{name}", becomes, why="auto", outcome=MAPPED)
    if all(key.rpartition(".")[2] in LATE for key in named.missing):
        _try(named)
    return named


def _take_last_batch(given: Given, params: dict[str, Any]) -> None:
    """Take DeepSpeed's `last_batch_iteration` out where it says that the schedule begins."""
    value = params.pop("last_batch_iteration", -1)
    if value != -1 or isinstance(value, bool):
        raise ConfigError(
            f"{given.source}: 'scheduler.params.last_batch_iteration' is {value!r}. Leave it out, or write -1: a schedule "
            "goes on where the checkpoint that is resumed says."
        )
    given.note("scheduler.params.last_batch_iteration", "", why="-1: it begins at the beginning", outcome=IGNORED)


def _try(named: Named) -> None:
    """Make the schedule for a parameter of no use, so that wrong values are found where the file is read."""
    values = named.arguments.values()
    groups = max((len(value) for value in values if isinstance(value, list)), default=1)
    trial = torch.optim.Adam([{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(max(1, groups))])
    named.build(trial, **{key.rpartition(".")[2]: 1 for key in named.missing})


def _refuse_without_type(given: Given, block: str) -> None:
    if given.is_auto(f"{block}.type"):
        raise ConfigError(f"{given.source}: '{block}.type' is \"auto\". Name a type, or leave the block out.")
    others = [key for key in given.order if key.startswith(f"{block}.params")]
    if others and block not in given.autos:
        raise ConfigError(f"{given.source}: {others[0]!r} is given without '{block}.type'. Add the type.")


def _adam(given: Given, kind: str, params: dict[str, Any]) -> type[Optimizer]:
    """Return which of torch's two Adams is meant; DeepSpeed takes "Adam" for AdamW unless `adam_w_mode` is false."""
    for name in _OWN_WORDS:
        value = params.pop(name, name == "adam_w_mode")
        if not isinstance(value, bool):
            raise ConfigError(f"{given.source}: 'optimizer.params.{name}' is {value!r}, and needs true or false.")
    decoupled = kind == "adamw" or given.get("optimizer.params.adam_w_mode", True)
    for name, usual in zip(_KERNELS, (True, True), strict=True):
        if (value := params.pop(name, usual)) is not usual and name == "bias_correction":
            raise UnsupportedError(
                f"{given.source}: 'optimizer.params.bias_correction' is {value!r}: torch's Adam always corrects. Leave it out."
            )
        given.note(f"optimizer.params.{name}", "", why="as torch does it", outcome=IGNORED)
    made = torch.optim.AdamW if decoupled else torch.optim.Adam
    given.note("optimizer.params.adam_w_mode", f"torch.optim.{made.__name__}")
    given.note("optimizer.params.torch_adam", "torch.optim", why="true: torch's default for weight_decay; else 0")
    given.note(
        "optimizer.params.fp32_optimizer_states", "", why="state has the dtype of its parameters", outcome=IGNORED
    )
    if kind == "adam" and decoupled:
        given.note("optimizer.type", why='DeepSpeed takes "Adam" for AdamW unless "adam_w_mode" is false')
    return made


def _named(
    given: Given, block: str, kind: Callable[..., Any], params: dict[str, Any], *, needs: Iterable[str]
) -> Named:
    known = _arguments(kind)
    autos = [key for key in given.autos if key.startswith(f"{block}.params.")]
    for name in (*params, *(key.rpartition(".")[2] for key in autos)):
        if name not in known and name not in (*_OWN_WORDS, *_KERNELS):
            raise ConfigError(
                f"{given.source}: '{block}.params' has {name!r}, which is no argument of {getattr(kind, '__name__', kind)}"
                f"{did_you_mean(name, known)}."
            )
    if lacking := [name for name in _required(kind) if name not in params and f"{block}.params.{name}" not in autos]:
        raise ConfigError(
            f"{given.source}: '{block}.params' lacks {', '.join(map(repr, lacking))}, which "
            f"{getattr(kind, '__name__', kind)} needs. Add it."
        )
    for name, value in params.items():
        if f"{block}.params.{name}" not in given.autos:
            given.note(f"{block}.params.{name}", f"{name}={value!r}")
    missing = tuple(key for key in autos if key.rpartition(".")[2] in needs)
    for key in autos:
        if key in missing:
            given.note(
                key, f"auto={{{key!r}: ...}} gives it", why="auto: needed where the block is used", outcome=MAPPED
            )
        elif key not in given.notes:
            given.note(key, "", why="auto: its default", outcome=MAPPED)
    arguments = {
        name: tuple(value) if name == "betas" and isinstance(value, list) else value for name, value in params.items()
    }
    return Named(source=given.source, kind=kind, arguments=arguments, missing=missing)


def _required(kind: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    plain = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    return [each.name for each in plain[1:] if each.default is each.empty]


def _arguments(kind: Callable[..., Any]) -> list[str]:
    names = [
        name for name in inspect.signature(kind).parameters if name not in ("params", "optimizer", "others", "self")
    ]
    return [*names, *ONE_CYCLE] if kind is SCHEDULES["OneCycle"] else names


def _optimizers() -> dict[str, type[Optimizer]]:
    return {
        name: value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type)
        and issubclass(value, Optimizer)
        and value is not Optimizer
        and name not in ("Muon", "LBFGS")
    }


def _spelled(kind: str) -> str:
    """Return a type as torch spells it, where only the case differs."""
    return next((name for name in _optimizers() if name.lower() == kind.lower()), kind)
