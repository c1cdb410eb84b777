"""Optimizers under the names of DeepSpeed's are torch's, with DeepSpeed's defaults, or refused."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import nn

from meshbolt import UnsupportedError, deepspeed
from meshbolt.deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from meshbolt.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from meshbolt.deepspeed.ops.lamb import FusedLamb
from meshbolt.deepspeed.ops.lion import DeepSpeedCPULion, FusedLion


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("made", "kind", "decay"),
    [
        (lambda: FusedAdam(parameters()), torch.optim.AdamW, 0.0),
        (lambda: FusedAdam(parameters(), adam_w_mode=False, weight_decay=0.1), torch.optim.Adam, 0.1),
        (lambda: DeepSpeedCPUAdam(parameters()), torch.optim.AdamW, 0.0),
        (lambda: DeepSpeedCPUAdam(parameters(), adamw_mode=False), torch.optim.Adam, 0.0),
        (lambda: DeepSpeedCPUAdagrad(parameters(), weight_decay=0.2), torch.optim.Adagrad, 0.2),
    ],
)
def test_kernels_are_torchs_optimizers_with_their_own_defaults(made: Any, kind: type, decay: float) -> None:
    optimizer = made()
    assert type(optimizer) is kind
    assert optimizer.defaults["weight_decay"] == decay
    if kind is not torch.optim.Adagrad:
        assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.defaults["eps"]) == (
            1e-3,
            (0.9, 0.999),
            1e-8,
        )


@pytest.mark.parametrize(
    "made",
    [
        lambda: FusedAdam(parameters(), bias_correction=False),
        lambda: FusedAdam(parameters(), set_grad_none=False),
        lambda: DeepSpeedCPUAdam(parameters(), bias_correction=False),
        lambda: DeepSpeedCPUAdam(parameters(), fp32_optimizer_states=False),
        lambda: DeepSpeedCPUAdagrad(parameters(), amsgrad=True),
        lambda: FusedLamb(parameters(), lr=0.1),
        lambda: FusedLion(parameters()),
        lambda: DeepSpeedCPULion(parameters()),
    ],
)
def test_what_torch_has_nothing_for_is_refused(made: Any) -> None:
    with pytest.raises(UnsupportedError):
        made()


def test_arguments_of_a_script_are_those_of_deepspeed() -> None:
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    assert vars(parser.parse_args([])) == {"deepspeed": False, "deepspeed_config": None}
    given = parser.parse_args(["--deepspeed", "--deepspeed_config", "a.json"])
    assert (given.deepspeed, given.deepspeed_config) == (True, "a.json")


def test_recomputed_parts_have_the_gradients_of_a_plain_call() -> None:
    layer, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)), torch.randn(5, 3, requires_grad=True)
    torch.manual_seed(1)
    layer(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.manual_seed(1)
    deepspeed.checkpointing.checkpoint(layer, x).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)


def test_settings_of_recomputation_that_only_move_memory_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    deepspeed.checkpointing.configure(None, partition_activations=True, profile=False)
    deepspeed.checkpointing.configure(None, partition_activations=True)
    assert deepspeed.checkpointing.is_configured()
    assert [record.getMessage() for record in caplog.records] == [
        "checkpointing.configure: partition_activations has no effect; results are the same."
    ]
    with pytest.raises(UnsupportedError, match="mpu_"):
        deepspeed.checkpointing.configure(object())
    deepspeed.checkpointing.reset()
