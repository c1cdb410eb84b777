"""A strategy made from DeepSpeed's JSON: it compares the Trainer's flags with the file, and makes the file's optimizer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from typing_extensions import Self

from meshbolt.blocks import Recompute
from meshbolt.collectives import agree_on_error
from meshbolt.deepspeed_json import Options, Receipt, Translation, translate
from meshbolt.deepspeed_json.precision import Precision
from meshbolt.errors import ConfigError
from meshbolt.plugins import HalfPrecision, MeshPrecision, MixedPrecision
from meshbolt.strategies.compat import asked_precision, trainer_of

_log = logging.getLogger(__name__)


class Flags(NamedTuple):
    """The flags of a Trainer that a file has a say in.

    Attributes:
        accumulate: batches of a window.
        clip: largest norm of gradients; None: no clipping.
        algorithm: of clipping: "norm" or "value".
        precision: as the Trainer names it; "32-true" also where none was given.
    """

    accumulate: int
    clip: float | None
    algorithm: str
    precision: str


class DeepSpeedSettings:
    """The part of the Trainer's strategy that knows of DeepSpeed's JSON; stands before `MeshCore` in the bases."""

    lightning_module: pl.LightningModule | None
    data_parallel_size: int
    _control_group: dist.ProcessGroup | None
    _deepspeed: Translation | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Name the class that `from_deepspeed` makes; YAML files find it by that, and do not understand `Self`."""
        super().__init_subclass__(**kwargs)
        annotations = vars(DeepSpeedSettings)["from_deepspeed"].__func__.__annotations__
        if annotations["return"] == "Self":
            annotations["return"] = cls

    @classmethod
    def from_deepspeed(
        cls,
        config: str | Path | dict[str, Any],
        *,
        auto: dict[str, Any] | None = None,
        deepspeed_version: str | None = None,
        data_parallel_size: int | None = None,
        recompute: str | Recompute | None = None,
        compile: bool = False,
        start_method: str = "popen",
        show: bool = True,
    ) -> Self:
        """Make a strategy from DeepSpeed's JSON, as it is.

        The file also sets what belongs to the Trainer: accumulation, clipping, and in part precision. Give those to the Trainer,
        or have `meshbolt.deepspeed.trainer_arguments` do it; a flag that disagrees with the file is an error when a run begins.
        The file's optimizer and scheduler serve where `configure_optimizers` returns none.

        Args:
            config: path of the JSON file, or what it says as a dictionary.
            auto: by dotted key, values for keys that are "auto" in the file: `{"optimizer.params.lr": 1e-4}`.
            deepspeed_version: that the file was written for, such as "0.19.8", whose defaults then count.
            data_parallel_size: ranks that see different samples, where accumulation follows from it.
            recompute: as `MeshStrategy` has it; None: what the file says.
            compile: as `MeshStrategy` has it.
            start_method: as `MeshStrategy` has it.
            show: print what became of each key, on rank 0.

        Raises:
            ConfigError: the file is no JSON, or a key is unknown, has a wrong value or contradicts another.
            UnsupportedError: a key asks for what is not there.

        Example:
            >>> strategy = MeshStrategy.from_deepspeed("ds_config.json")
            >>> print(strategy.deepspeed_receipt.to_json())
        """
        options = Options(
            auto={} if auto is None else auto,
            deepspeed_version=deepspeed_version,
            data_parallel_size=data_parallel_size,
        )
        translation = translate(config, options)
        given: dict[str, Any] = {} if recompute is None else {"recompute": recompute}
        strategy = cls(
            **{
                **translation.settings,
                **given,
                "precision_plugin": precision_plugin(translation.precision),
                "compile": compile,
                "start_method": start_method,
            }
        )
        strategy._deepspeed = translation
        if show and getattr(rank_zero_only, "rank", 0) == 0:
            translation.receipt.show()
        return strategy

    @property
    def deepspeed_translation(self) -> Translation | None:
        """What the file came to; None where the strategy was not made from one."""
        return self._deepspeed

    @property
    def deepspeed_receipt(self) -> Receipt:
        """What became of every key of the file.

        Raises:
            ConfigError: the strategy was not made from one.
        """
        if self._deepspeed is None:
            raise ConfigError("This strategy was not made from DeepSpeed's JSON. Use MeshStrategy.from_deepspeed(...).")
        return self._deepspeed.receipt

    def deepspeed_arguments(self) -> dict[str, Any]:
        """Return the arguments of a Trainer that the file sets, with this strategy among them.

        Raises:
            ConfigError: accumulation follows from the number of ranks, and that was not given.
        """
        translation, arguments = self._deepspeed, {"strategy": self}
        if translation is None:
            return arguments
        if translation.accumulate is None and translation.batch.quotient is not None:
            raise ConfigError(f"{translation.receipt.source}: {translation.batch.needs_ranks()}")
        precision = translation.precision
        if precision is not None and precision_plugin(precision) is None:
            arguments["precision"] = precision.flag  # type: ignore[assignment]
        if translation.clip is not None:
            arguments["gradient_clip_val"] = translation.clip or None  # type: ignore[assignment]
        if translation.accumulate is not None:
            arguments["accumulate_grad_batches"] = translation.accumulate  # type: ignore[assignment]
        return arguments

    # When a run begins ------------------------------------------------------------------------------------------------

    def connect(self, model: pl.LightningModule) -> None:
        """Let the file's optimizer stand in for what the module does not make."""
        super().connect(model)  # type: ignore[misc]
        made = self._deepspeed
        if made is not None and (made.optimizer is not None or made.scheduler is not None):
            _stand_in(model, made)

    def _check_deepspeed(self, trainer: pl.Trainer) -> None:
        """Compare the Trainer's flags with the file.

        Raises:
            ConfigError: they disagree.
        """
        if self._deepspeed is not None:
            algorithm = trainer.gradient_clip_algorithm
            flags = Flags(
                accumulate=trainer.accumulate_grad_batches,
                clip=trainer.gradient_clip_val or None,
                algorithm=str(getattr(algorithm, "value", algorithm) or "norm"),
                precision=asked_precision(trainer),
            )
            compare_flags(self._deepspeed, flags)

    def _check_loader(self, dataloader: Any) -> None:
        """Compare a loader's batches with the sizes of the file; all ranks raise, or none.

        Raises:
            ConfigError: they differ.
        """
        if self._deepspeed is not None:
            agree_on_error(functools.partial(self._compare_loader, dataloader), group=self._control_group)

    def _compare_loader(self, dataloader: Any) -> None:
        trainer: Any = trainer_of(self.lightning_module)
        made: Any = self._deepspeed
        wanted = made.batch.each_on(self.data_parallel_size, steps=trainer.accumulate_grad_batches)
        sampler = getattr(dataloader, "batch_sampler", None)
        size = getattr(sampler, "batch_size", None) or getattr(dataloader, "batch_size", None)
        if wanted is not None and isinstance(size, int) and size != wanted:
            raise ConfigError(
                f"{made.receipt.source} asks for batches of {wanted} samples on each of {self.data_parallel_size} data-parallel "
                f"ranks with accumulate_grad_batches={trainer.accumulate_grad_batches}, and the training DataLoader has "
                f"batch_size={size}. Change one of them."
            )


