"""What files come to."""

from __future__ import annotations

from typing import Any

import jsonargparse
import pytest
import torch
from lightning.pytorch.strategies import Strategy

import meshbolt
from meshbolt import MeshStrategy
from meshbolt.deepspeed import trainer_arguments
from meshbolt.deepspeed_json import Options, translate
from meshbolt.errors import ConfigError, UnsupportedError


def zero(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **others}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "MeshStrategy(zero=0)"),
        ({"zero_optimization": True}, "MeshStrategy(zero=1)"),
        (zero(3), "MeshStrategy(zero=3)"),
        (
            {**zero(2), "communication_data_type": "bf16"},
            "MeshStrategy(zero=Zero(stage=2, replicate=1, unit='auto', reduce_dtype='bfloat16'))",
        ),
        (zero(2, offload_optimizer={"device": "cpu"}), "MeshStrategy(zero=2, offload='cpu')"),
        (zero(2, cpu_offload=True), "MeshStrategy(zero=2, offload='cpu')"),
        (zero(2, offload_optimizer={"device": "none"}), "MeshStrategy(zero=2)"),
        ({**zero(1), "tensor_parallel": {"autotp_size": 2}}, "MeshStrategy(zero=1, tensor_parallel=2)"),
        ({"checkpoint": {"writer": {"decoupled": True}}}, "asynchronous=True"),
        ({**zero(1), "pipeline": {"stages": 2}, "gradient_accumulation_steps": 4}, "microbatches=4"),
        ({**zero(1), "pipeline": {"stages": 2, "activation_checkpoint_interval": 1}}, "recompute='full'"),
    ],
)
def test_keys_become_settings_of_a_strategy(config: dict[str, Any], expected: str) -> None:
    assert expected in repr(MeshStrategy.from_deepspeed(config, show=False))


def test_offload_to_files_has_one_directory_and_its_fraction() -> None:
    nvme = {"device": "nvme", "nvme_path": "/local/nvme"}
    made = translate(zero(3, offload_optimizer={**nvme, "pin_memory": False}, offload_param=nvme)).settings["offload"]
    assert made == meshbolt.Offload(optimizer="nvme", parameters="nvme", path="/local/nvme", pin_memory=False)
    assert translate(zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5})).settings["offload"].fraction == 0.5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (zero(4), "'zero_optimization.stage' is 4"),
        (
            zero(2, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
            "with 'zero_optimization.stage' 2",
        ),
        (zero(3, offload_param={"device": "cpu"}), '"offload_optimizer"'),
        (zero(3, offload_optimizer={"device": "nvme"}), "no 'zero_optimization.offload_optimizer.nvme_path'"),
        (
            zero(3, offload_optimizer={"device": "cpu", "ratio": 1.5}),
            "'zero_optimization.offload_optimizer.ratio' is 1.5",
        ),
        (zero(3, offload_optimizer={"device": "disk"}), "one of none, cpu, nvme, null"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "a run has one precision"),
        ({"fp16": {"enabled": True, "min_loss_scale": 1024, "initial_scale_power": 4}}, "'fp16.min_loss_scale' 1024"),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
        ({"zero_optimization": {"stag": 1}}, "did you mean 'stage'?"),
        ({"optimizer": {"type": "AdmW"}}, "did you mean 'AdamW'?"),
        ({"optimizer": {"params": {"lr": 1}}}, "without 'optimizer.type'"),
        ({"optimizer": {"type": "SGD", "params": {"momentun": 0.9}}}, "did you mean 'momentum'?"),
        ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "'gradient_clipping'"),
        ({"optimizer": {"type": "Adam", "params": {"lr": -1}}}, "Invalid learning rate"),
        ({"scheduler": {"type": "WarmupLr"}}, "did you mean 'WarmupLR'?"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, "warmup_num_steps=0"),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {}}}, "total_num_steps"),
    ],
)
def test_what_is_wrong_is_refused_by_name(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        translate(config)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"amp": {"enabled": True}}, "bf16"),
        ({"optimizer": {"type": "Lamb"}}, "torch has no LAMB"),
        (zero(3, zero_quantized_weights=True), "'zero_optimization.zero_quantized_weights' is True"),
        ({"gradient_allreduce_op": "sum"}, "averaged over ranks"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "Make both true"),
    ],
)
def test_what_is_not_there_is_refused_with_a_reason(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        translate(config)
    assert words in str(error.value)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="has 3 keys") as error:
        translate({"amp": {"enabled": True}, "gradient_cliping": 1, "fp16": {"enabled": "yes"}})
    assert all(key in str(error.value) for key in ("'amp'", "'gradient_cliping'", "'fp16.enabled'"))


