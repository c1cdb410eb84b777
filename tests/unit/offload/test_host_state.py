"""What `optimizer.state` shows is what is updated, and what is put there is taken."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.offload.faulty import make_file
from tests.unit.offload.hosts import FUSED, OWN_CLASS, assert_same, give_gradients, offloaded, parameters, train
from torch.optim import Optimizer

from meshbolt.offload import StateFile
from meshbolt.offload.layout import PAGE_BYTES, Layout
from meshbolt.offload.tiers import FileTier

MADE = {**{name: FUSED[name] for name in ("adamw", "sgd momentum", "adagrad")}, "nadam": OWN_CLASS["nadam"]}


@pytest.fixture(params=["memory", "file"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Options that put state there."""
    if request.param == "memory":
        return {}
    return {"make_tier": lambda layout: file_tier(layout, tmp_path)}


def file_tier(layout: Layout, folder: Path) -> FileTier:
    return FileTier(layout, lambda num_bytes: make_file(folder, num_bytes))


def steps(host: Any, theirs: Optimizer, numbers: range) -> None:
    for number in numbers:
        for optimizer in (host.optimizer, theirs):
            give_gradients(optimizer.param_groups[0]["params"], number)
        host.step()
        theirs.step()


def test_it_shows_views_of_the_memory_that_is_updated() -> None:
    optimizer = FUSED["adamw"](parameters())
    params = optimizer.param_groups[0]["params"]
    with offloaded(optimizer) as host:
        assert len(optimizer.state) == 0
        give_gradients(params, 0, without=[2])
        host.step()
        assert params[2] not in optimizer.state
        kept = {param: optimizer.state[param]["exp_avg"] for param in optimizer.state}
        before = {param: value.clone() for param, value in kept.items()}
        give_gradients(params, 1)
        host.step()
        for param, value in kept.items():
            assert optimizer.state[param]["exp_avg"] is value
            assert value.shape == param.shape
            assert value.numel() == 0 or not torch.equal(value, before[param])


@pytest.mark.parametrize("name", MADE)
def test_a_file_updates_as_memory_does(name: str, tmp_path: Path) -> None:
    mine, theirs = MADE[name](parameters()), MADE[name](parameters())
    tiers: list[FileTier] = []

    def make_tier(layout: Layout) -> FileTier:
        tiers.append(file_tier(layout, tmp_path))
        return tiers[-1]

    with offloaded(mine, make_tier=make_tier) as host:
        tier = tiers[0]
        steps(host, theirs, range(3))
        params = mine.param_groups[0]["params"]
        columns = {"exp_avg", "exp_avg_sq", "momentum_buffer", "sum"}
        assert not columns & set(mine.state[params[1]])
        with host.state_shown():
            assert_same(mine, theirs)
            written = tier.files[0].traffic.written_bytes  # those of the last step among them
        assert not columns & set(mine.state[params[1]])
        assert tier.files[0].traffic.written_bytes == written  # nothing was changed
        other = theirs.param_groups[0]["params"][1]
        for key, value in host.state_of(params[1]).items():
            torch.testing.assert_close(value, theirs.state[other][key], rtol=0, atol=0)


@pytest.mark.parametrize("name", MADE)
def test_a_loaded_state_is_taken(name: str, tier: dict[str, Any]) -> None:
    theirs = MADE[name](parameters())
    for number in range(2):
        give_gradients(theirs.param_groups[0]["params"], number)
        theirs.step()
    saved = io.BytesIO()
    torch.save(theirs.state_dict(), saved)
    saved.seek(0)
    mine = MADE[name](copy.deepcopy(theirs.param_groups[0]["params"]))
    with offloaded(mine, **tier) as host:
        mine.load_state_dict(torch.load(saved, weights_only=True))
        steps(host, theirs, range(2, 4))
        with host.state_shown():
            assert_same(mine, theirs)


def test_a_load_in_the_middle_replaces_what_was_there(tier: dict[str, Any]) -> None:
    mine, theirs = FUSED["adamw"](parameters()), FUSED["adamw"](parameters())
    with offloaded(mine, **tier) as host:
        steps(host, theirs, range(2))
        with host.state_shown():
            saved = copy.deepcopy(mine.state_dict())
        weights = [param.detach().clone() for param in mine.param_groups[0]["params"]]
        steps(host, FUSED["adamw"](parameters()), range(5, 7))
        mine.load_state_dict(saved)
        host.take_over()
        for param, value in zip(mine.param_groups[0]["params"], weights, strict=True):
            param.data.copy_(value)
        steps(host, theirs, range(2, 4))
        with host.state_shown():
            assert_same(mine, theirs)


