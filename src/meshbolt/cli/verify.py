"""`meshbolt verify`: whether the model of a run can be cut into pipeline stages, and how, before any ranks are started."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonargparse
import lightning.pytorch as pl
from lightning.fabric.utilities.warnings import PossibleUserWarning
from typing_extensions import override

from meshbolt.callbacks.console import write_line
from meshbolt.cli.commands import DONE, NO
from meshbolt.cli.planned import build_strategy
from meshbolt.cli.strategy import is_own_strategy
from meshbolt.cli.train import MeshCLI
from meshbolt.errors import ConfigError, MeshboltError, UnsupportedError
from meshbolt.pipeline import PipelineParallel, PipelineReport, Timeline, batch_size, cuts_of, draw
from meshbolt.strategies import PRESETS, MeshStrategy
from meshbolt.strategies.pipelined.verify import verify_module

# What one CPU takes in the place of what the configuration says of the run; nothing of it changes how a model is cut.
_ON_ONE_CPU: Mapping[str, Any] = MappingProxyType(
    {
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        **dict.fromkeys(("fast_dev_run", "sync_batchnorm", "barebones"), False),
        **dict.fromkeys(
            ("plugins", "callbacks", "profiler", "max_time", "limit_train_batches", "min_epochs", "min_steps"), None
        ),
        **dict.fromkeys(("limit_val_batches", "num_sanity_val_steps", "overfit_batches"), 0),
        **dict.fromkeys(("devices", "num_nodes", "max_epochs", "accumulate_grad_batches"), 1),
        "accelerator": "cpu",
        "strategy": "auto",
        "max_steps": -1,
    }
)
_IN_FLOAT64 = ("64", "64-true")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said of a model.

    Attributes:
        model: name of its class.
        setting: how it was to be cut.
        microbatches: of its first batch.
        samples: of its first batch.
        report: what its stages are; None if it cannot be cut.
        refusal: why not.
    """

    model: str
    setting: PipelineParallel
    microbatches: int
    samples: int
    report: PipelineReport | None = None
    refusal: str = ""

    @property
    def code(self) -> int:
        """The exit code."""
        return DONE if self.report is not None and self.report.is_equal else NO

    def timeline(self) -> Timeline | None:
        """Return how a step would go, by the work that was counted."""
        if self.report is None:
            return None
        return self.report.timeline(self.setting.schedule, microbatches=self.microbatches, ranks=self.setting.size)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages of a rank.

        Args:
            rank: of a pipeline.
        """
        per_rank = self.setting.resolved_stages_per_rank
        return self.setting.order.stages_of(rank, ranks=self.setting.size, stages_per_rank=per_rank)


def run(arguments: Sequence[str]) -> int:
    """Say how a model is cut into stages; return 1 where it cannot be, or where stages compute something else.

    Args:
        arguments: "verify", then flags, and options of `fit`.

    Raises:
        MeshboltError: the configuration is wrong.
    """
    parser = _parser()
    options, of_fit = parser.parse_known_args(arguments[1:])
    if options.draw is not None and not options.draw.parent.is_dir():
        raise ConfigError(f"--draw {options.draw}: there is no folder {options.draw.parent}. Make it first.")
    with _quiet():
        answer = _answer(of_fit)
    timeline = answer.timeline()
    if options.json:
        sys.stdout.write(json.dumps(_as_json(answer, timeline), indent=2) + "\n")
    else:
        write_line(_as_text(answer, timeline))
    if options.draw is not None and timeline is not None:
        options.draw.write_text(draw(timeline), encoding="utf-8")
    return answer.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meshbolt verify",
        usage="meshbolt verify [--pipeline] --config FILE [--KEY VALUE ...] [--json] [--draw FILE]",
        description="Cut the model of a configuration of `meshbolt fit` into pipeline stages, in this process and on the CPU, "
        "and compare losses and gradients of the first batch with those of the whole model. Shows what each stage holds, what "
        "passes between them, and how long ranks would wait; or which value is in the way. A strategy without "
        "pipeline_parallel is asked for two stages. Exit code 1 where the model cannot be cut, or its stages compute something "
        "else.",
        epilog="All other options are those of `meshbolt fit`. The model is built whole, on the CPU: make it small where it is "
        "large, as in --model.num_layers=8. example: meshbolt verify --config configs/pipeline_parallel.yaml --draw plan.svg",
        allow_abbrev=False,
    )
    parser.add_argument("--pipeline", action="store_true", help="what to verify; there is nothing else in this version")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="write the schedule as a picture, in SVG")
    return parser


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Lightning not speak of a run that there is not; what the model and its data print is no answer."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# One batch of a run --------------------------------------------------------------------------------------------------------


def _answer(arguments: Sequence[str]) -> Answer:
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    options = {"parser_mode": "omegaconf+"}
    try:
        _FirstBatch(
            args=["fit", *arguments],
            save_config_callback=None,
            parser_kwargs={**options, "prog": "meshbolt", "fit": {**options, "usage": _parser().usage}},
        )
    except _FoundError as found:
        return found.answer
    raise ConfigError("The training data gives no batch, on which the model could be looked at. Give it some samples.")


class _FirstBatch(MeshCLI):
    """Lightning's command line, whose fit ends at its first batch."""

    @override
    def before_instantiate_classes(self) -> None:
        """Take the setting of the strategy, and let the run be one of a single process."""
        super().before_instantiate_classes()
        options = self._options(self.config)
        trainer = options["trainer"]
        self._setting = _setting(trainer["strategy"])
        trainer["precision"] = "64-true" if str(trainer["precision"]) in _IN_FLOAT64 else "32-true"
        for name, value in _ON_ONE_CPU.items():
            trainer[name] = value
        options["ckpt_path"], options["meta"] = None, False

    @override
    def instantiate_classes(self) -> None:
        """Build what the configuration names, the model with its values."""
        self._build()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the Trainer, with a callback that looks at the first batch."""
        return super().instantiate_trainer(**kwargs, callbacks=[_Look(self._setting)])


def _setting(strategy: Any) -> PipelineParallel:
    """Return how a strategy, as it is parsed, cuts models; two stages where it does not."""
    setting = PipelineParallel()
    if isinstance(strategy, str) and strategy.lower() in PRESETS:
        setting = MeshStrategy(**PRESETS[strategy.lower()]).settings.pipeline_parallel
    elif isinstance(strategy, jsonargparse.Namespace) and is_own_strategy(str(strategy.class_path)):
        setting = build_strategy(strategy.as_dict()).settings.pipeline_parallel
    return setting if setting.size > 1 else PipelineParallel(2)


class _FoundError(Exception):
    """Ends a fit; it has what was found."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("the first batch was looked at")
        self.answer = answer


