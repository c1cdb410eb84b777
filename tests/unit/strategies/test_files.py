from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from meshbolt import CheckpointError, ConfigError
from meshbolt.strategies.files import check_is_lightnings, check_training_state, without_training_state

WEIGHT = nn.Parameter(torch.zeros(2))
NAMES = {WEIGHT: "weight"}


def checkpoint(*, optimizers: int = 1, schedulers: int = 0) -> dict[str, Any]:
    state = {"class": "SGD", "state": {}, "param_groups": [{"params": ["weight"], "lr": 0.5}]}
    loops = {"fit_loop": {"epoch_progress": {"current": {"completed": 3}}}}
    return {
        "optimizer_states": [state] * optimizers,
        "lr_schedulers": [{}] * schedulers,
        "loops": loops,
        "state_dict": {},
    }


def check(saved: dict[str, Any], *, max_epochs: int | None = None) -> None:
    check_training_state(saved, [torch.optim.SGD([WEIGHT], lr=0.1)], NAMES, schedulers=(), max_epochs=max_epochs)


def test_a_checkpoint_that_fits_passes() -> None:
    for max_epochs in (None, -1, 3, 4):
        check(checkpoint(), max_epochs=max_epochs)


def test_a_checkpoint_that_is_further_than_the_run_would_go_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"after 3 epochs, .* end after 2\. Raise Trainer\(max_epochs=2\)"):
        check(checkpoint(), max_epochs=2)


def test_another_number_of_optimizers_or_schedulers_is_refused_with_both_numbers() -> None:
    with pytest.raises(CheckpointError, match="2 optimizers, this run has 1"):
        check(checkpoint(optimizers=2))
    with pytest.raises(CheckpointError, match="3 learning rate schedulers, this run has 0"):
        check(checkpoint(schedulers=3))


def test_a_checkpoint_without_training_state_is_refused_with_the_way_to_take_the_weights() -> None:
    saved = checkpoint()
    del saved["optimizer_states"], saved["loops"]
    with pytest.raises(CheckpointError, match=r"no optimizer_states, no loops.*load_weights_only=True"):
        check(saved)


def test_what_no_trainer_has_saved_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"a\.ckpt is not .* no pytorch-lightning_version and no state_dict"):
        check_is_lightnings({"model": {}}, "a.ckpt")


class Data:
    """Has a state under the name of its class."""


def test_a_new_run_takes_weights_hyperparameters_and_what_the_module_has_added() -> None:
    saved = {**checkpoint(schedulers=1), "hyper_parameters": {"a": 1}, "own": 2, "Data": 3, "callbacks": {}, "epoch": 4}
    begun = without_training_state(saved, states_of=(Data,))
    assert begun == {
        "state_dict": {},
        "hyper_parameters": {"a": 1},
        "own": 2,
        "epoch": 0,
        "global_step": 0,
        "optimizer_states": [],
        "lr_schedulers": [],
    }
