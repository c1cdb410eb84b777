"""Checkpoints of ranks that hold different parameters, as the stages of a pipeline do: any division writes and reads any."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.rows import full
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import meshbolt
from meshbolt.checkpoint import save_directory, saved_tensors, verify_checkpoint
from meshbolt.checkpoint.agreement import Ranks
from meshbolt.cli.checkpoint.main import run as command
from meshbolt.compat import distributed_tensor, local_tensor, tree_leaves, whole_of
from meshbolt.config import Plan, Settings, resolve
from meshbolt.engine.gathered import local_part
from meshbolt.engine.load import check_weights, follow_state_dicts, load_model
from meshbolt.engine.placeholders import held_elsewhere, model_state, states_of_all_stages
from meshbolt.engine.state import check_optimizer_state, load_optimizer_state, optimizer_state, trained_state
from meshbolt.errors import CheckpointError
from meshbolt.mesh import MeshShape
from meshbolt.pipeline.taint import Foreign, foreign_parameters, is_foreign
from meshbolt.precision import precision_policy
from meshbolt.strategies import directories
from meshbolt.strategies.directories import LoadInto, ToSave, buffers_of, load_tree, savable
from meshbolt.strategies.files import load_file
from meshbolt.testing import run_ranks, run_ranks_expecting

# What each stage holds, by how names begin; the last weight is tied to the first one.
Cut = tuple[tuple[str, ...], ...]
WHOLE: Cut = (("layers.", "norm."),)
EARLY: Cut = (("layers.0.",), ("layers.1.", "layers.2.", "layers.3.", "norm."))
LATE: Cut = (("layers.0.", "layers.1.", "layers.2.", "norm."), ("layers.3.",))
TIED = "layers.3.weight"  # the last of the names of the shared weight
BUFFERS = ("norm.num_batches_tracked", "norm.running_mean", "norm.running_var")
NEVER = -1000.0  # what a buffer has where nobody keeps it up to date


class Model(pl.LightningModule):
    """Layers, of which the first and the last share a weight, and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.layers[3].weight = self.layers[0].weight
        self.norm = nn.BatchNorm1d(6)