class _Look(pl.Callback):
    """Cuts the module at the first batch of its fit."""

    def __init__(self, setting: PipelineParallel) -> None:
        self._setting = setting

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look at the batch, as the training step would get it, and end the fit."""
        samples = batch_size(batch)
        answer: dict[str, Any] = {
            "model": type(pl_module).__name__,
            "setting": self._setting,
            "samples": samples,
            "microbatches": self._setting.microbatches_of(samples),
        }
        try:
            with trainer.precision_plugin.train_step_context():
                answer["report"] = self._report(pl_module, batch, answer["microbatches"])
        except (_CannotError, UnsupportedError) as error:
            answer["refusal"] = str(error)
        raise _FoundError(Answer(**answer))

    def _report(self, module: pl.LightningModule, batch: Any, microbatches: int) -> PipelineReport:
        setting = self._setting
        asks_for_nothing = (setting.cuts, setting.blocks, setting.split, setting.replicate) == (
            "auto",
            "auto",
            "auto",
            (),
        )

        def choose(step: Any) -> Sequence[str]:
            try:
                return cuts_of(module, setting, step, device=module.device)
            except ConfigError as error:
                if asks_for_nothing:
                    raise _CannotError(str(error)) from error
                raise

        return verify_module(
            module, batch, choose=choose, microbatches=microbatches, replicate=tuple(setting.replicate)
        )


class _CannotError(MeshboltError):
    """A module has too few places for a cut, and nothing in the configuration says where to cut it."""


# What is said of it --------------------------------------------------------------------------------------------------------


def _as_text(answer: Answer, timeline: Timeline | None) -> str:
    batch = f"{answer.model}, a batch of {answer.samples} samples in {answer.microbatches} microbatches"
    if answer.report is None or timeline is None:
        return f"{batch}: cannot be cut into {answer.setting.stages} stages\n{answer.refusal}"
    owners = "; ".join(
        f"rank {rank}: {', '.join(map(str, answer.stages_of(rank)))}" for rank in range(answer.setting.size)
    )
    return "\n".join(
        [
            f"{batch}: can be cut",
            str(answer.report),
            f"schedule {timeline.schedule}: ranks wait {timeline.bubble:.1%} of the time, when a backward pass takes twice as "
            "long as a forward pass and sending takes no time",
            f"stages by rank of a pipeline: {owners}",
        ]
    )


def _as_json(answer: Answer, timeline: Timeline | None) -> dict[str, Any]:
    about = {"model": answer.model, "samples": answer.samples, "microbatches": answer.microbatches}
    report = answer.report
    if report is None or timeline is None:
        return {**about, "can_be_cut": False, "reason": answer.refusal}
    ranks = {stage: rank for rank in range(answer.setting.size) for stage in answer.stages_of(rank)}
    return {
        **about,
        "can_be_cut": True,
        "equal": report.is_equal,
        "compared_with": report.compared_with,
        "loss_difference": report.loss_difference,
        "gradient_difference": report.gradient_difference,
        "tolerance": report.tolerance,
        "cuts": list(report.cuts),
        "stages": [_stage_as_json(report, stage, ranks[stage]) for stage in range(report.plan.stages)],
        "tied": {name: list(stages) for name, stages in report.plan.tied().items()},
        "schedule": {"name": timeline.schedule, "ranks": timeline.ranks, "bubble": timeline.bubble},
    }


def _stage_as_json(report: PipelineReport, stage: int, rank: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "share_of_work": report.shares[stage],
        "parameters": report.num_parameters[stage],
        "holds": list(report.holds(stage)),
        "sends": [
            {"what": str(each), "shape": list(each.shape), "dtype": str(each.dtype), "bytes": each.num_bytes}
            for each in report.plan.sent(stage)
        ],
    }