@pytest.mark.parametrize("name", MADE)
def test_a_state_that_was_emptied_begins_again(name: str, tier: dict[str, Any]) -> None:
    mine, theirs = MADE[name](parameters()), MADE[name](parameters())
    with offloaded(mine, **tier) as host:
        steps(host, theirs, range(2))
        for optimizer in (mine, theirs):
            optimizer.state.clear()
            if name == "adagrad":  # makes its state when it is made
                for param in optimizer.param_groups[0]["params"]:
                    optimizer.state[param] = {"step": torch.tensor(0.0), "sum": torch.full_like(param, 0.5)}
        steps(host, theirs, range(2, 4))
        with host.state_shown():
            assert_same(mine, theirs)


def test_values_written_into_the_views_and_into_a_gathered_state_are_used(tier: dict[str, Any]) -> None:
    mine, theirs = FUSED["adamw"](parameters()), FUSED["adamw"](parameters())
    with offloaded(mine, **tier) as host:
        steps(host, theirs, range(2))
        with host.state_shown():
            for optimizer in (mine, theirs):
                for state in optimizer.state.values():
                    state["exp_avg"].mul_(3.0)
                    state["step"].fill_(7.0)
        steps(host, theirs, range(2, 4))
        with host.state_shown():
            assert_same(mine, theirs)


def test_a_file_has_masters_too(tmp_path: Path) -> None:
    tier = {"make_tier": lambda layout: file_tier(layout, tmp_path)}
    mine, _ = train(FUSED["adamw"], dtype=torch.bfloat16, **tier)
    theirs, _ = train(FUSED["adamw"], dtype=torch.bfloat16)
    for a, b in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_masters_are_read_and_loaded_with_all_their_bits(tier: dict[str, Any]) -> None:
    optimizer = FUSED["sgd"](parameters(torch.bfloat16))
    param = optimizer.param_groups[0]["params"][4]
    values = torch.randn(param.shape)
    with offloaded(optimizer, **tier) as host:
        host.load_master(param, values)
        read = host.master_of(param)
    assert read is not None
    assert torch.equal(read, values)
    assert torch.equal(param, values.bfloat16())


def test_parameters_that_get_gradients_or_a_group_later_are_included(tier: dict[str, Any]) -> None:
    def make() -> Optimizer:
        params = parameters()
        params[1].requires_grad_(False)
        return FUSED["adamw"](params[:10])

    mine, theirs = make(), make()
    with offloaded(mine, units={"all": mine.param_groups[0]["params"]}, **tier) as host:
        before = host.layout.bytes_of(stays=False)
        steps(host, theirs, range(1))
        for optimizer in (mine, theirs):
            optimizer.param_groups[0]["params"][1].requires_grad_(True)
            optimizer.add_param_group({"params": parameters()[10:13], "lr": 0.5})
        for number in range(2):
            for optimizer in (mine, theirs):
                give_gradients([p for group in optimizer.param_groups for p in group["params"]], number)
            host.step()
            theirs.step()
        assert host.layout.bytes_of(stays=False) >= before + 2 * 4 * 5000
        with host.state_shown():
            assert_same(mine, theirs)


def test_a_file_is_read_ahead_of_units_that_follow_each_other_in_every_step(tmp_path: Path) -> None:
    files: list[StateFile] = []

    def make_tier(layout: Layout) -> FileTier:
        return FileTier(layout, lambda num_bytes: files.append(make_file(tmp_path, num_bytes)) or files[-1])

    mine, theirs = (FUSED["adamw"](parameters(shapes=[(500,)] * 4)) for _ in range(2))
    params = mine.param_groups[0]["params"]
    with offloaded(mine, units={str(n): [p] for n, p in enumerate(params)}, make_tier=make_tier) as host:
        for step in range(3):
            for optimizer in (mine, theirs):
                give_gradients(optimizer.param_groups[0]["params"], step)
            for number in (3, 2, 1) if step == 0 else (3, 1, 2):
                before = files[0].traffic.read_bytes
                host.submit([params[number]])
                host.wait([params[number]])
                if step == 0:
                    assert files[0].traffic.read_bytes - before == PAGE_BYTES
            host.step()
            theirs.step()
        ahead = files[0].traffic.read_bytes - 12 * PAGE_BYTES
        assert 0 < ahead <= 8 * PAGE_BYTES
        with host.state_shown():
            assert_same(mine, theirs)
