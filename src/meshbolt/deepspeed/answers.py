"""What a script can ask the engine: sizes, precision, places and learning rates, under DeepSpeed's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import nn

from meshbolt.deepspeed.run import Run
from meshbolt.errors import ConfigError
from meshbolt.strategies import FabricMeshStrategy

_MOMENTA = ("SGD", "RMSprop")


class Answers(nn.Module):
    """The part of the engine that only answers."""

    _run: Run
    module: nn.Module
    fabric: Fabric
    optimizer: Any
    lr_scheduler: Any
    global_steps: int
    global_samples: int
    skipped_steps: int

    # Sizes ------------------------------------------------------------------------------------------------------------

    def train_batch_size(self) -> int:
        """Return the samples of an optimizer step, on all ranks."""
        return self._run.sizes.total

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the samples of a batch of one rank."""
        return self._run.sizes.micro

    def gradient_accumulation_steps(self) -> int:
        """Return the batches of an optimizer step."""
        return self._run.sizes.steps

    def get_batch_info(self) -> tuple[int, int, int]:
        """Return the samples of a step, those of a batch, and the batches of a step."""
        sizes = self._run.sizes
        return sizes.total, sizes.micro, sizes.steps

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples of a step, by more or fewer batches of the same size; between two windows.

        Args:
            train_batch_size: on all ranks.

        Raises:
            ConfigError: it is no whole number of batches on all ranks.
        """
        each = self._run.sizes.micro * self._run.sizes.ranks
        if isinstance(train_batch_size, bool) or not isinstance(train_batch_size, int) or train_batch_size < each:
            raise ConfigError(
                f"set_train_batch_size({train_batch_size!r}): {self._run.sizes.micro} on each of {self._run.sizes.ranks} ranks "
                f"is {each}. Give a multiple of that."
            )
        if train_batch_size % each:
            below = train_batch_size // each * each
            raise ConfigError(
                f"set_train_batch_size({train_batch_size}): it is no multiple of {each}, {self._run.sizes.micro} samples on "
                f"{self._run.sizes.ranks} ranks. Give {below} or {below + each}."
            )
        self._run.sizes.steps = train_batch_size // each

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples of a batch, with as many batches in a step; your loader has to give them.

        Args:
            micro_batch_size: of one rank.

        Raises:
            ConfigError: it is no number of samples.
        """
        if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
            raise ConfigError(f"set_train_micro_batch_size({micro_batch_size!r}): give 1 or more samples.")
        self._run.sizes.micro = micro_batch_size

    # Places -----------------------------------------------------------------------------------------------------------

    @property
    def _strategy(self) -> FabricMeshStrategy:
        return self._run.strategy

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self._strategy.root_device

    @property
    def local_rank(self) -> int:
        """The number of this rank on its machine."""
        return self._run.fabric.local_rank

    @property
    def global_rank(self) -> int:
        """The number of this rank."""
        return self._run.fabric.global_rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._run.fabric.world_size

    @property
    def dp_world_size(self) -> int:
        """The number of ranks that see different samples."""
        return self._strategy.data_parallel_size

    @property
    def mp_world_size(self) -> int:
        """The number of ranks that share a model by layers and stages."""
        return self.world_size // self.dp_world_size

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The group of the ranks that see different samples."""
        return self._strategy.data_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Return which part of the samples this rank sees."""
        return self._strategy.data_parallel_rank

    # Precision and stage ----------------------------------------------------------------------------------------------

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage."""
        return self._strategy.settings.zero.stage

    def zero_optimization(self) -> bool:
        """Return whether anything is sharded."""
        return self.zero_optimization_stage() > 0

    def zero_optimization_partition_gradients(self) -> bool:
        """Return whether gradients are sharded."""
        return self.zero_optimization_stage() >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Return whether parameters are sharded between their uses."""
        return self.zero_optimization_stage() >= 3

    def fp16_enabled(self) -> bool:
        """Return whether the fp16 block is on."""
        return self._computes_in("16-mixed")

    def bfloat16_enabled(self) -> bool:
        """Return whether the bf16 block is on."""
        return self._computes_in("bf16-mixed", "bf16-true")

    def _computes_in(self, *flags: str) -> bool:
        made = self._run.translation.precision
        return made is not None and made.flag in flags and not made.autocast

    def torch_autocast_enabled(self) -> bool:
        """Return whether the torch_autocast block is on."""
        return self.torch_autocast_dtype() is not None

    def torch_autocast_dtype(self) -> torch.dtype | None:
        """Return the dtype of autocast; None where it is off."""
        made = self._run.translation.precision
        if made is None or not made.autocast:
            return None
        return torch.bfloat16 if made.flag == "bf16-mixed" else torch.float16

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtype in which the module computes, and that in which gradients are added up."""
        kinds = ((self.fp16_enabled(), torch.float16), (self.bfloat16_enabled(), torch.bfloat16))
        return next((dtype for is_on, dtype in kinds if is_on), torch.float32), torch.float32

    @property
    def cur_scale(self) -> float:
        """The number that the next loss is multiplied with, in float16; else 1.0."""
        scaler = self._strategy.precision.loss_scaler
        return 1.0 if scaler is None else scaler.current_scale

    def loss_scale(self) -> float:
        """Return `fp16.loss_scale` of the file: 0 is a dynamic scale, whose value is `cur_scale`."""
        return float(self._run.get("fp16.loss_scale", 0))

    def dynamic_loss_scale(self) -> bool:
        """Return whether the loss scale follows overflows."""
        return self.loss_scale() == 0

    def gradient_clipping(self) -> float:
        """Return the largest norm of gradients; 0.0: any."""
        return self._run.clip

    def load_universal_checkpoint(self) -> bool:
        """Return whether the file asks for what `latest_universal` names."""
        return bool(self._run.get("checkpoint.load_universal", False))

    # The optimizer ----------------------------------------------------------------------------------------------------

    def optimizer_name(self) -> str | None:
        """Return the type of the file's optimizer."""
        return self._name("optimizer.type")

    def optimizer_params(self) -> Mapping[str, Any] | None:
        """Return the parameters of the file's optimizer."""
        params: Mapping[str, Any] | None = self._run.get("optimizer.params")
        return params

    def scheduler_name(self) -> str | None:
        """Return the type of the file's scheduler."""
        return self._name("scheduler.type")

    def scheduler_params(self) -> Mapping[str, Any] | None:
        """Return the parameters of the file's scheduler."""
        params: Mapping[str, Any] | None = self._run.get("scheduler.params")
        return params

    def _name(self, key: str) -> str | None:
        found = self._run.get(key)
        return None if found is None else str(found)

    def get_lr(self) -> list[float]:
        """Return the learning rate of each group."""
        return self._of_groups("lr")

    def get_mom(self) -> list[Any]:
        """Return the momentum, or the betas, of each group."""
        kind = type(self.optimizer).__name__
        return self._of_groups("momentum" if kind in _MOMENTA else "betas")

    def _of_groups(self, name: str) -> list[Any]:
        return [] if self.optimizer is None else [group.get(name, 0.0) for group in self.optimizer.param_groups]

    def steps_per_print(self) -> int | None:
        """Return after how many steps learning rates are logged; None: never."""
        every = self._run.get("steps_per_print")
        return int(every) if isinstance(every, int) and every < 2**31 else None

    def wall_clock_breakdown(self) -> bool:
        """Return False: nothing is timed here."""
        return False
