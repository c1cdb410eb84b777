"""Every touch of what Lightning keeps private, in one place; the tests of this file run on every supported version."""

from __future__ import annotations

import functools
import inspect
import signal
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import lightning.pytorch.utilities as lightning_utilities
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher as FabricForkLauncher
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as FabricScriptLauncher
from lightning.fabric.strategies.strategy import _BackwardSyncControl as BackwardSyncControl
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.saving import _load_state
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO as WrappingCheckpointIO
from lightning.pytorch.strategies.launchers.launcher import _Launcher as TrainerLauncher
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher as TrainerForkLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher as TrainerScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException, _TunerExitException
from lightning.pytorch.utilities.migration.utils import _pl_migrate_checkpoint, pl_legacy_patch
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.distributed.distributed_c10d import _get_default_store
from torch.utils.data import DataLoader

from meshbolt.compat import settle_before_exit
from meshbolt.errors import UnsupportedError

__all__ = [
    "BackwardSyncControl",
    "BatchCount",
    "FabricForkLauncher",
    "FabricScriptLauncher",
    "TrainerForkLauncher",
    "TrainerLauncher",
    "TrainerScriptLauncher",
    "WrappingCheckpointIO",
    "asked_precision",
    "built_from",
    "callbacks_of_trainer_in_the_making",
    "connect_ranks",
    "default_backend",
    "default_store",
    "file_is_there",
    "hook_under_way",
    "is_compiled",
    "is_met_by_all",
    "link_instead",
    "loader_of_run",
    "look_before_dividing",
    "note_termination_instead",
    "plain_optimizer",
    "ranks_are_connected",
    "reduce_over_ranks",
    "refuse_norms_of_stages",
    "set_rank_zero_only",
    "skip_broadcast_of_termination",
    "time_between_validations",
    "trainer_of",
    "transferred",
]


Module = TypeVar("Module", bound=pl.LightningModule)


def connect_ranks(environment: ClusterEnvironment, backend: str, *, timeout: timedelta, device: torch.device) -> None:
    """Initialise the default process group, once; ranks start from the seed that `seed_everything` was given.

    Args:
        environment: knows this process's rank and where rank 0 listens.
        backend: "gloo", "nccl" or a combination.
        timeout: how long a collective waits for its peers.
        device: this rank's.
    """
    reset_seed()
    settle_before_exit()
    # Only NCCL makes use of it; torch 2.11 cannot divide a gloo group that was given one.
    device_id = device if "nccl" in backend else None
    _init_dist_connection(environment, backend, timeout=timeout, device_id=device_id)


def set_rank_zero_only(rank: int) -> None:
    """Tell Lightning's helpers which rank this process is."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]


def default_backend(device: torch.device) -> str:
    """Return the backend that Lightning would use on a device."""
    return str(_get_default_process_group_backend_for_device(device))


def default_store() -> Any:
    """Return the store through which the ranks found each other."""
    return _get_default_store()


def ranks_are_connected() -> bool:
    """Return whether the default process group is there."""
    return bool(_distributed_is_initialized())


def reduce_over_ranks(tensor: Any, group: Any, reduce_op: Any) -> Any:
    """Reduce a tensor as `self.log(sync_dist=True)` expects; anything else is returned as it is."""
    return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, torch.Tensor) else tensor


def plain_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside the wrapper that Lightning hands to users, or the optimizer itself."""
    return getattr(optimizer, "_optimizer", optimizer)


def is_compiled(module: pl.LightningModule | None) -> bool:
    """Return whether a LightningModule was given to `torch.compile` as a whole."""
    return getattr(module, "_compiler_ctx", None) is not None


def trainer_of(module: pl.LightningModule | None) -> pl.Trainer | None:
    """Return the Trainer that a module is attached to, if it is; asking the module itself is an error where it is not."""
    return getattr(module, "_trainer", None)


def callbacks_of_trainer_in_the_making() -> list[Any]:
    """Return the callbacks that were given to the Trainer whose constructor is running; none where no one's is.

    A Trainer adds its own to them and keeps no note of which are whose.
    """
    frame = inspect.currentframe()
    while frame is not None:
        is_made = frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), pl.Trainer)
        if is_made and "callbacks" in frame.f_locals:
            given = frame.f_locals["callbacks"] or []
            return list(given) if isinstance(given, (list, tuple)) else [given]
        frame = frame.f_back
    return []


