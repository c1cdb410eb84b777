"""How ranks are started: Lightning's launchers, which on the way keep what the user asked of `fit` and Lightning drops."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.distributed.tensor import DTensor

from meshbolt.compat import whole_of
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.strategies.compat import (
    FabricForkLauncher,
    TrainerForkLauncher,
    TrainerLauncher,
    TrainerScriptLauncher,
    hook_under_way,
)
from meshbolt.strategies.failures import Failures
from meshbolt.strategies.resuming import begin_fit, from_newest

Remember = Callable[[bool | None], None]
LOOP = "the loop"
"""What ranks do together in Fabric, in words."""


def asked_weights_only(function: Callable[..., Any], args: Any, kwargs: Any) -> bool | None:
    """Return the `weights_only` that the user gave to `fit`, `validate`, `test` or `predict`.

    Lightning passes it on to every strategy but those that read a checkpoint after the module was set up.

    Args:
        function: what the Trainer launches.
        args: its arguments.
        kwargs: its arguments.
    """
    asked: bool | None = inspect.signature(function).bind(*args, **kwargs).arguments.get("weights_only")
    return asked


class _Remembering:
    """A launcher that tells what the user asked for before it starts anything, and other ranks of what fails on this one."""

    def __init__(self, remember: Remember, failures: Failures, *args: Any, **kwargs: Any) -> None:
        """Prepare.

        Args:
            remember: called with the user's `weights_only` before every launch.
            failures: tells of errors in what is launched, before callbacks hear of them.
            args: of Lightning's launcher.
            kwargs: of Lightning's launcher.
        """
        super().__init__(*args, **kwargs)
        self._remember, self._failures = remember, failures

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start ranks as the launcher does it, and run the function on them."""
        self._remember(asked_weights_only(function, args, kwargs))
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            args, kwargs = from_newest(function, args, kwargs, begin_fit(), trainer)
        if trainer is not None:
            function = functools.partial(self._failures.run, functools.partial(hook_under_way, trainer), function)
        return super().launch(function, *args, trainer=trainer, **kwargs)  # type: ignore[misc]


class _InThisProcess(TrainerLauncher):
    """Runs the function here: something else has started this process as one of the ranks."""

    @property
    def is_interactive_compatible(self) -> bool:
        """True: nothing is started."""
        return True

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Run the function."""
        return function(*args, **kwargs)

    def kill(self, signum: int) -> None:
        """Do nothing: the processes are not ours."""


class DirectLauncher(_Remembering, _InThisProcess):
    """For ranks that torchrun, SLURM or a cluster has started."""


class ScriptLauncher(_Remembering, TrainerScriptLauncher):
    """Runs this script again for every other rank of the machine."""


class CollectingLauncher(_Remembering, TrainerForkLauncher):
    """Starts ranks as functions; the trained weights come back whole to the process that started them."""

    def _collect_rank_zero_results(self, trainer: pl.Trainer, results: Any) -> Any:
        module = trainer.lightning_module
        whole: dict[str, Any] = {}
        if trainer.state.fn == TrainerFn.FITTING:
            for name, value in trainer.strategy.lightning_module_state_dict().items():
                gathered = trainer.strategy.of_all_stages(_whole(value))  # type: ignore[attr-defined]
                whole.update({name: gathered} if trainer.is_global_zero else {})
        # Lightning asks the module for what it sends; shards mean nothing to a process without ranks.
        module.__dict__["state_dict"] = lambda *_, **__: whole
        try:
            with trainer.strategy.results_in_one_file():  # type: ignore[attr-defined]
                return super()._collect_rank_zero_results(trainer, results)
        finally:
            del module.__dict__["state_dict"]

    def _recover_results_in_main_process(self, worker_output: Any, trainer: pl.Trainer) -> None:
        module = trainer.lightning_module
        if worker_output.weights_path is not None and is_overridden("configure_model", module):
            module.configure_model()  # only the ranks have called it so far, and the weights need their layers
        with trainer.strategy.results_in_one_file():  # type: ignore[attr-defined]
            super()._recover_results_in_main_process(worker_output, trainer)


class TellingLauncher(FabricForkLauncher):
    """Starts ranks of Fabric as functions; other ranks are told of what fails in them."""

    def __init__(self, failures: Failures, *args: Any, **kwargs: Any) -> None:
        """Prepare.

        Args:
            failures: tells of errors in what is launched.
            args: of Lightning's launcher.
            kwargs: of Lightning's launcher.
        """
        super().__init__(*args, **kwargs)
        self._failures = failures

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Start ranks, and run the function on them."""
        return super().launch(functools.partial(self._failures.run, LOOP, function), *args, **kwargs)


def _whole(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and held_elsewhere(value):
        return None
    if isinstance(value, DTensor):
        return whole_of(value).cpu()
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
