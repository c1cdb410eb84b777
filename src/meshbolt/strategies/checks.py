"""What a Trainer can be told that this strategy cannot do: refused by name, before anything starts."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.plugins import MeshCheckpointIO
from meshbolt.strategies.compat import WrappingCheckpointIO, asked_precision, is_compiled, time_between_validations

REFUSED_CALLBACKS: Mapping[str, str] = MappingProxyType(
    {
        "StochasticWeightAveraging": (
            "it copies the whole module on every rank. Use meshbolt.callbacks.ExponentialMovingAverage, which keeps the "
            "average sharded"
        ),
        "WeightAveraging": (
            "it copies the whole module on every rank. Use meshbolt.callbacks.ExponentialMovingAverage, which keeps the "
            "average sharded"
        ),
        "ModelPruning": "it masks whole parameters in place. Prune in one process after training",
    }
)


def check_trainer(trainer: pl.Trainer, *, world_size: int) -> None:
    """Refuse callbacks and flags that would corrupt or hang a sharded run.

    Args:
        trainer: with its callbacks and flags.
        world_size: number of ranks.

    Raises:
        ConfigError: a flag contradicts the strategy.
        UnsupportedError: a callback or a flag cannot be honoured.
    """
    asked, used = asked_precision(trainer), trainer.strategy.precision_plugin.precision
    if asked not in ("32-true", used):
        raise ConfigError(
            f"The Trainer was given precision={asked!r}, and its strategy a precision_plugin for {used!r}, which would win "
            "without a word. Give one of them only."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _check_callback(callback)
    if world_size > 1 and (seconds := time_between_validations(trainer)) is not None:
        raise UnsupportedError(
            f"val_check_interval of {seconds:g} s compares the clock of each rank by itself, so ranks could start validation "
            "at different batches and hang. Give val_check_interval a number of batches or a share of an epoch."
        )
    if trainer.strategy._layer_sync is not None and trainer.strategy.root_device.type == "cpu":  # type: ignore[attr-defined]
        raise UnsupportedError(
            "sync_batchnorm=True needs GPUs: torch's SyncBatchNorm does not run on a CPU. Set sync_batchnorm=False; each "
            "rank then normalises by its own batch."
        )


def check_pipelined(trainer: pl.Trainer) -> None:
    """Refuse what cannot be with a model whose stages are on different ranks.

    Args:
        trainer: with its module.

    Raises:
        UnsupportedError: there is such a thing.
    """
    module = trainer.lightning_module
    name = type(module).__name__
    if trainer.state.fn == TrainerFn.FITTING and not module.automatic_optimization:
        raise UnsupportedError(
            f"{name} optimises by itself (automatic_optimization = False). Under pipeline parallelism forward and backward "
            "passes of microbatches take turns, so that no code of its own could stand between them. Use automatic "
            "optimisation, or train without pipeline_parallel."
        )
    for step in ("training_step", "validation_step", "test_step", "predict_step"):
        if is_param_in_hook_signature(getattr(module, step), "dataloader_iter", explicit=True):
            raise UnsupportedError(
                f"{name}.{step} takes a dataloader_iter, so that it would take another batch for each microbatch and stage. Let "
                "it take a batch, which pipeline parallelism divides."
            )


def refuse_compiled(module: pl.LightningModule | None) -> None:
    """Refuse a LightningModule that was compiled as a whole.

    Raises:
        UnsupportedError: it was.
    """
    if is_compiled(module):
        raise UnsupportedError(
            f"{type(module).__name__} was compiled as a whole with torch.compile, which would compile the gathering of its "
            "parameters too. Hand over the plain module and set MeshStrategy(compile=True): each repeated block is compiled."
        )


def refuse_skipped_batch(module: pl.LightningModule, output: Any) -> None:
    """Refuse a training_step without a loss where other ranks may have one, and would wait for this rank in backward.

    Args:
        module: whose training_step it was.
        output: what it returned.

    Raises:
        UnsupportedError: in automatic optimisation on more than one rank, nothing was returned.
    """
    trainer = module.trainer
    if output is None and module.automatic_optimization and trainer.world_size > 1:
        raise UnsupportedError(
            f"{type(module).__name__}.training_step returned None on rank {trainer.global_rank} of {trainer.world_size}. A rank "
            "that skips a batch leaves the others waiting for its gradients. Return a loss without weight instead, such as "
            "0.0 * loss, or leave such samples out of the dataset."
        )


def refuse_foreign(module: nn.Module, *, sharded: Iterable[nn.Module], parameters: Container[nn.Parameter]) -> None:
    """Refuse to gather a module that has nothing to do with those that were sharded.

    Args:
        module: the one that is to be gathered.
        sharded: the users' modules, whole.
        parameters: theirs, which any other module may hold too.

    Raises:
        ConfigError: it is none of them, nor a part of one, nor made of their parameters.
    """
    if any(module is part for whole in sharded for part in whole.modules()):
        return
    if not all(parameter in parameters for parameter in module.parameters()):
        names = [type(whole).__name__ for whole in sharded]
        raise ConfigError(
            f"{type(module).__name__} is not part of a module that this strategy has sharded ({', '.join(names) or 'none yet'}), "
            "so there is nothing to gather. Give the module that was handed to the Trainer or Fabric, or one inside it."
        )


def mesh_io_inside(io: CheckpointIO) -> MeshCheckpointIO:
    """Return meshbolt's CheckpointIO plugin inside those that the user has put around it, or put one there.

    Args:
        io: the outermost.

    Raises:
        UnsupportedError: one of them cannot be honoured.
    """
    inner: CheckpointIO | None = io
    while isinstance(inner, WrappingCheckpointIO):
        if isinstance(inner, AsyncCheckpointIO):
            raise UnsupportedError(
                f"The CheckpointIO plugin {type(inner).__name__} saves in a thread of one rank, while checkpoints of meshbolt "
                "are written by all ranks together. Leave it out and use MeshStrategy(checkpoint=Checkpoint(asynchronous=True))."
            )
        if inner.checkpoint_io is None:
            inner.checkpoint_io = MeshCheckpointIO()
        inner = inner.checkpoint_io
    if isinstance(inner, MeshCheckpointIO):
        return inner
    raise UnsupportedError(
        f"The CheckpointIO plugin {type(inner).__name__} saves one rank's dictionary by itself, while checkpoints of meshbolt "
        "are directories that all ranks write together. Leave it out; or derive it from Lightning's _WrappingCheckpointIO and "
        "put it around meshbolt.plugins.MeshCheckpointIO()."
    )


def _check_callback(callback: Callback) -> None:
    for kind in type(callback).__mro__:
        if kind.__name__ in REFUSED_CALLBACKS and kind.__module__.startswith(("lightning.", "pytorch_lightning.")):
            raise UnsupportedError(
                f"The callback {type(callback).__name__} cannot be used on a sharded module: "
                f"{REFUSED_CALLBACKS[kind.__name__]}."
            )