class Run:
    """This rank's part of a run: of a module, the stage of a cut, sharded among the ranks that have the same one."""

    def __init__(self, cut: Cut, *, kind: Any = torch.optim.AdamW, sharded: bool = True, seed: int = 7) -> None:
        torch.manual_seed(seed)
        size = dist.get_world_size() // len(cut)
        self.mesh = init_device_mesh("cpu", (len(cut), size), mesh_dim_names=("pp", "dp_shard"))
        self.stage, self.coordinate = divmod(dist.get_rank(), size)
        self.module = Model()
        self.plan = plan_of(MeshShape(dp_replicate=1, dp_shard=size, pp=len(cut)))
        every = dict(self.module.named_parameters(remove_duplicate=False))
        held = {parameter for name, parameter in every.items() if name.startswith(cut[self.stage])}
        others = [name for name, parameter in every.items() if parameter not in held]
        self.never_left = foreign_parameters(self.module, others, Foreign(), device=torch.device("cpu"))
        self.never_left.__enter__()
        self.elsewhere = {name for name in BUFFERS if not name.startswith(cut[self.stage])}
        for name in self.elsewhere:
            self.module.get_buffer(name).fill_(NEVER)
        if sharded:
            first, *_, last = self.module.layers
            for layer in (*self.module.layers, self.module.norm):
                if not any(is_foreign(parameter) for parameter in layer.parameters()):
                    fully_shard(layer, mesh=self.mesh["dp_shard"])
            first.weight = last.weight = first.weight if isinstance(first.weight, DTensor) else last.weight
        follow_state_dicts(self.module, before=lambda: None, after=lambda: None)
        self.named = dict(self.module.named_parameters(remove_duplicate=False))
        self.names = {parameter: name for name, parameter in self.named.items()}
        self.optimizer = kind(self.module.parameters(), lr=0.1, foreach=False)
        self.own = {name: parameter for name, parameter in self.named.items() if not is_foreign(parameter)}

    def train(self) -> None:
        """Take two steps that are the same for any cut, and count what each data-parallel coordinate has seen."""
        for step in range(2):
            for parameter in self.own.values():
                parameter.grad = gradient(self.names[parameter], step, like=parameter)
            self.optimizer.step()
        for number, name in enumerate(BUFFERS):
            if name not in self.elsewhere:
                self.module.get_buffer(name).copy_(buffer_value(number, self.coordinate))

    def tree(self) -> dict[str, Any]:
        stages = self.mesh["pp"].get_group()
        state = model_state(self.module.state_dict(), elsewhere=self.elsewhere, group=stages)
        optimizer = states_of_all_stages(optimizer_state(self.optimizer, self.names), group=stages)
        return {
            "state_dict": state,
            "optimizer_states": [optimizer],
            "epoch": 3,
            "pytorch-lightning_version": "2.6.0",
        }

    def save(self, path: Path, tree: Mapping[str, Any] | None = None) -> None:
        tree = tree or self.tree()
        state = ToSave(
            tree=tree,
            buffers=buffers_of(self.module, tree["state_dict"], key="state_dict"),
            random_state={"torch": torch.tensor([self.coordinate, self.stage])},
            resumed={f"state_dict.{name}": torch.full((6,), 50.0 + self.coordinate) for name in BUFFERS[1:2]},
        )
        save_directory(path, **savable(state, plan=self.plan, ranks=Ranks(), failing="not saved"))

    def load(self, path: Path, *, resumes: bool = False, copies: int = 3) -> directories.Loaded:
        """Read and load a checkpoint, and check that nothing is read that other stages hold.

        Args:
            path: of the checkpoint.
            resumes: as `LoadInto` has it.
            copies: how many tensors of its shape it has for each parameter, beside a count.
        """
        weights = self.module.state_dict()
        into = LoadInto(
            weights={f"state_dict.{name}": value for name, value in weights.items()},
            parameters={"": self.named},
            check=lambda loaded: self.check(loaded.tree),
            resumes=resumes,
        )
        asked = noting_what_is_read()
        loaded = load_tree(str(path), into, weights_only=None, plan=self.plan, group=None)
        foreign = [f".{name}." for name in self.named.keys() - self.own.keys()]
        assert not [key for key in asked if any(name in f".{key}." for name in foreign)]
        needed = sum(copies * local_tensor(parameter).nbytes + 4 for parameter in set(self.own.values()))
        of_buffers = sum(self.module.get_buffer(name).nbytes for name in BUFFERS)
        random_state = 16
        tied_again = local_tensor(self.own[TIED]).nbytes  # each of its names is an entry
        assert sum(tensor.nbytes for tensor in asked.values()) <= needed + of_buffers + random_state + tied_again
        self.take(loaded.tree)
        return loaded

    def check(self, tree: Mapping[str, Any]) -> None:
        check_weights(self.module.state_dict(), tree["state_dict"], strict=True, source="it")
        check_optimizer_state(self.optimizer, tree["optimizer_states"][0], self.names)

    def take(self, tree: Mapping[str, Any]) -> None:
        self.check(tree)
        load_model(self.module, tree["state_dict"])
        load_optimizer_state(self.optimizer, tree["optimizer_states"][0], self.names)

    def values(self) -> dict[str, Tensor]:
        """Return whole parameters and their state, and buffers, by name; of what this rank holds."""
        found = {name: whole(parameter) for name, parameter in self.own.items()}
        for name, values in optimizer_state(self.optimizer, self.names)["state"].items():
            found.update({f"{name} {key}": whole(value) for key, value in values.items()})
        return found | {name: self.module.get_buffer(name) for name in BUFFERS}


def plan_of(mesh: MeshShape) -> Plan:
    plan = resolve(Settings(), world_size=1, precision=precision_policy("32-true"), device_type="cpu")
    return dataclasses.replace(plan, mesh=mesh)