def test_clipping_that_is_not_given_follows_the_version() -> None:
    assert translate({}).clip is None
    assert translate({}, Options(deepspeed_version="0.19.2")).clip is None
    assert translate({}, Options(deepspeed_version="0.19.8")).clip == 1.0
    assert translate({"gradient_clipping": 0}, Options(deepspeed_version="0.19.8")).clip == 0.0
    row = translate({}).receipt.of("gradient_clipping")
    assert not row.given
    assert "0.19.3" in row.why


def test_a_loss_scale_becomes_arguments_of_the_plugin() -> None:
    made = translate(
        {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 7, "min_loss_scale": 2}}
    )
    assert made.precision is not None
    assert made.precision.scaling == {
        "init_scale": 1024.0,
        "growth_interval": 7,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_scale": 2.0,
    }
    fixed = translate({"fp16": {"enabled": True, "loss_scale": 128}}).precision
    assert fixed is not None
    assert (fixed.scaling["init_scale"], fixed.scaling["min_scale"]) == (128.0, 128.0)


def test_arguments_of_the_trainer_are_those_that_the_file_gives() -> None:
    made = trainer_arguments(
        {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5, "bf16": {"enabled": True}}, show=False
    )
    assert {key: value for key, value in made.items() if key != "strategy"} == {
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
    }
    assert list(trainer_arguments({}, show=False)) == ["strategy"]
    autocast = trainer_arguments({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, show=False)
    assert autocast["precision"] == "bf16-mixed"


def test_auto_is_filled_in_or_said_to_be_missing() -> None:
    config = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}}
    weights = [torch.zeros(1, requires_grad=True)]
    left = translate(config)
    assert left.optimizer is not None
    with pytest.raises(ConfigError, match=r"'optimizer.params.lr' is \"auto\""):
        left.optimizer.build(weights)
    filled = translate(config, Options(auto={"optimizer.params.lr": 0.5}))
    assert filled.optimizer is not None
    assert filled.optimizer.build(weights).param_groups[0]["lr"] == 0.5
    assert "0.5" in filled.receipt.of("optimizer.params.lr").why
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer\.params\.lr'"):
        translate(config, Options(auto={"optimizer.params.lrr": 0.5}))


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("Adam", {"lr": 0.1}, torch.optim.AdamW),
        ("Adam", {"lr": 0.1, "adam_w_mode": False}, torch.optim.Adam),
        ("AdamW", {"lr": 0.1, "adam_w_mode": False}, torch.optim.AdamW),
        ("adagrad", {}, torch.optim.Adagrad),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD),
        ("RMSprop", {}, torch.optim.RMSprop),
    ],
)
def test_optimizers_are_torchs_as_deepspeed_takes_their_names(
    kind: str, params: dict[str, Any], expected: type
) -> None:
    named = translate({"optimizer": {"type": kind, "params": params}}).optimizer
    assert named is not None
    assert type(named.build([torch.zeros(1, requires_grad=True)])) is expected


def test_weight_decay_is_0_unless_torchs_own_adam_is_asked_for() -> None:
    for params, decay in (({}, 0.0), ({"torch_adam": True}, 0.01), ({"weight_decay": 0.3}, 0.3)):
        named = translate({"optimizer": {"type": "AdamW", "params": params}}).optimizer
        assert named is not None
        assert named.build([torch.zeros(1, requires_grad=True)]).param_groups[0]["weight_decay"] == decay


def test_a_receipt_of_a_strategy_that_has_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="from_deepspeed"):
        _ = MeshStrategy(zero=1).deepspeed_receipt


def test_yaml_names_the_file_by_class_path() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    init_args = {"config": {"zero_optimization": {"stage": 2}}, "show": False}
    given = {"class_path": "meshbolt.MeshStrategy.from_deepspeed", "init_args": init_args}
    made = parser.instantiate(parser.parse_object({"strategy": given})).strategy
    assert isinstance(made, MeshStrategy)
    assert made.settings.zero.stage == 2


def decaying(**params: Any) -> dict[str, Any]:
    """A file whose schedule ends, as Hugging Face's page writes it."""
    adam = {"type": "AdamW", "params": {"lr": 0.1}}
    return {"optimizer": adam, "scheduler": {"type": "WarmupDecayLR", "params": params}}


def test_a_schedule_that_begins_may_say_so() -> None:
    rows = translate(decaying(last_batch_iteration=-1, total_num_steps=10)).receipt.rows
    (row,) = [row for row in rows if row.key == "scheduler.params.last_batch_iteration"]
    assert (row.outcome, row.given) == ("ignored", True)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"total_num_steps": 10, "last_batch_iteration": 7}, "'scheduler.params.last_batch_iteration' is 7"),
        ({}, "'scheduler.params' lacks 'total_num_steps', which WarmupDecayLR needs"),
    ],
)
def test_params_of_a_schedule_that_cannot_be_are_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        translate(decaying(**params))
