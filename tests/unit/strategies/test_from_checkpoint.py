"""Modules from checkpoint directories. If these fail, a module is built that is not what was saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.unit.checkpoint.formats_support import saved
from torch import nn

import meshbolt
from meshbolt.errors import CheckpointError, ConfigError


class Model(pl.LightningModule):
    """Tied weights and hyperparameters."""

    def __init__(self, width: int = 3, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokens = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.tokens.weight
        self.frozen = nn.Linear(width, width)


class Hooked(Model):
    """Looks at the checkpoint, and changes it."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saw = sorted(checkpoint)
        weight = checkpoint["state_dict"].pop("old.weight")
        checkpoint["state_dict"]["frozen.weight"] = weight
        checkpoint["state_dict"]["frozen.bias"][0] = 7.0


class Built(Model):
    """Builds a part of itself when it is configured."""

    def __init__(self, width: int = 3, *, dropout: float = 0.0) -> None:
        super().__init__(width, dropout=dropout)
        del self.frozen
        self.width = width

    def configure_model(self) -> None:
        if not hasattr(self, "frozen"):
            self.frozen = nn.Linear(self.width, self.width)


class Forgiving(Model):
    """Takes what fits."""

    strict_loading = False


def tree(state: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    hyper_parameters = {"width": 4, "dropout": 0.5}
    return {"state_dict": state, "hyper_parameters": hyper_parameters, "pytorch-lightning_version": "2.6.0", **more}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in Model(4).state_dict().items()} | tied(torch.randn(5, 4))


def tied(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"tokens.weight": weight, "head.weight": weight}