def gradient(name: str, step: int, *, like: nn.Parameter) -> Tensor:
    value = torch.sin(torch.arange(float(like.numel())) + len(name) + 10 * sum(map(ord, name)) + step).view(like.shape)
    if not isinstance(like, DTensor):
        return value
    return distributed_tensor(local_part(value, like=like), like=like, placements=like.placements)


def buffer_value(number: int, coordinate: int) -> Tensor:
    return torch.tensor(5 + number + 100 * coordinate)


def whole(tensor: Tensor) -> Tensor:
    return whole_of(tensor) if isinstance(tensor, DTensor) else tensor.detach()


def noting_what_is_read() -> dict[str, Tensor]:
    asked: dict[str, Tensor] = {}
    read = directories.load_tensors

    def noting(path: Any, into: Mapping[str, Tensor], **options: Any) -> Any:
        asked.update({key: local_tensor(tensor) for key, tensor in into.items()})
        return read(path, into, **options)

    directories.load_tensors = noting
    return asked


# From any cut to any other ------------------------------------------------------------------------------------------------


def save_trained(path: Path, cut: Cut, kind: Any = torch.optim.AdamW, sharded: bool = True) -> dict[str, Tensor]:
    run = Run(cut, kind=kind, sharded=sharded)
    run.train()
    run.save(path)
    return run.values()


def load_into(path: Path, cut: Cut, kind: Any = torch.optim.AdamW, sharded: bool = True) -> dict[str, Tensor]:
    run = Run(cut, kind=kind, sharded=sharded, seed=8)
    run.load(path)
    return run.values()


