"""DeepSpeed's JSON on real ranks trains as one process does: state elsewhere, layers divided, stages, and 16 bits."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from lightning.pytorch.strategies import Strategy
from tests.cli.support import SMALL, meshbolt_on_ranks
from tests.parity.tensor_by_hand import SmallGPT, SmallGPTByHand, batches
from tests.rows import full

from meshbolt.deepspeed import WarmupLR, trainer_arguments
from meshbolt.plugins import HalfPrecision, MixedPrecision
from meshbolt.testing.parity.assertion import check, meshed_records, reference_records
from meshbolt.testing.parity.case import Case

STEPS, WINDOW, CLIP, SAMPLES = 4, 2, 0.3, 4
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
WARMUP = {"warmup_max_lr": 2e-2, "warmup_num_steps": 3, "warmup_min_lr": 1e-3}
# Its products are exact, so that no difference in the last digit decides how a weight is rounded to 16 bits.
SGD = {"type": "SGD", "params": {"lr": 1 / 32, "momentum": 0.875}}
PLACE = "to be a directory"


class FromFile(SmallGPT):
    """The optimizer and its schedule come from the file."""

    def configure_optimizers(self) -> None:
        return None


class InPython(SmallGPT):
    """The same optimizer and schedule in Python."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [{"scheduler": WarmupLR(optimizer, **WARMUP), "interval": "step"}]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A file, and what it is to be equal to.

    Attributes:
        blocks: of the file, beside batch sizes, clipping, optimizer and schedule.
        ranks: in all.
        sharing: how many ranks see the same samples.
        module: for the one process.
        precision: of the one process, as `Case` has it.
        length: tokens of a sample; one that ranks cannot divide is whole on each under tensor parallelism, as written by hand.
    """

    blocks: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 2
    sharing: int = 1
    module: type[SmallGPT] = InPython
    precision: Any = "64-true"
    length: int = 16

    @property
    def is_pipeline(self) -> bool:
        return "pipeline" in self.blocks

    def file(self, place: str) -> dict[str, Any]:
        """Return what the file says."""
        # A batch of the loader's has all microbatches of a pipeline's step.
        each = SAMPLES // WINDOW if self.is_pipeline else SAMPLES
        is_exact = self.precision != "64-true"
        others = {} if is_exact else {"scheduler": {"type": "WarmupLR", "params": WARMUP}}
        return {
            "train_batch_size": each * WINDOW * self.ranks // self.sharing,
            "train_micro_batch_size_per_gpu": each,
            "gradient_accumulation_steps": WINDOW,
            "gradient_clipping": CLIP,
            "optimizer": SGD if is_exact else ADAM,
            **others,
            **_placed(self.blocks, place),
        }

    def case(self, place: str) -> Case:
        """Return the comparison, as the file sets it."""
        arguments = trainer_arguments(self.file(place), show=False)
        return Case(
            module=FromFile,
            data=[
                (tokens[:, : self.length], following[:, : self.length])
                for tokens, following in batches(STEPS * WINDOW * self.ranks)
            ],
            strategy=functools.partial(_strategy, self.file(place)),
            ranks=self.ranks,
            steps=STEPS,
            accumulate_grad_batches=arguments["accumulate_grad_batches"],
            gradient_clip_val=arguments["gradient_clip_val"],
            # Without a block the Trainer decides; a plugin for 16 bits is the strategy's.
            precision="64-true" if self.precision == "64-true" else arguments.get("precision", "32-true"),
        )

    def reference(self, place: str) -> Case:
        """Return the comparison, as Python sets it."""
        module = SmallGPT if self.module is InPython and self.precision != "64-true" else self.module
        window = 1 if self.is_pipeline else WINDOW
        return replace(
            self.case(place),
            module=module,
            precision=self.precision,
            accumulate_grad_batches=window,
            gradient_clip_val=CLIP,
        )


def _placed(block: Any, place: str) -> Any:
    if isinstance(block, Mapping):
        return {key: _placed(value, place) for key, value in block.items()}
    return place if block is PLACE else block


def _strategy(file: dict[str, Any]) -> Any:
    return trainer_arguments(file, show=False)["strategy"]


def zero(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **others}}


CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": PLACE, "buffer_count": 4}
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 10}}
HALVES = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
whole_bf16 = functools.partial(MixedPrecision, "bf16-mixed", "cpu", autocast=False)
whole_fp16 = functools.partial(MixedPrecision, "16-mixed", "cpu", autocast=False, init_scale=2.0**10)
true_bf16 = functools.partial(HalfPrecision, "bf16-true")
ROWS: Mapping[str, Row] = {
    # State elsewhere.
    "zero2_optimizer_cpu": Row(blocks=zero(2, offload_optimizer=CPU)),
    "zero1_cpu_old_name": Row(blocks=zero(1, cpu_offload=True)),
    "zero0_optimizer_cpu": Row(blocks=zero(0, offload_optimizer=CPU)),
    "zero3_optimizer_cpu_half": Row(blocks=zero(3, offload_optimizer={**CPU, "ratio": 0.5, "pin_memory": False})),
    "zero3_optimizer_nvme": Row(blocks=zero(3, offload_optimizer=NVME)),
    "zero1_optimizer_nvme": Row(blocks=zero(1, offload_optimizer=NVME)),
    "zero3_parameters_cpu": Row(blocks=zero(3, offload_optimizer=CPU, offload_param=CPU)),
    "zero3_cpu_old_names": Row(blocks=zero(3, cpu_offload=True, cpu_offload_param=True)),
    "zero3_nvme_and_cpu": Row(blocks=zero(3, offload_optimizer=NVME, offload_param=CPU)),
    "zero_infinity": Row(blocks=zero(3, offload_optimizer=NVME, offload_param=NVME)),
    "zero_infinity_4": Row(blocks=zero(3, offload_optimizer=NVME, offload_param=NVME), ranks=4),
    # Layers divided.
    "autotp2": Row(blocks={"tensor_parallel": {"autotp_size": 2}}, sharing=2),
    "autotp2_zero1": Row(blocks={"tensor_parallel": {"autotp_size": 2}, **zero(1)}, ranks=4, sharing=2),
    "tp_size2_zero2": Row(blocks={"tensor_parallel": {"tp": {"tp_size": 2}}, **zero(2)}, ranks=4, sharing=2),
    "autotp2_zero3": Row(blocks={"tensor_parallel": {"autotp_size": 2}, **zero(3)}, ranks=4, sharing=2),
    "autotp2_zero1_cpu": Row(
        blocks={"tensor_parallel": {"autotp_size": 2}, **zero(1, offload_optimizer=CPU)}, ranks=4, sharing=2
    ),
    # Stages.
    "stages2": Row(blocks={"pipeline": {"stages": 2}}, sharing=2),
    "stages2_zero1": Row(blocks={"pipeline": {"stages": 2, "partition": "best"}, **zero(1)}, ranks=4, sharing=2),
    "stages2_zero3": Row(blocks={"pipeline": {"stages": 2}, **zero(3)}, ranks=4, sharing=2),
    "stages2_recomputed": Row(blocks={"pipeline": {"stages": 2, "activation_checkpoint_interval": 1}}, sharing=2),
    "stages2_zero1_cpu": Row(blocks={"pipeline": {"stages": 2}, **zero(1, offload_optimizer=CPU)}, ranks=4, sharing=2),
    "stages2_autotp2": Row(
        blocks={"pipeline": {"stages": 2}, "tensor_parallel": {"autotp_size": 2}, **zero(1)}, ranks=4, sharing=4
    ),
    # 16 bits.
    "bf16_zero2": Row(blocks={**BF16, **zero(2)}, precision=whole_bf16),
    "bf16_zero0": Row(blocks={**BF16, **zero(0)}, precision=whole_bf16),
    "bf16_zero3": Row(blocks={**BF16, **zero(3)}, precision=whole_bf16),
    "bf16_zero1_4": Row(blocks={**BF16, **zero(1)}, precision=whole_bf16, ranks=4),
    "bf16_zero2_cpu": Row(blocks={**BF16, **zero(2, offload_optimizer=CPU)}, precision=whole_bf16),
    "bf16_infinity": Row(blocks={**BF16, **zero(3, offload_optimizer=NVME, offload_param=NVME)}, precision=whole_bf16),
    "bf16_autotp2": Row(
        blocks={**BF16, **zero(1), "tensor_parallel": {"autotp_size": 2}},
        precision=whole_bf16,
        module=SmallGPTByHand,
        sharing=2,
        length=15,
    ),
    "bf16_states": Row(blocks={**HALVES, **zero(2)}, precision=true_bf16),
    "fp16_zero1": Row(blocks={**FP16, **zero(1)}, precision=whole_fp16),
    "fp16_zero2": Row(blocks={**FP16, **zero(2)}, precision=whole_fp16),
    "fp16_zero3": Row(blocks={**FP16, **zero(3)}, precision=whole_fp16),
    "fp16_zero3_cpu": Row(blocks={**FP16, **zero(3, offload_optimizer=CPU, offload_param=CPU)}, precision=whole_fp16),
    "autocast_zero2": Row(
        blocks={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, **zero(2)}, precision="bf16-mixed"
    ),
}
QUICK = {"zero_infinity", "stages2_zero1", "bf16_zero2"}


def compare(row: Row, place: str, case: Case) -> None:
    meshed = meshed_records([case], timeout=100)[0]
    reference = reference_records([(row.reference(place), meshed.zero)], timeout=60)[0]
    check(row.reference(place), meshed, reference)


@pytest.mark.parametrize("name", [name if name in QUICK else full(name) for name in ROWS])
def test_a_file_trains_as_the_same_settings_in_one_process(name: str, tmp_path: Path) -> None:
    row, place = ROWS[name], str(tmp_path)
    compare(row, place, row.case(place))


# In YAML ------------------------------------------------------------------------------------------------------------------


def in_yaml(path: str) -> Any:
    """Return the strategy that a YAML file names with the path of DeepSpeed's."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    text = f"strategy: {{class_path: meshbolt.MeshStrategy.from_deepspeed, init_args: {{config: {path}, show: false}}}}"
    return parser.instantiate(parser.parse_string(text)).strategy