def hook_under_way(trainer: pl.Trainer) -> str:
    """Return the name of the hook that a Trainer has called last and that has not returned; without one "fit" or the like."""
    hook = getattr(trainer.lightning_module, "_current_fx_name", None)
    run = trainer.state.fn
    return str(hook or (run.value if run is not None else "a run"))


def is_met_by_all(error: BaseException) -> bool:
    """Return whether an exception is one by which all ranks end at the same batch, as they have agreed to."""
    return isinstance(error, (SIGTERMException, _TunerExitException))


def loader_of_run(trainer: pl.Trainer) -> Any:
    """Return the first loader of what a Trainer is about to run, as the user made it; None where there is none."""
    loops: dict[Any, Any] = {
        TrainerFn.FITTING: trainer.fit_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
        TrainerFn.PREDICTING: trainer.predict_loop,
    }
    source = loops[trainer.state.fn]._data_source if trainer.state.fn in loops else None
    loader: Any = source.dataloader() if source is not None and source.is_defined() else None
    # Those of training give one batch together, those of evaluation one after the other.
    is_in_turn = isinstance(loader, (list, tuple)) and bool(loader) and trainer.state.fn != TrainerFn.FITTING
    return loader[0] if is_in_turn else loader


def transferred(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch as the loops hand it to a step: through the hooks of the user's, on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def refuse_norms_of_stages(is_elsewhere: Callable[[Any], bool]) -> None:
    """Let the functions that take the norm of all gradients refuse parameters of which other ranks have some; once is enough.

    They would clip each stage by a norm of its own, without a word.

    Args:
        is_elsewhere: tells a parameter that another rank has.
    """
    for place, name in (
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.nn.utils.clip_grad, "clip_grad_norm_"),
        (lightning_utilities, "grad_norm"),
    ):
        plain = getattr(place, name)
        if not hasattr(plain, "_meshbolt_plain"):
            setattr(place, name, _refusing(plain, is_elsewhere))


def _refusing(plain: Callable[..., Any], is_elsewhere: Callable[[Any], bool]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def checked(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(parameters, torch.nn.Module):
            given = list(parameters.parameters())
        else:
            given = parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if any(map(is_elsewhere, given)):
            raise UnsupportedError(
                f"{plain.__name__}() was called on parameters of several pipeline stages, of which this rank has some: the norm "
                "would be that of its own. Clip by gradient_clip_val, self.clip_gradients() or fabric.clip_gradients(), and "
                "read the norm of all gradients by trainer.strategy.grad_norm()."
            )
        return plain(parameters, *args, **kwargs)

    checked._meshbolt_plain = plain  # type: ignore[attr-defined]
    return checked


def time_between_validations(trainer: pl.Trainer) -> float | None:
    """Return the seconds of a time-based `val_check_interval`, if it is one."""
    return getattr(trainer, "_val_check_time_interval", None)


def asked_precision(trainer: pl.Trainer) -> str:
    """Return the Trainer's precision flag; "32-true" also where none was given."""
    return str(trainer._accelerator_connector._precision_flag)


def built_from(
    module_class: type[Module],
    checkpoint: Mapping[str, Any],
    *,
    strict: bool | None,
    overrides: Mapping[str, Any],
    quiet: bool = False,
) -> Module:
    """Return a module as `load_from_checkpoint` of its class does with the content of a file.

    Args:
        module_class: the LightningModule's class.
        checkpoint: the content; its top level is copied, since migrations and hooks may change it.
        strict: as for `load_from_checkpoint`.
        overrides: arguments of the constructor, instead of the saved hyperparameters.
        quiet: do not warn of names that differ.
    """
    with pl_legacy_patch(), warnings.catch_warnings():
        if quiet:
            warnings.filterwarnings("ignore", message="Found keys that are")
        content = _pl_migrate_checkpoint({**checkpoint, "state_dict": dict(checkpoint["state_dict"])})
        key = module_class.CHECKPOINT_HYPER_PARAMS_KEY
        content[key] = {**content.get(key, {}), **overrides}
        return cast("Module", _load_state(module_class, content, strict=strict, **overrides))


def note_termination_instead(trainer: pl.Trainer, note: Callable[[], None]) -> None:
    """Replace the part of Lightning's SIGTERM handler that broadcasts from within the handler.

    Args:
        trainer: whose handlers are registered already.
        note: called instead, after the processes that this one has started were signalled; and now, if the signal was there.
    """
    connector = trainer._signal_connector
    if connector.received_sigterm:
        connector.received_sigterm = False
        note()

    def noted(signum: int, _frame: Any) -> None:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signum)
        note()

    handlers = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])
    handlers[:] = [noted if handler == connector._sigterm_notifier_fn else handler for handler in handlers]


