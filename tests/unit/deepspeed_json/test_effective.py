"""Every value that a file comes to, and where it is from."""

from __future__ import annotations

from typing import Any

import pytest

from meshbolt.config.schema import Settings
from meshbolt.deepspeed_json import Options, Translation, translate
from meshbolt.deepspeed_json.effective import (
    SOURCES,
    Effective,
    optimizer_values,
    origin_of,
    scheduler_values,
    trainer_values,
)
from meshbolt.deepspeed_json.table import KEYS
from meshbolt.strategies import MeshStrategy

FILE = "the DeepSpeed configuration"


def made(config: dict[str, Any], **options: Any) -> Translation:
    return translate(config, Options(**options))


def by_key(rows: list[Effective]) -> dict[str, tuple[Any, str]]:
    return {row.key: (row.value, row.origin.replace(f"{FILE}: ", "")) for row in rows}


def test_every_source_is_a_key_of_the_table_and_every_setting_one_of_a_strategy() -> None:
    assert not [key for keys in SOURCES.values() for key in keys if key not in KEYS]
    settings = Settings()
    for name in SOURCES:
        section, _, field = name.partition(".")
        assert section in ("precision", "loss_scale") or hasattr(getattr(settings, section), field), name


@pytest.mark.parametrize(
    ("config", "setting", "origin"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero.stage", "zero_optimization.stage"),
        ({"zero_optimization": True}, "zero.stage", "zero_optimization.stage"),
        ({}, "zero.stage", "default of DeepSpeed 0.19.8"),
        ({}, "zero.replicate", "default of meshbolt"),
        ({"zero_optimization": {"cpu_offload": True}}, "offload.optimizer", "zero_optimization.cpu_offload"),
        ({"zero_optimization": {"cpu_offload": True}}, "offload.pin_memory", "default of DeepSpeed 0.19.8"),
        ({}, "offload.pin_memory", "default of meshbolt"),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, "tensor_parallel.size", "tensor_parallel.tp.tp_size"),
        (
            {"pipeline": {"stages": 2}, "gradient_accumulation_steps": 4},
            "pipeline_parallel.microbatches",
            "gradient_accumulation_steps",
        ),
        ({"gradient_accumulation_steps": 4}, "pipeline_parallel.microbatches", "default of meshbolt"),
        ({"communication_data_type": "bf16"}, "zero.reduce_dtype", "communication_data_type"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "precision.flag", "fp16.enabled, bf16.enabled"),
    ],
)
def test_a_setting_is_traced_to_its_key_or_to_whose_default_it_is(
    config: dict[str, Any], setting: str, origin: str
) -> None:
    assert origin_of(made(config, deepspeed_version="0.19.8"), setting).replace(f"{FILE}: ", "") == origin


def test_every_setting_that_a_file_changes_has_a_source() -> None:
    """What differs from a plain strategy came from the file, or is DeepSpeed's default."""
    files: list[dict[str, Any]] = [
        {"zero_optimization": {"stage": 3, "leaf_module": {"names": ["a"]}}, "communication_data_type": "fp16"},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/x", "pin_memory": False},
                "offload_param": {"device": "cpu"},
            }
        },
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        {"tensor_parallel": {"autotp_size": 2}, "checkpoint": {"writer": {"decoupled": True}}},
        {"pipeline": {"stages": 2, "activation_checkpoint_interval": 1}, "gradient_accumulation_steps": 4},
    ]
    seen = set()
    for file in files:
        translation = made(file)
        settings, usual = MeshStrategy(**translation.settings).settings, Settings()
        for name in SOURCES:
            section, _, field = name.partition(".")
            if section in ("precision", "loss_scale"):
                continue
            value = getattr(getattr(settings, section), field)
            if value != getattr(getattr(usual, section), field):
                seen.add(name)
                assert origin_of(translation, name) != "default of meshbolt", (name, value)
    assert {"zero.unit", "offload.path", "offload.fraction", "recompute.mode", "checkpoint.asynchronous"} < seen