@pytest.mark.parametrize("name", ["autotp2", full("zero_infinity"), full("stages2_zero1"), full("fp16_zero1")])
def test_a_file_named_in_yaml_trains_as_the_same_settings_in_one_process(name: str, tmp_path: Path) -> None:
    row, place = ROWS[name], str(tmp_path / "place")
    (tmp_path / "place").mkdir()
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(row.file(place)))
    compare(row, place, replace(row.case(place), strategy=functools.partial(in_yaml, str(path))))


COMMAND = """
seed_everything: 1
trainer:
  devices: 2
  max_steps: 4
  accumulate_grad_batches: %d
  gradient_clip_val: 0.3
  log_every_n_steps: 1
  limit_val_batches: 0
  enable_checkpointing: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: "", name: "", version: %s}}
model: {class_path: meshbolt.demos.ByteGPT}
data: {class_path: meshbolt.demos.PydocText, init_args: {length: 16}}
"""
OWN = "--trainer.strategy=meshbolt.MeshStrategy"
COMMANDS = {
    "pipeline": (
        zero(1) | {"pipeline": {"stages": 2}},
        {"zero": 1, "pipeline_parallel": {"size": 2, "microbatches": 2}},
    ),
    "tensor_parallel": (zero(2) | {"tensor_parallel": {"autotp_size": 2}}, {"zero": 2, "tensor_parallel": 2}),
    "cpu": (
        zero(3, offload_optimizer=CPU, offload_param=CPU),
        {"zero": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}},
    ),
}


