"""`meshbolt fit | validate | test | predict`: Lightning's own command line, with meshbolt at hand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jsonargparse
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

from meshbolt.callbacks.progress import LogProgress
from meshbolt.cli.building import typed_errors
from meshbolt.cli.strategy import check_strategy_name

EXAMPLE = "example: meshbolt {0} --config configs/gpt_zero2.yaml --trainer.devices 2"


class MeshCLI(LightningCLI):
    """Lightning's command line: model and data by class path, log-safe progress, and a check of the strategy's name."""

    @override
    def before_instantiate_classes(self) -> None:
        """Refuse an unknown strategy before anything is built."""
        check_strategy_name(self._options(self.config)["trainer"]["strategy"])

    @override
    def instantiate_classes(self) -> None:
        """Build what the configuration names."""
        with typed_errors(self.parser):
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer; its progress is readable in a log file too, unless another bar was chosen."""
        trainer = self._options(self.config_init)["trainer"]
        callbacks = as_list(trainer["callbacks"])
        if trainer["enable_progress_bar"] is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            kwargs["callbacks"] = [LogProgress(), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def _options(self, config: Any) -> Any:
        return config if self.subcommand is None else config[self.subcommand]


def run(arguments: Sequence[str]) -> int:
    """Run Lightning's command line on `sys.argv`, which its launcher runs again for every rank.

    Args:
        arguments: those in `sys.argv`, from the command on.

    Raises:
        ConfigError: the strategy is unknown.
    """
    command = arguments[0]
    # Lightning still calls what torch has renamed; who trains cannot help it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
    # `${...}` is resolved when all files and flags are merged, and counts from the top of the file it stands in.
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    options = {"parser_mode": "omegaconf+"}
    usage = f"meshbolt {command} --config FILE [--trainer.KEY VALUE ...] [--model.KEY VALUE ...] [--data.KEY VALUE ...]"
    MeshCLI(parser_kwargs={**options, command: {**options, "usage": usage, "epilog": EXAMPLE.format(command)}})
    return 0


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, None as an empty one, and anything else as the only item of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