def test_flags_of_a_trainer_are_traced() -> None:
    config = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "fp16": {"enabled": True, "hysteresis": 3},
    }
    assert by_key(trainer_values(made(config, world_size=4))) == {
        "accumulate_grad_batches": (2, "follows from train_batch_size, train_micro_batch_size_per_gpu"),
        "samples of a step": (32, "train_batch_size"),
        "batch_size of your DataLoader": (4, "train_micro_batch_size_per_gpu"),
        "gradient_clip_val": (0.5, "gradient_clipping"),
        "precision": ("MixedPrecision('16-mixed', autocast=False)", "fp16.enabled"),
        "loss_scale.init_scale": (65536.0, "default of DeepSpeed"),
        "loss_scale.growth_interval": (1000, "default of DeepSpeed"),
        "loss_scale.hysteresis": (3, "fp16.hysteresis"),
        "loss_scale.consecutive_hysteresis": (False, "default of DeepSpeed"),
        "loss_scale.min_scale": (1.0, "default of DeepSpeed"),
    }
    open_ = by_key(trainer_values(made(config)))
    assert open_["accumulate_grad_batches"][0] == "8 / data-parallel ranks"


def test_what_a_file_leaves_to_the_trainer_says_so() -> None:
    assert by_key(trainer_values(made({}))) == {
        "accumulate_grad_batches": (1, "default of the Trainer"),
        "gradient_clip_val": (None, "default of the Trainer"),
        "precision": ("32-true", "default of the Trainer"),
    }
    clipped = by_key(trainer_values(made({}, deepspeed_version="0.19.8")))["gradient_clip_val"]
    assert clipped == (1.0, "default of DeepSpeed 0.19.8")
    left = by_key(trainer_values(made({"gradient_clipping": "auto", "bf16": {"enabled": "auto"}})))
    assert left["gradient_clip_val"] == (None, "the Trainer's: gradient_clipping (auto)")
    assert left["precision"] == ("32-true", "bf16.enabled (auto)")


def test_a_pipeline_takes_its_microbatches_from_one_batch() -> None:
    rows = by_key(trainer_values(made({"pipeline": {"stages": 2}, "gradient_accumulation_steps": 4})))
    assert rows["accumulate_grad_batches"][0] == 1


def test_sizes_that_follow_name_what_from() -> None:
    rows = by_key(trainer_values(made({"train_batch_size": 32, "gradient_accumulation_steps": 2}, world_size=4)))
    assert rows["batch_size of your DataLoader"] == (
        4,
        "follows from train_batch_size, gradient_accumulation_steps",
    )


def test_arguments_of_the_optimizer_and_the_schedule_are_all_there() -> None:
    config = {
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": [0.9, 0.95]}},
        "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}},
    }
    optimizer = by_key(optimizer_values(made(config)))
    assert optimizer["type"] == ("torch.optim.AdamW", "optimizer.type")
    assert optimizer["lr"] == ("auto", "optimizer.params.lr (auto)")
    assert optimizer["betas"] == ([0.9, 0.95], "optimizer.params.betas")
    assert optimizer["eps"] == (1e-8, "default of torch")
    assert optimizer["weight_decay"] == (0.0, "default of DeepSpeed")
    schedule = by_key(scheduler_values(made(config)))
    assert schedule["cycle_max_lr"] == (0.2, "scheduler.params.cycle_max_lr")
    assert schedule["cycle_min_mom"] == (0.8, "default of DeepSpeed")
    assert not optimizer_values(made({}))
    assert not scheduler_values(made({}))


def test_torchs_own_adam_has_torchs_weight_decay() -> None:
    rows = by_key(optimizer_values(made({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})))
    assert rows["weight_decay"] == (0.01, "default of torch")


def test_a_schedule_that_follows_from_the_run_says_from_what() -> None:
    params = {"total_num_steps": "auto", "warmup_num_steps": 5}
    rows = by_key(scheduler_values(made({"scheduler": {"type": "WarmupDecayLR", "params": params}})))
    assert rows["total_num_steps"][0] == "trainer.estimated_stepping_batches"
