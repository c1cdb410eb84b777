"""All settings of a strategy, as the user wrote them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from meshbolt.blocks import Recompute
from meshbolt.checkpoint.policy import Checkpoint
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.zero import Zero


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the arguments of a strategy say, each as its dataclass.

    Attributes:
        zero: sharding over the data-parallel ranks.
        recompute: activations computed again in backward.
        compile: compile each repeated block.
        checkpoint: how checkpoints are written and read.
    """

    zero: Zero = field(default_factory=Zero)
    recompute: Recompute = field(default_factory=Recompute)
    compile: bool = False
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @classmethod
    def from_arguments(
        cls,
        *,
        zero: int | Zero,
        tensor_parallel: int,
        pipeline_parallel: int,
        offload: str | None,
        recompute: str | Recompute,
        compile: bool,
        checkpoint: Checkpoint | None,
    ) -> Settings:
        """Take a strategy's arguments, each a plain value or its dataclass.

        Raises:
            ConfigError: a value is wrong by itself.
            UnsupportedError: a value asks for what this version does not have.
        """
        _refuse_unless(tensor_parallel == 1, f"tensor_parallel={tensor_parallel!r}", "tensor_parallel=1")
        _refuse_unless(pipeline_parallel == 1, f"pipeline_parallel={pipeline_parallel!r}", "pipeline_parallel=1")
        _refuse_unless(offload is None, f"offload={offload!r}", "offload=None")
        if not isinstance(compile, bool):
            raise ConfigError(f"compile={compile!r} is a switch. Use True or False.")
        return cls(
            zero=zero if isinstance(zero, Zero) else Zero(stage=zero),
            recompute=recompute if isinstance(recompute, Recompute) else Recompute(mode=_mode(recompute)),
            compile=compile,
            checkpoint=checkpoint or Checkpoint(),
        )


def _refuse_unless(is_default: bool, asked: str, remedy: str) -> None:
    if not is_default:
        raise UnsupportedError(
            f"{asked} is not available in this version of meshbolt. Use {remedy} with zero=0, 1, 2 or 3."
        )


def _mode(value: Any) -> Any:
    return "none" if value is None else value
