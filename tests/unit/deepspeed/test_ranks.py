"""Which rank a process is, by the variables of whoever has started it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
import torch

from meshbolt import ConfigError, TopologyError
from meshbolt.deepspeed import comm, get_accelerator, utils, zero
from meshbolt.deepspeed.accelerator import Accelerator
from meshbolt.deepspeed.ranks import LaunchedRanks, Place, init_distributed, place_of_this_process

NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "DS_ACCELERATOR"),
)


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin as a process that nobody has started as a rank, and leave the variables as they were."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def starts_as(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> Place:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return place_of_this_process()


DEEPSPEEDS = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "5",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[3-4]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_a_process_that_nobody_has_started_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    place = starts_as(monkeypatch, {})
    assert place == Place(rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == ("0", "0", "1")
    assert int(os.environ["MASTER_PORT"]) > 1023


@pytest.mark.parametrize("variables", [DEEPSPEEDS, SLURM], ids=["deepspeed", "srun"])
def test_ranks_of_launchers_are_known(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    place = starts_as(monkeypatch, variables)
    assert place == Place(rank=3, world_size=4, local_rank=1, local_world_size=2)
    ranks = LaunchedRanks(place)
    assert (ranks.node_rank(), ranks.global_rank(), ranks.local_rank(), ranks.world_size()) == (1, 3, 1, 4)
    assert ranks.main_address == ("a" if variables is DEEPSPEEDS else "gpu3")
    assert ranks.creates_processes_externally
    ranks.set_global_rank(7)
    ranks.set_world_size(9)
    assert (ranks.global_rank(), ranks.world_size(), ranks.detect()) == (3, 4, False)


def test_without_the_number_on_this_machine_all_ranks_are_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    place = starts_as(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2"})
    assert place == Place(rank=1, world_size=2, local_rank=1, local_world_size=2)
    assert comm.get_local_rank() == 1


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "only RANK is set"),
        ({"LOCAL_RANK": "0"}, "only LOCAL_RANK"),
        ({"RANK": "two", "WORLD_SIZE": "2"}, "no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, "3 ranks with 2"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
    ],
)
def test_variables_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], words: str
) -> None:
    with pytest.raises(TopologyError, match=words):
        starts_as(monkeypatch, variables)


def test_connecting_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="dist_init_required=False"):
        init_distributed(dist_init_required=False)
    with pytest.raises(ConfigError, match="give both"):
        init_distributed(rank=1)


def test_the_accelerator_answers_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Accelerator("cpu")
    assert (here.device_name(), here.device_name(3), here.current_device_name()) == ("cpu", "cpu", "cpu")
    assert (here.device(), here.device_count(), here.communication_backend_name()) == (torch.device("cpu"), 1, "gloo")
    assert here.is_available()
    assert here.is_bf16_supported()
    assert here.is_synchronized_device()
    assert here.on_accelerator(torch.ones(1))
    assert 0 < here.memory_allocated() < here.total_memory()
    assert here.available_memory() > 0
    here.set_device(0)
    here.synchronize()
    here.empty_cache()
    here.manual_seed_all(3)
    assert here.initial_seed() == 3
    with pytest.raises(AttributeError, match="Stream"):
        here.Stream  # noqa: B018
    get_accelerator.cache_clear()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert get_accelerator().device_name(0) == "cpu"
    get_accelerator.cache_clear()
    monkeypatch.setenv("DS_ACCELERATOR", "npu")
    with pytest.raises(ConfigError, match="npu"):
        get_accelerator()
    get_accelerator.cache_clear()


def test_parameters_of_no_engine_stay_as_they_are() -> None:
    layer = torch.nn.Linear(2, 2)
    with zero.GatheredParameters(list(layer.parameters())):
        assert layer.weight.shape == (2, 2)
    with zero.GatheredParameters(layer, modifier_rank=0):
        torch.nn.init.ones_(layer.weight)
    assert layer.weight.eq(1).all()
    assert utils.safe_get_full_fp32_param(layer.weight) is None
    assert utils.safe_get_full_optimizer_state(layer.weight, "exp_avg") is None
    assert utils.safe_get_full_grad(layer.weight) is None
    with pytest.raises(ConfigError, match="shape"):
        utils.safe_set_full_fp32_param(layer.weight, torch.ones(3))
    with pytest.raises(ConfigError, match="Give parameters"), zero.GatheredParameters(3):
        pass