def skip_broadcast_of_termination(trainer: pl.Trainer) -> None:
    """Leave out what Lightning broadcasts before every batch: whether rank 0 was told to end, as that handler has noted it.

    Args:
        trainer: of a run in which that handler is replaced, or, in another thread than the main one, never was there; on
            every rank.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = _broadcast_nothing


def _broadcast_nothing() -> None:
    """Stand in the place of a broadcast; a function with a name, for a Trainer that is pickled."""


def look_before_dividing(trainer: pl.Trainer, look: Callable[[Any], None]) -> None:
    """Have a look at every loader whose samples Lightning is about to divide between ranks.

    Args:
        trainer: whose loaders they are.
        look: takes the loader; may raise.
    """
    connector: Any = trainer._data_connector
    connector._prepare_dataloader = functools.partial(_look_and_prepare, connector, look)


def _look_and_prepare(connector: Any, look: Callable[[Any], None], dataloader: Any, **settings: Any) -> Any:
    if isinstance(dataloader, DataLoader) and connector._requires_distributed_sampler(dataloader):
        look(dataloader)
    return type(connector)._prepare_dataloader(connector, dataloader, **settings)


class BatchCount:
    """Lightning's count of the training batches of an epoch."""

    def __init__(self, trainer: pl.Trainer) -> None:
        """Look at a Trainer's loop.

        Args:
            trainer: whose loop it is.
        """
        self._fit_loop, self._loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._went_back = False

    @property
    def _trackers(self) -> tuple[Any, Any]:
        progress = self._loop.batch_progress
        return progress.current, progress.total

    @property
    def done(self) -> int:
        """How many batches are done; the same when a checkpoint is saved, and after it was loaded."""
        current, total = self._trackers
        # At the end of a batch, where checkpoints are saved, only the last of the counters is behind.
        at_end = total.ready == total.processed == total.completed + 1
        return int(current.completed) + int(at_end)

    @property
    def is_inside_a_batch(self) -> bool:
        """Whether a batch has begun whose step is not done."""
        current, _ = self._trackers
        return bool(current.ready > current.processed)

    @property
    def epoch_is_done(self) -> bool:
        """Whether the last batch of the epoch is done."""
        return bool(self._loop.batch_progress.is_last_batch) and not self.is_inside_a_batch

    def go_back_to(self, done: int) -> None:
        """Count as if fewer batches (or, on fewer ranks, more) were done; without a difference do nothing."""
        back = self.done - done
        if not back:
            return
        self._went_back = True
        current, total = self._trackers
        for tracker, count in ((total, total.completed + self.done - current.completed - back), (current, done)):
            tracker.ready = tracker.started = tracker.processed = tracker.completed = count
        self._loop.batch_progress.is_last_batch = False

    def settle(self) -> None:
        """Where the count went back to a validation that has run, keep Lightning from counting its step again."""
        fetcher: Any = self._fit_loop._data_fetcher
        if self._went_back and self._loop._should_check_val_fx(fetcher):
            self._loop._batches_that_stepped -= 1
        self._went_back = False


def file_is_there(callback: ModelCheckpoint, path: str) -> bool:
    """Return whether there is something at a path, on the file system of a ModelCheckpoint."""
    return bool(callback._fs.exists(path))


def link_instead(callback: ModelCheckpoint, link: Callable[[str, str], None] | None) -> None:
    """Replace how a ModelCheckpoint makes the link of `save_last="link"`.

    Args:
        callback: the ModelCheckpoint.
        link: called with the path of the link and that of the checkpoint, on every rank; None: as it was before.
    """
    vars(callback).pop("_link_checkpoint", None)
    if link is not None:
        vars(callback)["_link_checkpoint"] = lambda _trainer, filepath, linkpath: link(linkpath, filepath)
