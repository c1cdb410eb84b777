from __future__ import annotations

import pytest

from meshbolt.errors import ConfigError
from meshbolt.launch.surroundings import Node, Rank, first_node, look_around

RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (RANK, Rank(3, 4, "another launcher")),
        (RANK | {"TORCHELASTIC_RUN_ID": "x"}, Rank(3, 4, "torchrun")),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2"}, Node(1, 2, "gpu03")),
        (STEP | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5"}, Rank(5, 8, "srun")),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, None),
    ],
)
def test_who_has_started_this_process_is_told_from_its_variables(
    environment: dict[str, str], found: Rank | Node | None
) -> None:
    assert look_around(environment) == found


def test_a_batch_script_on_several_nodes_is_told_to_use_srun() -> None:
    with pytest.raises(ConfigError, match="srun --ntasks-per-node=1 meshbolt launch"):
        look_around({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"})


@pytest.mark.parametrize(
    ("names", "first"),
    [("gpu[03-05,9],login1", "gpu03"), ("a", "a"), ("a,b", "a"), ("n[7]-ib", "n7-ib"), ("n1-x,n2-x", "n1-x")],
)
def test_the_first_of_the_nodes_of_slurm_is_found(names: str, first: str) -> None:
    assert first_node(names) == first
