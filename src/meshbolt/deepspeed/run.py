"""What a file of DeepSpeed's comes to on these ranks: the sizes of a step, and Fabric with the strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric

from meshbolt.deepspeed.alike import compare_files, group_of_all, on_all
from meshbolt.deepspeed.pipe import PipelineModule
from meshbolt.deepspeed.ranks import LaunchedRanks, chosen_timeout, device_type, place_of_this_process
from meshbolt.deepspeed.strategy import LoopStrategy
from meshbolt.deepspeed_json import Options, Translation, translate
from meshbolt.deepspeed_json.batch import EACH, TOTAL, Batch
from meshbolt.deepspeed_json.key import AUTO
from meshbolt.deepspeed_json.read import read
from meshbolt.errors import ConfigError
from meshbolt.strategies import FabricMeshStrategy
from meshbolt.strategies.from_deepspeed import precision_plugin

Config = str | Path | Mapping[str, Any]
CLIP = "gradient_clipping"


@dataclass
class Sizes:
    """Samples and batches of an optimizer step.

    Attributes:
        micro: samples of a batch of one rank.
        steps: batches of a step.
        ranks: that see different samples.
    """

    micro: int
    steps: int
    ranks: int

    @property
    def total(self) -> int:
        """Samples of a step on all ranks."""
        return self.micro * self.steps * self.ranks


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a file comes to on these ranks.

    Attributes:
        config: as it was given.
        values: of the file.
        translation: of the file.
        fabric: launched, with the strategy.
        group: of all ranks, for objects on the CPU.
        sizes: of a step.
        clip: largest norm of gradients; 0.0: any.
    """

    config: Config
    translation: Translation
    fabric: Fabric
    group: dist.ProcessGroup | None
    sizes: Sizes
    clip: float
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def strategy(self) -> FabricMeshStrategy:
        """The strategy that Fabric runs."""
        strategy: Any = self.fabric.strategy
        return strategy  # type: ignore[no-any-return]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the file by its dotted key; the default where it has none, or "auto"."""
        value: Any = self.values
        for name in key.split("."):
            if not isinstance(value, Mapping) or name not in value:
                return default
            value = value[name]
        return default if value == AUTO else value

    @property
    def skips_nonfinite(self) -> bool:
        """Whether an update is skipped whose gradients are not finite, where no loss scale decides that: as DeepSpeed does."""
        if self.strategy.precision.loss_scaler is not None:
            return False
        in_bf16 = self.get("bf16.enabled", False)
        return bool(self.get("bf16.check_grad_overflow", True) if in_bf16 else self.strategy.settings.zero.stage > 0)


def begin(config: Config, *, deepspeed_version: str | None, pipeline: PipelineModule | None = None) -> Run:
    """Read a file, and connect Fabric to the ranks under what it asks for.

    Args:
        config: path of a JSON file, or what such a file says.
        deepspeed_version: whose defaults count.
        pipeline: a module whose layers are divided among stages.

    Raises:
        ConfigError: the file is wrong, or does not fit these ranks.
        UnsupportedError: it asks for what is not there.
        TopologyError: ranks have different ones.
    """
    stages = None if pipeline is None else pipeline.num_stages
    options = Options(deepspeed_version=deepspeed_version, world_size=dist.get_world_size(), stages=stages)
    group = group_of_all(chosen_timeout())
    translation, sizes = on_all(lambda: _translated(config, options), group)
    compare_files(translation, group)
    settings = dict(translation.settings)
    if pipeline is not None:
        pipeline.take_settings(settings, microbatches=sizes.steps)
    place, kind = place_of_this_process(), device_type()
    plugin = precision_plugin(translation.precision, device_type=kind)
    strategy = LoopStrategy(**settings, precision_plugin=plugin, timeout=chosen_timeout())
    fabric = Fabric(
        accelerator=kind,
        devices=place.local_world_size,
        num_nodes=place.world_size // place.local_world_size,
        strategy=strategy,
        plugins=[LaunchedRanks(place)],
    )
    fabric.launch()
    return Run(
        config=config,
        values=read(config)[0],
        translation=translation,
        fabric=fabric,
        group=group,
        sizes=sizes,
        clip=translation.clip or 0.0,
    )


def _translated(config: Config, options: Options) -> tuple[Translation, Sizes]:
    translation = translate(config, options)
    return translation, _sizes(translation)


def _sizes(translation: Translation) -> Sizes:
    """Return the sizes of a step; what a file leaves open is as DeepSpeed has it.

    Raises:
        ConfigError: the file leaves all of them open, or they do not go together.
    """
    batch: Batch = translation.batch
    ranks = batch.ranks or 1
    steps = batch.steps or 1
    micro = batch.each_on(ranks, steps=steps)
    if micro is None:
        raise ConfigError(
            f"{translation.receipt.source} has neither {TOTAL!r} nor {EACH!r} as a number, and one of them is needed: the engine "
            f"counts samples, and makes loaders of that size. Add {EACH!r}."
        )
    setting = translation.settings.get("pipeline_parallel")
    # Of a pipeline the sizes are those of a whole step.
    parts = setting.microbatches if setting is not None and isinstance(setting.microbatches, int) else 1
    return Sizes(micro=micro // parts, steps=steps * parts, ranks=ranks)