def assert_holds(module: pl.LightningModule, state: dict[str, torch.Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", [Model, Built])
def test_weights_and_hyperparameters_are_those_that_were_saved(
    tmp_path: Path, state: dict[str, torch.Tensor], kind: type[Model]
) -> None:
    module = meshbolt.load_from_checkpoint(kind, saved(tmp_path / "run.ckpt", tree(state)))
    assert_holds(module, state)
    assert module.hparams["dropout"] == 0.5
    assert module.head.weight is module.tokens.weight
    assert all(type(parameter) is nn.Parameter and parameter.requires_grad for parameter in module.parameters())


class Keeping(Model):
    """Keeps a tensor of its constructor, and one that is neither parameter nor buffer."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__(4)
        self.save_hyperparameters()
        self.scale = scale
        self.sums: list[torch.Tensor] = []

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.sums = [state_dict.pop(prefix + "sum")]
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_what_a_module_keeps_of_the_checkpoint_can_be_used_when_that_is_gone(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    content = tree({**state, "sum": torch.arange(3.0)}) | {"hyper_parameters": {"scale": torch.ones(2)}}
    path = saved(tmp_path / "run.ckpt", content)
    module = meshbolt.load_from_checkpoint(Keeping, path, strict=False)
    shutil.rmtree(path)
    assert torch.equal(module.scale + module.hparams["scale"], torch.full((2,), 2.0))
    assert [type(held) for held in module.sums] == [torch.Tensor]
    assert torch.equal(module.sums[0], torch.arange(3.0))


def test_an_override_wins_over_what_was_saved(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    module = meshbolt.load_from_checkpoint(Model, saved(tmp_path / "run.ckpt", tree(state)), dropout=0.25)
    assert (module.hparams["width"], module.hparams["dropout"]) == (4, 0.25)


def test_the_hook_sees_the_whole_checkpoint_and_its_changes_count(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    renamed = {("old.weight" if name == "frozen.weight" else name): value for name, value in state.items()}
    module = meshbolt.load_from_checkpoint(Hooked, saved(tmp_path / "run.ckpt", tree(renamed, epoch=2)))
    assert [key for key in module.saw if "version" not in key] == ["epoch", "hyper_parameters", "state_dict"]
    state["frozen.bias"][0] = 7.0
    assert_holds(module, state)


@pytest.mark.parametrize("name", ["head.weight", "tokens.weight"])
def test_of_tied_weights_one_name_is_enough(tmp_path: Path, state: dict[str, torch.Tensor], name: str) -> None:
    once = {key: value for key, value in state.items() if key != name}
    assert_holds(meshbolt.load_from_checkpoint(Model, saved(tmp_path / "run.ckpt", tree(once))), state)


def test_missing_unexpected_and_misshapen_weights_are_refused_by_name(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    changed = {name: value for name, value in state.items() if name != "frozen.bias"} | {"more": torch.ones(1)}
    path = saved(tmp_path / "run.ckpt", tree(changed))
    with pytest.raises(
        CheckpointError, match=r"(?s)run\.ckpt' does not fit Model.*\"frozen\.bias\".*\"more\".*strict=False"
    ):
        meshbolt.load_from_checkpoint(Model, path)
    with pytest.raises(CheckpointError, match=r"size mismatch for frozen\.weight"):
        meshbolt.load_from_checkpoint(Model, path, width=6, strict=False)


@pytest.mark.filterwarnings("ignore:Found keys that are")
def test_without_strictness_what_fits_is_taken(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    some = {name: value for name, value in state.items() if "frozen" not in name} | {"more": torch.ones(1)}
    path = saved(tmp_path / "run.ckpt", tree(some))
    for module in (
        meshbolt.load_from_checkpoint(Model, path, strict=False),
        meshbolt.load_from_checkpoint(Forgiving, path),
    ):
        assert torch.equal(module.tokens.weight, state["tokens.weight"])


def test_weights_that_were_left_out_on_purpose_are_not_missed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path / "run.ckpt", tree({key: value for key, value in state.items() if "frozen" not in key}))
    with pytest.raises(CheckpointError, match="does not fit"):
        meshbolt.load_from_checkpoint(Model, path)
    notes = {"left_out": {"state_dict": ["frozen.bias", "frozen.weight"]}}
    saved(path, tree({key: value for key, value in state.items() if "frozen" not in key}), notes=notes)
    assert torch.equal(meshbolt.load_from_checkpoint(Model, path).tokens.weight, state["tokens.weight"])


def test_a_file_of_lightnings_goes_to_lightning(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(tree(state), tmp_path / "plain.ckpt")
    assert_holds(meshbolt.load_from_checkpoint(Model, tmp_path / "plain.ckpt"), state)


@pytest.mark.parametrize("place", ["nowhere", 3.5, {"cuda:0": "cpu"}])
def test_a_map_location_that_is_no_device_is_refused(tmp_path: Path, place: Any) -> None:
    with pytest.raises(ConfigError, match=r"map_location=.* names no device"):
        meshbolt.load_from_checkpoint(Model, tmp_path, map_location=place)


def test_an_argument_for_files_is_not_swallowed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path / "run.ckpt", tree(state))
    with pytest.raises(ConfigError, match="is for files of Lightning's"):
        meshbolt.load_from_checkpoint(Model, path, hparams_file="a.yaml")


def test_a_module_can_be_moved_where_it_is_wanted(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path / "run.ckpt", tree(state))
    assert meshbolt.load_from_checkpoint(Model, path, map_location="cpu").device.type == "cpu"
    assert meshbolt.load_from_checkpoint(Model, path, map_location=torch.device("meta")).head.weight.is_meta


def test_what_is_no_class_of_a_module_no_checkpoint_or_none_of_a_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes the class of a LightningModule"):
        meshbolt.load_from_checkpoint(Model(), tmp_path)  # type: ignore[arg-type, type-var]
    with pytest.raises(CheckpointError, match="there is nothing at this path"):
        meshbolt.load_from_checkpoint(Model, tmp_path / "nowhere")
    path = saved(tmp_path / "fabric.ckpt", {"model": {"w": torch.ones(2)}})
    with pytest.raises(CheckpointError, match=r"has no 'state_dict'.*Its entries: model.*fabric\.load"):
        meshbolt.load_from_checkpoint(Model, path)
