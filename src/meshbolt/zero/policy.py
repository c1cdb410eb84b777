"""ZeRO stages as values: what stays gathered, and when gradients travel.

| stage | parameters | gradients of a batch that is not the window's last |
|---|---|---|
| 0 | whole on every rank | kept whole, not communicated |
| 1 | gathered once a step, resharded after the last backward | kept whole, not communicated |
| 2 | as 1 | reduce-scattered at once; only the shard is kept |
| 3 | gathered for each block's forward and again for its backward | reduce-scattered at once |

A window is the k batches of one optimizer step. Optimizer state is sharded in every stage but 0.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from meshbolt.errors import ConfigError

REDUCE_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Zero:
    """How parameters, gradients and optimizer state are sharded over the data-parallel ranks.

    Attributes:
        stage: 0, 1, 2 or 3; each shards what the one before does, and more.
        replicate: copies of the sharded state (HSDP); it divides the data-parallel ranks. 1: no copies.
        unit: class names or module paths that share one all-gather each; "auto" takes the model's repeated blocks.
        reduce_dtype: dtype in which gradients are summed over ranks; "auto": float32 for 16-bit parameters, else the
            parameter's own.
    """

    stage: int = 3
    replicate: int = 1
    unit: str | list[str] = "auto"
    reduce_dtype: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.stage, bool) or not isinstance(self.stage, int) or self.stage not in POLICIES:
            raise ConfigError(f"zero={self.stage!r} is not a ZeRO stage. Use 0, 1, 2 or 3.")
        if isinstance(self.replicate, bool) or not isinstance(self.replicate, int) or self.replicate < 1:
            raise ConfigError(
                f"Zero(replicate={self.replicate!r}) must be a positive number of copies; 1 means no copies."
            )
        if self.stage == 0 and self.replicate != 1:
            raise ConfigError(
                f"Zero(stage=0, replicate={self.replicate}): stage 0 keeps everything whole on every rank, so there is no "
                "sharded state to copy. Use stage 1, 2 or 3 with replicate, or stage 0 without."
            )
        named = [self.unit] if isinstance(self.unit, str) else self.unit
        if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) and name for name in named):
            raise ConfigError(
                f"Zero(unit={self.unit!r}) names no modules. Give class names or module paths, as a string or a list of "
                "strings, or 'auto'."
            )
        if self.reduce_dtype not in REDUCE_DTYPES:
            raise ConfigError(
                f"Zero(reduce_dtype={self.reduce_dtype!r}) is unknown. Use one of {', '.join(REDUCE_DTYPES)}."
            )

    @property
    def unit_names(self) -> Sequence[str] | None:
        """The user's units, or None where they are to be found in the model."""
        if self.unit == "auto":
            return None
        return [self.unit] if isinstance(self.unit, str) else list(self.unit)


@dataclass(frozen=True, kw_only=True)
class StagePolicy:
    """What one ZeRO stage means in the terms of torch's `fully_shard`.

    Attributes:
        stage: its number.
        shards: whether the state is sharded over `dp_shard` (else replicated).
        reshards_after_forward: gather again for backward instead of keeping the parameters whole in between.
        reduces_every_batch: communicate the gradients of every batch of a window, not only of the last.
    """

    stage: int
    shards: bool
    reshards_after_forward: bool
    reduces_every_batch: bool


POLICIES = MappingProxyType(
    {
        0: StagePolicy(stage=0, shards=False, reshards_after_forward=False, reduces_every_batch=False),
        1: StagePolicy(stage=1, shards=True, reshards_after_forward=False, reduces_every_batch=False),
        2: StagePolicy(stage=2, shards=True, reshards_after_forward=False, reduces_every_batch=True),
        3: StagePolicy(stage=3, shards=True, reshards_after_forward=True, reduces_every_batch=True),
    }
)