def losses(folder: Path, name: str, window: int, *arguments: str) -> list[float]:
    (folder / f"{name}.yaml").write_text(COMMAND % (window, name))
    result = meshbolt_on_ranks("fit", "--config", f"{name}.yaml", *SMALL, *arguments, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("zero_optimization.stage" in result.stdout + result.stderr) == (name == "file")
    with (folder / name / "metrics.csv").open() as lines:
        return [float(row["train_loss"]) for row in csv.DictReader(lines) if row["train_loss"]]


@pytest.mark.parametrize("name", [full("pipeline"), full("tensor_parallel"), full("cpu")])
def test_the_command_line_fits_from_a_file_as_with_the_same_arguments(name: str, tmp_path: Path) -> None:
    (blocks, arguments), window = COMMANDS[name], 1 if name == "pipeline" else 2
    file = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.3, **blocks}
    (tmp_path / "ds_config.json").write_text(json.dumps(file))
    found = losses(tmp_path, "file", window, f"{OWN}.from_deepspeed", "--trainer.strategy.config=ds_config.json")
    given = [f"--trainer.strategy.{key}={json.dumps(value)}" for key, value in arguments.items()]
    expected = losses(tmp_path, "python", window, OWN, *given)
    assert len(found) == STEPS
    assert found == expected
