from __future__ import annotations

import pytest

from meshbolt.errors import ConfigError
from meshbolt.launch.surroundings import Node, Rank, first_node, look_around, ranks_on_nodes

RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (RANK, Rank(3, 4, "another launcher")),
        (RANK | {"TORCHELASTIC_RUN_ID": "x"}, Rank(3, 4, "torchrun")),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2"}, Node(1, 2, "gpu03")),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "2"}, Node(1, 2, "gpu03")),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, None),
    ],
)
def test_who_has_started_this_process_is_told_from_its_variables(
    environment: dict[str, str], found: Rank | Node | None
) -> None:
    assert look_around(environment) == found


def test_a_task_of_slurm_for_each_rank_is_told_what_torchrun_would_set() -> None:
    tasks = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
    }

    found = look_around(STEP | tasks)

    assert isinstance(found, Rank)
    assert (found.rank, found.size, found.launcher) == (5, 8, "srun")
    assert found.variables == {
        **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        **{"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "gpu03", "MASTER_PORT": "15007"},
    }
    kept = look_around(STEP | tasks | {"MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert isinstance(kept, Rank)
    assert (kept.variables["MASTER_ADDR"], kept.variables["MASTER_PORT"]) == ("a", "1")


@pytest.mark.parametrize(("numbers", "each"), [("4(x2)", [4, 4]), ("4(x2),3", [4, 4, 3]), ("2,1", [2, 1]), ("8", [8])])
def test_the_tasks_on_each_node_of_slurm_are_read(numbers: str, each: list[int]) -> None:
    assert ranks_on_nodes(numbers) == each


@pytest.mark.parametrize("environment", [{"OMPI_COMM_WORLD_SIZE": "2"}, {"PMI_SIZE": "2"}])
def test_each_of_several_processes_of_mpirun_starts_no_ranks_of_its_own(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="mpirun has started this process as one of 2"):
        look_around(environment)


def test_a_batch_script_on_several_nodes_is_told_to_use_srun() -> None:
    with pytest.raises(ConfigError, match="srun --ntasks-per-node=1 meshbolt launch"):
        look_around({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"})


@pytest.mark.parametrize(
    ("names", "first"),
    [("gpu[03-05,9],login1", "gpu03"), ("a", "a"), ("a,b", "a"), ("n[7]-ib", "n7-ib"), ("n1-x,n2-x", "n1-x")],
)
def test_the_first_of_the_nodes_of_slurm_is_found(names: str, first: str) -> None:
    assert first_node(names) == first
