"""The engine of a `PipelineModule`: a whole window of microbatches at a time, through all stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DistributedSampler

from meshbolt.compat import tree_map
from meshbolt.deepspeed.data import RepeatingLoader
from meshbolt.deepspeed.engine import DeepSpeedEngine
from meshbolt.deepspeed.pipe import PipelineModule
from meshbolt.deepspeed.topology import PipelineParallelGrid
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.pipeline import Microbatches

_ONLY = (
    "engine.{name} was called on the engine of a PipelineModule, whose passes of different microbatches take turns. Call "
    "engine.train_batch(data_iter) for a whole window of microbatches and the step after it, engine.eval_batch(data_iter) to "
    "evaluate."
)
_HAS, _ENDED, _NONE = "has data", "is at its end", "has none"


class _Labels:
    """Labels as they are: floating ones are not rounded with the inputs."""

    def __init__(self, value: Any) -> None:
        self.value = value


class PipelineEngine(DeepSpeedEngine):
    """Trains a `PipelineModule` by `loss = engine.train_batch(data_iter)`.

    Attributes:
        num_stages: of the pipeline.
        stage_id: this rank's.
        grid: where this rank stands.
        agg_train_loss: that of the last `train_batch`.
    """

    module: PipelineModule

    def __init__(self, module: PipelineModule, **options: Any) -> None:
        """Take a module that is cut and sharded next.

        Args:
            module: the caller's own.
            options: as `DeepSpeedEngine` has them.
        """
        super().__init__(module, **options)
        self.num_stages, self.stage_id = module.num_stages, module.stage_id
        self.prev_stage, self.next_stage = self.stage_id - 1, self.stage_id + 1
        self.grid: PipelineParallelGrid = module.mpu()
        self.data_iterator: Iterator[Any] | None = None
        self.batch_fn: Callable[[Any], Any] | None = None
        self.agg_train_loss: torch.Tensor | None = None

    # Data -----------------------------------------------------------------------------------------------------------------

    def take_training_data(self, dataset: Any) -> None:
        """Read batches from a dataset in its order, from its beginning again when it is through.

        Args:
            dataset: of all ranks.
        """
        strategy = self._run.strategy
        sampler: Any = None
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            ranks, rank = strategy.data_parallel_size, strategy.data_parallel_rank
            sampler = DistributedSampler(dataset, ranks, rank, shuffle=False)
        self.set_dataloader(RepeatingLoader(self.deepspeed_io(dataset, data_sampler=sampler)))

    def set_dataloader(self, loader: Any) -> None:
        """Read batches from a loader where `train_batch` is given nothing; on every rank.

        Args:
            loader: of this rank's samples.
        """
        self.training_dataloader, self.data_iterator = loader, iter(loader)

    def set_dataiterator(self, iterator: Iterator[Any] | None) -> None:
        """Read batches from an iterator where `train_batch` is given nothing.

        Args:
            iterator: of this rank's batches.
        """
        self.training_dataloader, self.data_iterator = None, iterator

    def set_batch_fn(self, fn: Callable[[Any], Any] | None) -> None:
        """Change every microbatch before it is used.

        Args:
            fn: takes what the iterator gives, and returns (inputs, labels).
        """
        self.batch_fn = fn

    def _take(self, data_iter: Iterator[Any] | None, count: int) -> tuple[Any, ...]:
        """Return the next microbatches; a rank without an iterator gets them from one of its pipeline.

        Raises:
            StopIteration: on every rank, where one of them has too few.
            ConfigError: no rank of the pipeline has an iterator.
            Exception: what the iterator of a rank has raised, on every rank.
        """
        parts: list[Any] = []

        def draw() -> str:
            if data_iter is None:
                return _NONE
            if not hasattr(data_iter, "__next__"):
                raise ConfigError(
                    f"data_iter is a {type(data_iter).__name__}, which begins again with every use. Give iter(loader), "
                    "the same one for each step."
                )
            for _ in range(count):
                try:
                    batch = next(data_iter)
                except StopIteration:
                    return _ENDED
                parts.append(self._in_form(batch))
            return _HAS

        strategy = self._run.strategy
        by_rank = strategy.told_by_ranks(draw)
        if _ENDED in by_rank:
            short = [rank for rank, each in enumerate(by_rank) if each == _ENDED]
            raise StopIteration(f"The iterator of rank {short[0]} has fewer than the {count} microbatches of a step.")
        own = [rank for rank in range(len(by_rank)) if self._data_rank(rank) == self._data_rank(self.global_rank)]
        having = [rank for rank in own if by_rank[rank] == _HAS]
        if not having:
            raise ConfigError(
                "There is no iterator to take microbatches from. Give engine.train_batch(data_iter=iter(loader)), or "
                "initialize(training_data=...), or call engine.set_dataloader(loader)."
            )
        if len(having) < len(own):
            parts = strategy.given_to_copies(parts, source=having[0])
        return tuple(tree_map(self._placed, part) for part in parts)

    def _data_rank(self, rank: int) -> int:
        return self._run.strategy.plan.mesh.data_parallel_rank(rank)

    def _in_form(self, batch: Any) -> tuple[Any, Any]:
        if self.batch_fn is not None:
            batch = self.batch_fn(batch)
        if not isinstance(batch, (tuple, list)) or len(batch) < 1 + (self.module.loss_fn is not None):
            raise ConfigError(
                f"A microbatch is a {type(batch).__name__}, and has to be (inputs, labels): tensors, or tuples of them. Return "
                "that from the dataset, or change it by engine.set_batch_fn(fn)."
            )
        inputs, *labels = batch
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        label = labels[0] if labels else None
        return inputs, tuple(label) if isinstance(label, list) else label

    def _placed(self, leaf: Any) -> Any:
        return leaf.detach().to(self.device) if isinstance(leaf, torch.Tensor) else leaf

    # Steps ----------------------------------------------------------------------------------------------------------------

    @property
    def micro_batches(self) -> int:
        """Microbatches of a step."""
        return self.gradient_accumulation_steps()

    @property
    def micro_batch_size(self) -> int:
        """Samples of a microbatch."""
        return self.train_micro_batch_size_per_gpu()

    @property
    def _is_cut(self) -> bool:
        return self.num_stages > 1

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """Run the microbatches of a window forwards and backwards, update, and step the scheduler.

        Args:
            data_iter: gives (inputs, labels) for as many microbatches as `gradient_accumulation_steps`; None: that of before.

        Returns:
            The mean of the losses of all microbatches on all data-parallel ranks, on every rank; a tensor with one number.

        Raises:
            StopIteration: on every rank, where the iterator of one has too few microbatches.
            ConfigError: there is nothing to take microbatches from, or no optimizer.
        """
        if not torch.is_grad_enabled():
            raise ConfigError(
                "engine.train_batch was called with gradients disabled. Call engine.eval_batch to evaluate."
            )
        self._need_optimizer("train_batch")
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        count = self.gradient_accumulation_steps()
        parts = self._take(self.data_iterator, count)
        self.train()
        if self._is_cut:
            wrapped = tuple((inputs, _Labels(labels)) for inputs, labels in parts)
            loss = self._run.strategy.pipeline_step(Microbatches(wrapped), self._loss)
            self._backwards += 1
            self._update(None)
            self.micro_steps += count
        else:
            loss = self._train_here(parts)
        self.agg_train_loss = self._over_ranks(loss)
        return self.agg_train_loss

    def _train_here(self, parts: tuple[Any, ...]) -> torch.Tensor:
        losses = []
        for inputs, labels in parts:
            outputs = super().forward(inputs)
            loss = outputs if self.module.loss_fn is None else self.module.loss_fn(outputs, labels)
            super().backward(loss)
            super().step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _loss(self, module: nn.Module, part: tuple[Any, _Labels]) -> Any:
        outputs = module(part[0])
        return outputs if self.module.loss_fn is None else self.module.loss_fn(outputs, part[1].value)

    def _over_ranks(self, value: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = self._run.strategy.all_reduce(value.detach().float(), None, "mean")
        return mean

    def eval_batch(
        self,
        data_iter: Iterator[Any],
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Run microbatches forwards only, without gradients; the module is in evaluation mode from then on.

        Args:
            data_iter: gives (inputs, labels).
            return_logits: also return what the last layer has returned for the last microbatch; None on other stages.
            compute_loss: apply `loss_fn`; False: what the last layer returns is what is reduced and returned, on the last stage.
            reduce_output: "avg" over microbatches and data-parallel ranks; None: a list with what came of each microbatch.
            bcast_loss: return a reduced loss on every stage, not only on the last one.
            num_micro_batches: to take; None: as many as in training.

        Returns:
            The mean loss, or what was asked for instead; with `return_logits` a pair.

        Raises:
            StopIteration: on every rank, where the iterator of one has too few microbatches.
            ConfigError: the arguments are wrong.
        """
        if reduce_output not in ("avg", None):
            raise ConfigError(f"eval_batch(reduce_output={reduce_output!r}): use 'avg', or None for a list.")
        count = self.gradient_accumulation_steps() if num_micro_batches is None else num_micro_batches
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"eval_batch(num_micro_batches={count!r}): give 1 or more.")
        parts = self._take(data_iter, count)
        self.eval()
        found = self._evaluated(parts, compute_loss=compute_loss, return_logits=return_logits)
        result = self._reduced([value for value, _ in found]) if reduce_output else [value for value, _ in found]
        is_told = compute_loss and bcast_loss and reduce_output is not None
        result = result if is_told or self.is_last_stage() else None
        if not return_logits:
            return result
        return result, found[-1][1] if self.is_last_stage() else None

    def _evaluated(self, parts: tuple[Any, ...], *, compute_loss: bool, return_logits: bool) -> list[tuple[Any, Any]]:
        """Return of each microbatch what is reduced, and the outputs where they are asked for."""
        loss_fn = self.module.loss_fn if compute_loss else None

        def evaluate(module: Callable[[Any], Any], part: tuple[Any, _Labels]) -> tuple[Any, Any]:
            outputs = module(part[0])
            value = outputs if loss_fn is None else loss_fn(outputs, part[1].value)
            return value, outputs if return_logits else None

        wrapped = tuple((inputs, _Labels(labels)) for inputs, labels in parts)
        if self._is_cut:
            told: list[tuple[Any, Any]] = self._run.strategy.pipeline_evaluate(Microbatches(wrapped), evaluate)
            return told
        forward = super().forward
        with torch.no_grad():
            return [evaluate(forward, part) for part in wrapped]

    def _reduced(self, values: list[Any]) -> Any:
        if isinstance(values[0], (tuple, list)):
            return [self._reduced(list(each)) for each in zip(*values, strict=True)]
        return self._over_ranks(torch.stack([value.float() for value in values]).mean(0))

    # What is asked of it --------------------------------------------------------------------------------------------------

    def is_first_stage(self) -> bool:
        """Return whether this rank has the first stage."""
        return self.stage_id == 0

    def is_last_stage(self) -> bool:
        """Return whether this rank has the last stage, which computes the loss."""
        return self.stage_id == self.num_stages - 1

    def get_pipeline_parallel_rank(self) -> int:
        """Return the stage of this rank."""
        return self.stage_id

    def get_additional_losses(self) -> None:
        """Return None: one loss is reported."""
        return

    def reset_activation_shape(self) -> None:
        """Do nothing: shapes may change with every microbatch."""

    # What is not there ----------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(_ONLY.format(name="forward"))

    def backward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(_ONLY.format(name="backward"))

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(_ONLY.format(name="step"))
