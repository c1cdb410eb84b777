"""If these fail, a rank without memory is told to change what saves nothing, or by how much it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from meshbolt import Offload, Recompute, Zero
from meshbolt.config import Plan, Settings, resolve
from meshbolt.engine.memory import Held, HeldMemory
from meshbolt.engine.savings import Load, savings, state_bytes
from meshbolt.environment import Environment
from meshbolt.precision import precision_policy

# A model of ten units of 10 and a root of 20, on four ranks.
LOAD = Load(
    parameters=120,
    gradients=120,
    optimizer=240,
    activations=1000,
    units=(10,) * 10,
    root=20,
    block_input=5,
    window=1,
    samples=8,
)
SHARDS = dataclasses.replace(LOAD, parameters=30, gradients=30, optimizer=60)


def plan(stage: int, *, world_size: int = 4, device_type: str = "cuda", **settings: Any) -> Plan:
    return resolve(
        Settings(zero=Zero(stage=stage), **settings),
        world_size=world_size,
        precision=precision_policy("32-true"),
        device_type=device_type,
        environment=Environment(),
    )


def saved(which: Plan, load: Load) -> dict[str, int]:
    return {saving.setting: saving.num_bytes for saving in savings(which, load, most=10)}


def test_a_whole_rank_would_share_its_state_with_the_others() -> None:
    assert saved(plan(0), LOAD)["zero=1"] == (120 + 120 + 240) * 3 // 4


@pytest.mark.parametrize(("stage", "window", "expected"), [(1, 1, {3: 80}), (2, 3, {3: 80}), (1, 3, {2: 90, 3: 170})])
def test_stage_3_frees_units_and_whole_gradients_of_a_window(stage: int, window: int, expected: dict[int, int]) -> None:
    load = dataclasses.replace(SHARDS, window=window)
    found = {name: size for name, size in saved(plan(stage), load).items() if name.startswith("zero")}
    # Of 120 that are gathered, the root and two units stay.
    assert found == {f"zero={number}": size for number, size in expected.items()}


def test_nobody_to_share_with_is_no_advice() -> None:
    assert not any(name.startswith("zero") for name in saved(plan(1, world_size=1), SHARDS))
    assert not any(name.startswith("zero") for name in saved(plan(3), SHARDS))


def test_recomputing_keeps_inputs_and_one_block() -> None:
    assert saved(plan(3), SHARDS)["recompute='full'"] == 1000 - 10 * 5 - 100
    again = plan(3, recompute=Recompute("full"))
    assert "recompute='full'" not in saved(again, SHARDS)


def test_state_leaves_a_gpu_for_the_host_and_a_host_for_the_disk() -> None:
    assert saved(plan(3), SHARDS)["offload='cpu'"] == 60
    assert "offload='cpu'" not in saved(plan(3, offload=Offload("cpu")), SHARDS)
    half = plan(3, offload=Offload("cpu", fraction=0.5))
    assert saved(half, SHARDS)["offload='cpu'"] == 60
    large = dataclasses.replace(SHARDS, optimizer=10**9)
    on_host = saved(plan(3, device_type="cpu"), large)
    assert on_host["offload=Offload('nvme', path=...)"] == 10**9 - 3 * 64 * 2**20
    half_in_file = plan(3, offload=Offload("nvme", path="/disk", fraction=0.5))
    assert saved(half_in_file, SHARDS)["offload=Offload('nvme', path='/disk')"] == 60
    whole_in_file = plan(3, offload=Offload("nvme", path="/disk"))
    assert not any("offload" in name for name in saved(whole_in_file, SHARDS))


def test_a_batch_of_one_sample_is_not_halved() -> None:
    assert saved(plan(3), SHARDS)["half as many samples in a batch, with accumulate_grad_batches=2"] == 500
    alone = dataclasses.replace(SHARDS, samples=1)
    assert not any("samples" in name for name in saved(plan(3), alone))


def test_the_best_three_come_first() -> None:
    found = savings(plan(0), LOAD)
    assert [saving.setting.split()[0] for saving in found] == ["recompute='full'", "half", "zero=1"]
    assert all(saving.reason for saving in found)


@pytest.mark.parametrize(
    ("kind", "options", "columns"),
    [("AdamW", {}, 2), ("SGD", {}, 0), ("SGD", {"momentum": 0.9}, 1), ("RMSprop", {}, 1)],
)
def test_state_that_is_not_there_yet_is_known(kind: str, options: dict[str, Any], columns: int) -> None:
    module = nn.Linear(8, 4)
    module.bias.requires_grad_(False)
    optimizer = getattr(torch.optim, kind)(module.parameters(), lr=0.1, **options)
    assert state_bytes([optimizer, optimizer]) == 2 * columns * 8 * 4 * 4


def test_what_is_held_is_summed_by_place_and_by_module() -> None:
    held = HeldMemory(
        [
            Held("parameters", "device", "layers.1.weight", 4),
            Held("parameters", "device", "layers.10.weight", 8),
            Held("gradients", "device", "layers.1.bias", 2),
            Held("gathered", "device", "layers.1", 16),
            Held("optimizer", "host", "layers.1", 32),
            Held("optimizer", "device", "head.weight", 1),
            Held("buffers", "device", "empty", 0),
        ]
    )
    assert held.total() == 31
    assert held.total(tier="host") == held.total("optimizer", tier="host") == 32
    assert held.total("parameters") == 12
    assert held.without("gathered").total() == 15
    assert list(held.by_owner(["layers.1", "layers.10"]).items()) == [
        ("layers.1", {"parameters": 4, "gradients": 2, "gathered": 16}),
        ("layers.10", {"parameters": 8}),
        ("head", {"optimizer": 1}),
    ]