def precision_plugin(precision: Precision | None, *, device_type: str | None = None) -> MeshPrecision | None:
    """Return the plugin of a precision that no flag of the Trainer's stands for; None where a flag does.

    Args:
        precision: that a file asks for; None: nothing.
        device_type: "cpu" or "cuda", where the plugin is wanted in any case, since nobody is given a flag.
    """
    if precision is None or precision.flag == "32-true" or (precision.autocast and device_type is None):
        return None
    if precision.flag == "bf16-true":
        return HalfPrecision("bf16-true")
    return MixedPrecision(
        "16-mixed" if precision.flag == "16-mixed" else "bf16-mixed",
        device_type or "cuda",
        autocast=precision.autocast,
        **precision.scaling,
    )


def compare_flags(made: Translation, flags: Flags) -> None:
    """Compare the flags of a Trainer with a file.

    Args:
        made: of the file.
        flags: as the Trainer has them.

    Raises:
        ConfigError: they disagree.
    """
    for key, asked, flag, has in _pairs(made, flags):
        if asked != has:
            raise ConfigError(
                f"{made.receipt.source} has {key}, which asks for {flag}={asked!r}, and the Trainer has {flag}={has!r}. Change "
                "one of them, or use Trainer(**meshbolt.deepspeed.trainer_arguments(...))."
            )


def _pairs(made: Translation, flags: Flags) -> list[tuple[str, Any, str, Any]]:
    """Return a key of the file, what it asks for, the Trainer's flag for it, and its value."""
    pairs: list[tuple[str, Any, str, Any]] = []
    if made.accumulate is not None:
        key = "pipeline.stages" if "pipeline_parallel" in made.settings else "gradient_accumulation_steps"
        pairs.append((repr(key), made.accumulate, "accumulate_grad_batches", flags.accumulate))
    if made.clip is not None:
        pairs.append(("'gradient_clipping'", made.clip or None, "gradient_clip_val", flags.clip))
        if made.clip:
            pairs.append(("'gradient_clipping'", "norm", "gradient_clip_algorithm", flags.algorithm))
    if made.precision is not None:
        flag, asked = made.precision.flag, flags.precision
        is_carried = (
            precision_plugin(made.precision) is not None and asked == "32-true"
        )  # by the strategy, without a flag
        pairs.append(("a precision block", flag, "precision", flag if is_carried else asked))
    return pairs


def _stand_in(module: pl.LightningModule, made: Translation) -> None:
    """Put a `configure_optimizers` on a module that asks its own first."""
    if "configure_optimizers" in vars(module) and hasattr(vars(module)["configure_optimizers"], "_meshbolt_of"):
        del module.__dict__["configure_optimizers"]  # of a strategy that the module was run with before
    own = module.configure_optimizers if is_overridden("configure_optimizers", module) else None

    def configure_optimizers() -> Any:
        result = None if own is None else own()
        if result is None and made.optimizer is not None:
            # Parameters are asked for by the module itself: they are shards by now.
            result = made.optimizer.build([each for each in module.parameters() if each.requires_grad])
        elif made.optimizer is not None:
            _log.info("%s: 'optimizer' is not used, since configure_optimizers returns one.", made.receipt.source)
        return _scheduled(module, result, made)

    configure_optimizers._meshbolt_of = made  # type: ignore[attr-defined]
    # Straight into __dict__: a LightningModule is free to give __setattr__ a meaning of its own.
    module.__dict__["configure_optimizers"] = configure_optimizers


def _scheduled(module: pl.LightningModule, result: Any, made: Translation) -> Any:
    """Add the file's schedule to an optimizer that has none."""
    if made.scheduler is None or not isinstance(result, Optimizer):
        return result
    late: Mapping[str, Any] = {
        "total_num_steps": lambda: int(module.trainer.estimated_stepping_batches),
        "warmup_max_lr": lambda: [group["lr"] for group in result.param_groups],
    }
    wanted = {key.rpartition(".")[2] for key in made.scheduler.missing}
    scheduler = made.scheduler.build(result, **{name: value() for name, value in late.items() if name in wanted})
    return {"optimizer": result, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
