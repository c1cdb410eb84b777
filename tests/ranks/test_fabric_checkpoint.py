"""Fabric's checkpoints: all of one is loaded or nothing, from directories and from single files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from tests.ranks.engine_support import Net, batch, loss_of, made, whole
from torch import Tensor, nn

from meshbolt import Checkpoint, CheckpointError, Zero
from meshbolt.checkpoint import saved_tensors
from meshbolt.fabric import MeshStrategy
from meshbolt.testing import run_ranks


def fabric_of(stage: int, **settings: Any) -> Fabric:
    strategy = MeshStrategy(zero=Zero(stage=stage), checkpoint=Checkpoint(**settings))
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    return fabric


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)


def trained(
    fabric: Fabric, module: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer] = adamw
) -> dict[str, Any]:
    """Take two steps, and return what Fabric saves."""
    model, optimizer = fabric.setup(module, make(module))
    for index in range(2):
        fabric.backward(loss_of(model, batch(index, fabric.global_rank)))
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer, "steps": 2}


def values_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return everything in a state that a load could change: whole weights, and this rank's part of the moments."""
    module, optimizer = state["model"].module, state["optimizer"].optimizer
    found = {f"weight {name}": whole(parameter) for name, parameter in module.named_parameters()}
    for number, values in enumerate(optimizer.state.values()):
        found |= {f"{key} {number}": whole(value).clone() for key, value in values.items()}
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {**found, "settings": settings, "steps": state["steps"]}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if ours.keys() != theirs.keys():
        return False
    pairs = [(value, theirs[key]) for key, value in ours.items()]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


class Tailed(Net):
    """Has a layer that the checkpoint has not."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(2, 2)


class Scheduler:
    """An object of the user's with a state."""

    def __init__(self) -> None:
        self.loaded: Any = None

    def state_dict(self) -> dict[str, int]:
        return {"count": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.loaded = state


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def two_groups(module: nn.Module) -> torch.optim.Optimizer:
    first, *rest = module.parameters()
    return torch.optim.AdamW([{"params": [first]}, {"params": rest}], lr=1e-2)


MISFITS: dict[str, tuple[type[Net], Callable[[nn.Module], torch.optim.Optimizer], dict[str, Any], str]] = {
    "names": (Tailed, adamw, {}, "2 missing there:\n    tail.bias\n    tail.weight"),
    "class": (Net, sgd, {}, "state of AdamW, and this run's optimizer is SGD"),
    "groups": (Net, two_groups, {}, "parameter groups of"),
    "entries": (Net, adamw, {"other": 1}, "does not hold ['other']"),
    "damaged": (Net, adamw, {}, "file __1_0.distcp"),
}


def refusals(folder: Path) -> dict[str, tuple[str, bool]]:
    fabric = fabric_of(3)
    state = trained(fabric, made())
    for name in ("run.ckpt", "damaged.ckpt"):
        fabric.save(folder / name, state)
    if fabric.global_rank == 0:
        shard = folder / "damaged.ckpt" / "__1_0.distcp"
        shard.write_bytes(b"\0" * shard.stat().st_size)
    dist.barrier()
    found = {}
    for name, (kind, make, more, _) in MISFITS.items():
        own = {**trained(fabric_of(2), kind().double(), make), "scheduler": Scheduler(), **more}
        before = copy.deepcopy(values_of(own))
        torch.manual_seed(5)
        with pytest.raises(CheckpointError) as refused:
            fabric_load(own, folder / ("damaged.ckpt" if name == "damaged" else "run.ckpt"))
        random_state = torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(5).get_state())
        untouched = same(values_of(own), before) and own["scheduler"].loaded is None and random_state
        found[name] = str(refused.value).replace(str(folder), ""), untouched
    return found


def fabric_load(state: dict[str, Any], path: Path) -> None:
    """Load through the Fabric that has set a state's model up; its scheduler is nothing that was saved."""
    loaded = {key: value for key, value in state.items() if key != "scheduler"}
    state["model"]._strategy.load_checkpoint(path, unwrapped(loaded))


def unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    model, optimizer = state["model"], state["optimizer"]
    return {**state, "model": model._forward_module, "optimizer": optimizer.optimizer}