def check_same(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert ours.keys() <= expected.keys()
    wrong = [name for name, value in ours.items() if not torch.equal(value, expected[name])]
    assert not wrong


ADAGRAD = torch.optim.Adagrad  # keeps state for what it has never trained


@pytest.mark.parametrize(
    ("saving", "loading", "sharded", "kind"),
    [
        (EARLY, WHOLE, True, torch.optim.AdamW),
        (WHOLE, EARLY, True, ADAGRAD),
        (EARLY, LATE, True, torch.optim.AdamW),
        (LATE, EARLY, False, torch.optim.AdamW),
        full(EARLY, EARLY, True, torch.optim.AdamW),
        full(EARLY, WHOLE, False, ADAGRAD),
        full(WHOLE, LATE, False, torch.optim.AdamW),
        full(EARLY, LATE, True, ADAGRAD),
    ],
)
def test_what_any_cut_has_saved_any_other_loads(
    tmp_path: Path, saving: Cut, loading: Cut, sharded: bool, kind: Any
) -> None:
    path = tmp_path / "a.ckpt"
    (expected,) = run_ranks(save_trained, 1, tmp_path / "whole.ckpt", WHOLE, kind, sharded)
    for saved in run_ranks(save_trained, len(saving), path, saving, kind, sharded):
        check_same({name: value for name, value in saved.items() if name not in BUFFERS}, expected)
    loaded = run_ranks(load_into, len(loading), path, loading, kind, sharded)
    for values in loaded:
        check_same(values, expected)
    assert {name for values in loaded for name in values} == expected.keys()
    assert saved_tensors(path) == saved_tensors(tmp_path / "whole.ckpt")


@pytest.mark.parametrize(("saving", "loading"), [(EARLY, LATE), full(EARLY, WHOLE), full(WHOLE, LATE)])
def test_stages_that_are_sharded_among_several_ranks(tmp_path: Path, saving: Cut, loading: Cut) -> None:
    path = tmp_path / "a.ckpt"
    (expected,) = run_ranks(save_trained, 1, tmp_path / "whole.ckpt", WHOLE)
    run_ranks(save_trained, 2 * len(saving), path, saving)
    for rank, values in enumerate(run_ranks(load_into, 2 * len(loading), path, loading)):
        check_same({name: value for name, value in values.items() if name not in BUFFERS}, expected)
        # Those of the rank's own coordinate, whichever stage has kept them up to date.
        for number, name in enumerate(BUFFERS):
            assert bool((values[name] == buffer_value(number, coordinate=rank % 2)).all())
    as_before = {key: info for key, info in saved_tensors(path).items() if not key.startswith("meshbolt.")}
    assert as_before.items() <= saved_tensors(tmp_path / "whole.ckpt").items()
    apart = sorted(key for key in saved_tensors(path) if key.startswith("meshbolt."))
    assert apart == [
        *(f"meshbolt.buffers.1.state_dict.{name}" for name in BUFFERS),
        "meshbolt.random.0.torch",
        "meshbolt.random.1.torch",
        "meshbolt.resumed_buffers.0.state_dict.norm.running_mean",
        "meshbolt.resumed_buffers.1.state_dict.norm.running_mean",
    ]


def resume(path: Path, cut: Cut) -> tuple[list[int], float]:
    run = Run(cut)
    loaded = run.load(path, resumes=True)
    return loaded.random_state["torch"].tolist(), float(run.module.norm.running_mean[0])


def test_all_stages_of_a_coordinate_resume_with_its_random_state_and_its_buffers(tmp_path: Path) -> None:
    run_ranks(save_trained, 2, tmp_path / "a.ckpt", EARLY)
    assert run_ranks(resume, 2, tmp_path / "a.ckpt", LATE) == [([0, 0], 50.0)] * 2
    run_ranks(save_trained, 4, tmp_path / "b.ckpt", EARLY)
    assert run_ranks(resume, 4, tmp_path / "b.ckpt", LATE) == [([0, 0], 50.0), ([1, 0], 51.0)] * 2


# Files and directories without a pipeline ---------------------------------------------------------------------------------


def load_plain_file(path: Path, cut: Cut, sharded: bool) -> dict[str, Tensor]:
    run = Run(cut, sharded=sharded, seed=8)
    run.take(load_file(str(path), weights_only=None, group=None))
    return run.values()


def write_file(path: Path) -> dict[str, Tensor]:
    run = Run(WHOLE, sharded=False)
    run.train()
    torch.save({"state_dict": run.module.state_dict(), "optimizer_states": [run.optimizer.state_dict()]}, path)
    return run.values()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_file_of_whole_tensors_loads_into_stages(tmp_path: Path, sharded: bool) -> None:
    (expected,) = run_ranks(write_file, 1, tmp_path / "a.ckpt")
    for values in run_ranks(load_plain_file, 2, tmp_path / "a.ckpt", EARLY, sharded):
        check_same(values, expected)


def test_a_module_and_the_commands_read_it_without_any_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.ckpt"
    (expected,) = run_ranks(save_trained, 1, tmp_path / "whole.ckpt", WHOLE)
    run_ranks(save_trained, 2, path, EARLY)
    check_same(meshbolt.load_from_checkpoint(Model, path).state_dict(), expected)
    verify_checkpoint(path)
    for arguments in (["inspect", path], ["verify", path], ["consolidate", path, tmp_path / "one.ckpt"]):
        assert command(["checkpoint", *map(str, arguments)]) == 0
    # 10 names of parameters and 3 of buffers, and for each of the 9 parameters 2 moments and a count.
    assert "lightning, 40 tensors" in capsys.readouterr().out
    file = torch.load(tmp_path / "one.ckpt", weights_only=True)
    check_same(file["state_dict"], expected)
    names = list(dict(Model().named_parameters()))
    for number, values in file["optimizer_states"][0]["state"].items():
        of = TIED if names[number] == "layers.0.weight" else names[number]
        check_same({f"{of} {key}": value for key, value in values.items()}, expected)


# What only ranks that talk to each other can know -------------------------------------------------------------------------


def save_what_nobody_has(path: Path) -> None:
    run = Run(EARLY)
    tree = run.tree()
    run.save(path, {**tree, "callbacks": {"Average": {"weights": torch.empty(3, device="meta")}}})


def test_what_no_stage_holds_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    match = r"not saved: 'callbacks.Average.weights' has no values on any rank"
    first, second = run_ranks_expecting(save_what_nobody_has, 2, tmp_path / "a", error=CheckpointError, match=match)
    assert first == second
    assert list(tmp_path.iterdir()) == []


def save_what_only_the_last_stage_has(path: Path) -> list[str]:
    run = Run(EARLY)
    said: list[str] = []
    directories._log.warning = lambda text, *values: said.append(text % values)  # type: ignore[method-assign]
    run.save(path, {**run.tree(), "callbacks": {"outputs": torch.ones(3)} if run.stage else {}})
    return said


def test_what_rank_0_does_not_name_is_not_lost_in_silence(tmp_path: Path) -> None:
    first, second = run_ranks(save_what_only_the_last_stage_has, 2, tmp_path / "a.ckpt")
    assert len(first) == 1
    assert first[0].startswith("'callbacks.outputs' is not saved: only ranks of later pipeline stages")
    assert second == []
    assert "callbacks.outputs" not in saved_tensors(tmp_path / "a.ckpt")


def save_what_follows_parameters(path: Path) -> None:
    run = Run(EARLY)
    run.train()
    average = {name: parameter.detach() * 2 for name, parameter in run.named.items()}
    run.save(path, {**run.tree(), "average": average})
    loaded = run.load(path, copies=5)
    for name, value in loaded.tree["average"].items():
        assert value.is_meta == is_foreign(run.named[name])
        if not value.is_meta:
            assert torch.equal(whole(value), whole(run.named[name]) * 2)


def test_a_tree_of_the_user_that_follows_parameters_is_saved_by_all_and_read_by_each(tmp_path: Path) -> None:
    run_ranks(save_what_follows_parameters, 2, tmp_path / "a.ckpt")
    assert len([key for key in saved_tensors(tmp_path / "a.ckpt") if key.startswith("average.")]) == 10


def states_merged() -> tuple[list[str], list[bool]]:
    run = Run(LATE)
    run.train()
    merged = states_of_all_stages(optimizer_state(run.optimizer, run.names), group=run.mesh["pp"].get_group())
    shapes = {tuple(value.shape) for value in tree_leaves(merged["state"])}
    assert shapes == {(), (6,), (6, 6)}
    return list(merged["state"]), [held_elsewhere(values["exp_avg"]) for values in merged["state"].values()]


def test_every_rank_names_the_state_of_all_parameters_in_the_order_of_the_optimizer() -> None:
    (first, theirs), (second, ours) = run_ranks(states_merged, 2)
    names = [TIED, *(f"layers.{n}.{kind}" for n, kind in ((0, "bias"), (1, "weight"), (1, "bias")))]
    assert first == second
    assert first[:4] == names
    assert len(first) == 9
    held_by_both = [name for name, there, here in zip(first, theirs, ours, strict=True) if not (there or here)]
    assert held_by_both == [TIED]
    assert not any(there and here for there, here in zip(theirs, ours, strict=True))


class Counts(nn.Module):
    """Keeps a count that is no tensor."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def get_extra_state(self) -> Any:
        return {"count": self.count, "history": [torch.ones(self.count)] * self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def entries_of_all() -> list[Any]:
    rank = dist.get_rank()
    module = nn.ModuleList([Counts(2 + rank), Counts(4 + rank)])
    others = {f"{1 - rank}._extra_state"}
    state = model_state(module.state_dict(), elsewhere=others, group=dist.group.WORLD)
    return [(entry["count"], [value.is_meta for value in entry["history"]]) for entry in state.values()]


def test_entries_that_are_no_tensors_are_those_of_their_stage() -> None:
    first, second = run_ranks(entries_of_all, 2)
    assert first == [(2, [False] * 2), (5, [True] * 5)]
    assert second == [(2, [True] * 2), (5, [False] * 5)]


def left_out_of_all() -> list[str]:
    run = Run(EARLY)
    run.train()
    for name, parameter in run.named.items():
        parameter.requires_grad_("weight" not in name)
    run.optimizer.state.pop(run.named["layers.1.weight"], None)
    state, left_out = trained_state(
        run.module.state_dict(), run.module, [run.optimizer], stages=run.mesh["pp"].get_group()
    )
    assert not set(left_out) & set(state)
    return left_out


def test_whether_a_frozen_parameter_was_trained_its_stage_knows() -> None:
    assert run_ranks(left_out_of_all, 2) == [["layers.1.weight"]] * 2
