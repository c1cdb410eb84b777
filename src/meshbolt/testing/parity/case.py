"""One comparison: which module, on which data, under which strategy, driven how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
from torch.utils.data import Dataset, DistributedSampler, default_collate

from meshbolt.errors import ConfigError
from meshbolt.plugins import MeshPrecision, MixedPrecision
from meshbolt.precision import precision_policy
from meshbolt.tensor import NODE

ModuleFactory: TypeAlias = Callable[[], pl.LightningModule]
Strategy: TypeAlias = "str | Mapping[str, Any] | Callable[[], Any]"
Loop: TypeAlias = Literal["trainer", "fabric"]
Data: TypeAlias = "Sequence[Any] | Dataset[Any]"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module, its data and a strategy, to be compared with one process.

    Attributes:
        module: makes the LightningModule; called in every process.
        data: batches in the order (window, batch of the window, rank), or a map-style dataset of samples.
        strategy: name of a preset, the arguments of `MeshStrategy`, or a function that makes one.
        ranks: number of ranks.
        steps: number of optimizer steps.
        batch_size: samples per batch on each rank, where `data` is a dataset.
        loop: who runs the steps.
        precision: a flag of Lightning, or a function that makes one of `meshbolt.plugins`.
        accumulate_grad_batches: batches per optimizer step on each rank.
        gradient_clip_val: largest norm or value of the gradients; None: not clipped.
        gradient_clip_algorithm: what is bounded by `gradient_clip_val`.
        seed: of the module's weights; rank r trains with the seed `seed + r`.
    """

    module: ModuleFactory
    data: Data
    strategy: Strategy
    ranks: int
    steps: int = 5
    batch_size: int = 4
    loop: Loop = "trainer"
    precision: str | Callable[[], MeshPrecision] = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("ranks", "steps", "batch_size", "accumulate_grad_batches")}
        wrong = {name: value for name, value in counts.items() if value < 1}
        if wrong:
            raise ConfigError(f"{', '.join(f'{name}={value}' for name, value in wrong.items())}: give at least 1.")
        if self.loop not in ("trainer", "fabric"):
            raise ConfigError(f"loop={self.loop!r} is unknown. Use 'trainer' or 'fabric'.")
        if self.gradient_clip_algorithm not in ("norm", "value"):
            raise ConfigError(f"gradient_clip_algorithm={self.gradient_clip_algorithm!r}: use 'norm' or 'value'.")
        have = len(self.data)  # type: ignore[arg-type]
        if self.ranks % self.sharing:
            raise ConfigError(f"{self.sharing} ranks are to see the same samples, which {self.ranks} ranks cannot do.")
        need = self.num_batches * self.data_ranks * (1 if self.has_batches else self.batch_size)
        if have < need:
            raise ConfigError(
                f"{self.steps} steps of {self.accumulate_grad_batches} batches on {self.ranks} ranks need {need} "
                f"{'batches' if self.has_batches else 'samples'}, and data has {have}. Give more data, or lower steps."
            )

    @property
    def sharing(self) -> int:
        """How many ranks see the same samples."""
        return self._size_of("tensor_parallel") * self._size_of("pipeline_parallel")

    @property
    def is_pipelined(self) -> bool:
        """Whether the module is cut into stages."""
        return self._size_of("pipeline_parallel") > 1

    def data_rank(self, rank: int) -> int:
        """Return which part of the samples a rank sees.

        Args:
            rank: global rank.
        """
        return rank // self._size_of("tensor_parallel") % self.data_ranks

    def has_whole_tensors(self, rank: int) -> bool:
        """Return whether a rank is the first of those that have the same tensors, when they are gathered.

        Args:
            rank: global rank.
        """
        return rank % (self.ranks // self._size_of("pipeline_parallel")) == 0

    def _size_of(self, setting: str) -> int:
        asked = self.strategy
        size: Any = NODE if asked == setting == "tensor_parallel" else 1
        if isinstance(asked, Mapping):
            size = asked.get(setting, 1)
        elif callable(asked):
            size = getattr(asked().settings, setting)
        size = getattr(size, "size", size)
        return self.ranks if size == NODE else int(size)

    @property
    def data_ranks(self) -> int:
        """How many ranks see different samples."""
        return self.ranks // self.sharing

    @property
    def has_batches(self) -> bool:
        """Whether the data are batches, not samples."""
        return isinstance(self.data, Sequence)

    @property
    def num_batches(self) -> int:
        """How many batches each rank trains on."""
        return self.steps * self.accumulate_grad_batches

    def batch(self, index: int, rank: int) -> Any:
        """Return a batch as one rank sees it.

        Args:
            index: number of the batch among the rank's own.
            rank: the rank's place among those that see different samples.
        """
        if self.has_batches:
            return self.data[index * self.data_ranks + rank]
        samples = self._samples_of(rank)[index * self.batch_size : (index + 1) * self.batch_size]
        return default_collate([self.data[sample] for sample in samples])

    def _samples_of(self, rank: int) -> list[int]:
        # Lightning divides a shuffled loader's samples so, in the Trainer and in Fabric.
        data: Any = self.data
        sampler: DistributedSampler[Any] = DistributedSampler(data, self.data_ranks, rank, shuffle=True, seed=self.seed)
        return list(sampler)

    def plugin(self) -> MeshPrecision | None:
        """Return a precision plugin where one is needed: Lightning rewrites the flag `16-mixed` on a CPU."""
        if callable(self.precision):
            return self.precision()
        precision_policy(self.precision)
        return MixedPrecision("16-mixed", "cpu") if self.precision == "16-mixed" else None

    def precision_arguments(self) -> dict[str, Any]:
        """Return the arguments of a Trainer or of Fabric that stand for the precision."""
        plugin = self.plugin()
        return {"precision": self.precision} if plugin is None else {"plugins": [plugin]}

    def make_strategy(self, kind: type[Any]) -> Any:
        """Return the strategy, or the name of a preset.

        Args:
            kind: the class to make it of, where the case has arguments only.
        """
        if isinstance(self.strategy, Mapping):
            return kind(**self.strategy)
        return self.strategy() if callable(self.strategy) else self.strategy