def test_what_does_not_fit_changes_nothing_and_every_rank_says_the_same(tmp_path: Path) -> None:
    first, second = run_ranks(refusals, 2, tmp_path)
    assert first == second
    for name, (*_, said) in MISFITS.items():
        assert said in first[name][0], name
        assert first[name][1], name


def files(folder: Path) -> list[bool]:
    """Load a file that one device has saved, and one of a bare state dict."""
    module = made()
    optimizer = adamw(module)
    for index in range(2):
        loss_of(module, batch(index, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if dist.get_rank() == 0:
        torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), "steps": 7}, folder / "all.pt")
        torch.save(module.state_dict(), folder / "bare.pt")
    dist.barrier()
    fabric = fabric_of(3)
    own = trained(fabric, made())
    rest = fabric.load(folder / "all.pt", {"model": own["model"], "optimizer": own["optimizer"]})
    assert rest == {"steps": 7}
    names = {parameter: name for name, parameter in module.named_parameters()}
    with fabric.strategy.gathered(own["model"].module, optimizer=own["optimizer"].optimizer) as gathered:
        pairs = [(gathered[names[p]], values) for p, values in optimizer.state.items()]
        moments = [torch.equal(ours[key], value) for ours, values in pairs for key, value in values.items()]
    bare = fabric.setup_module(made())
    fabric.load_raw(folder / "bare.pt", bare)
    weights = [torch.equal(whole(p), q) for p, q in zip(bare.parameters(), module.parameters(), strict=True)]
    with pytest.raises(CheckpointError, match="cannot be read into NoneType"):
        fabric.load(folder / "bare.pt")
    both = [torch.equal(whole(p), q) for p, q in zip(own["model"].parameters(), module.parameters(), strict=True)]
    return [len(moments) == 3 * len(names) and all(moments), all(both), all(weights)]


def test_single_files_are_divided_among_the_ranks_moments_included(tmp_path: Path) -> None:
    assert run_ranks(files, 2, tmp_path) == [[True, True, True]] * 2


def partly_frozen() -> Net:
    module = made()
    module.blocks.requires_grad_(False)
    return module


def trainable_only(folder: Path) -> tuple[bool, str]:
    saving = fabric_of(2, trainable_only=True)
    state = trained(saving, partly_frozen())
    saving.save(folder / "part.ckpt", state)
    loading = fabric_of(3)
    module = partly_frozen()
    model, optimizer = loading.setup(module, adamw(module))
    own = {"model": model, "optimizer": optimizer, "steps": 0}
    loading.load(folder / "part.ckpt", own)
    with pytest.raises(CheckpointError) as refused:
        loading.load(folder / "part.ckpt", {"model": loading.setup_module(Tailed().double())})
    return same(values_of(own), values_of(state)), str(refused.value)


def test_what_is_trained_is_saved_by_itself_and_loaded_on_top_of_the_rest(tmp_path: Path) -> None:
    for same_values, said in run_ranks(trainable_only, 2, tmp_path):
        assert same_values
        assert "missing there:\n    tail.bias\n    tail.weight\n" in said
    saved = [key for key in saved_tensors(tmp_path / "part.ckpt") if key.startswith("model.")]
    assert saved
    assert not [key for key in saved if key.startswith("model.blocks")]


def lenient(folder: Path) -> tuple[bool, list[str], dict[str, Any]]:
    fabric = fabric_of(3)
    state = trained(fabric, made())
    fabric.save(folder / "run.ckpt", {**state, "scheduler": Scheduler(), "more": [1, torch.ones(2)]})
    model = fabric.setup_module(Tailed().double())
    own: dict[str, Any] = {"model": model, "scheduler": Scheduler(), "absent": 5}
    rest = fabric.load(folder / "run.ckpt", own, strict=False)
    saved = dict(state["model"].module.named_parameters())
    both = [(p, saved[name]) for name, p in model.module.named_parameters() if name in saved]
    fits = len(both) == len(saved) and all(torch.equal(whole(p), whole(q)) for p, q in both)
    assert own["scheduler"].loaded == {"count": 3}
    assert own["absent"] == 5
    assert torch.equal(rest["more"][1], torch.ones(2))
    return fits, sorted(rest), {"steps": rest["steps"]}


def test_without_strictness_what_fits_is_loaded_and_the_rest_is_returned(tmp_path: Path) -> None:
    assert run_ranks(lenient, 2, tmp_path) == [(True, ["more", "optimizer", "steps"], {"steps": 2})] * 2
