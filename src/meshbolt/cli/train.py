"""`meshbolt fit | validate | test | predict`: Lightning's own command line, with meshbolt at hand."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jsonargparse
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from meshbolt.callbacks.progress import LogProgress
from meshbolt.callbacks.report import RunReport
from meshbolt.cli.building import Around, ModelMaker, plainly, typed_errors
from meshbolt.cli.deferral import HELP, Building, CannotDeferError, check_strategy, insist
from meshbolt.cli.origins import origins_of
from meshbolt.cli.strategy import check_strategy_name
from meshbolt.engine.random_state import collect_random_state, restore_random_state

EXAMPLE = "example: meshbolt {0} --config configs/gpt_zero2.yaml --trainer.devices 2"

_AUTO = "auto"


class MeshCLI(LightningCLI):
    """Lightning's command line: models built without their values, log-safe progress, and a check of the strategy's name."""

    _building: Building | None = None

    @override
    def before_instantiate_classes(self) -> None:
        """Refuse an unknown strategy before anything is built; keep a default of ours out of the saved configuration."""
        options = self._options(self.config)
        check_strategy_name(options["trainer"]["strategy"])
        if options["meta"] == _AUTO:
            del options["meta"]  # Lightning's own command line, which may read the file, does not know it

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what Lightning's command line does not have."""
        parser.add_argument("--meta", type=bool | Literal["auto"], default=_AUTO, help=HELP)

    @override
    def instantiate_classes(self) -> None:
        """Build what the configuration names, the model without its values where that can be."""
        asked = self._options(self.config).get("meta", _AUTO)
        before = collect_random_state(torch.device("cpu"))
        try:
            self._build_later(asked)
        except CannotDeferError as error:
            if asked is True:
                raise insist(error) from error
            restore_random_state(before, torch.device("cpu"))
            self._build()
            rank_zero_info(f"model: {type(self.model).__name__}, built on the CPU, whole on every rank: {error}.")

    def _build_later(self, asked: Any) -> None:
        if asked is False:
            raise CannotDeferError("meta is false")
        check_strategy(self._options(self.config)["trainer"]["strategy"])
        self._building = building = Building()
        try:
            self._build(around=building.around)
        except (TypeError, ValueError):
            if building.refusal is not None:
                raise building.refusal from None
            raise
        finally:
            self._building = None

    def _build(self, *, around: Around = plainly) -> None:
        with typed_errors(self.parser, around=around):
            # In the place of Lightning's own, which would leave nobody between it and the class.
            self.parser.add_instantiator(ModelMaker(self, around=around), pl.LightningModule)
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer; its progress is readable in a log file too, unless another bar was chosen."""
        if self._building is not None:
            how_much = self._building.finish(self.model)
            name = type(self.model).__name__
            rank_zero_info(f"model: {name}, built on the meta device: {how_much} get values when they are sharded.")
        trainer = self._options(self.config_init)["trainer"]
        callbacks = as_list(trainer["callbacks"])
        if trainer["enable_progress_bar"] is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            kwargs["callbacks"] = [LogProgress(), *callbacks]
        made = super().instantiate_trainer(**kwargs)
        for callback in made.callbacks if made.is_global_zero else ():  # type: ignore[attr-defined]
            if isinstance(callback, RunReport):
                callback.origins = origins_of(sys.argv[2:])
        return made

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
    # The name as users call it, which under `python -m` is not that of the file.
    MeshCLI(
        parser_kwargs={
            **options,
            "prog": "meshbolt",
            command: {**options, "usage": usage, "epilog": EXAMPLE.format(command)},
        }
    )
    return 0


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, None as an empty one, and anything else as the only item of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
