"""If these fail, the plan that runs is not the one that was asked for."""

import pytest

from meshbolt import TensorParallel, Zero
from meshbolt.config import Settings, resolve
from meshbolt.environment import Environment
from meshbolt.errors import TopologyError
from meshbolt.precision import precision_policy


def plan_for(settings=None, *, world_size=4, flag="32-true", ranks_per_node=None):
    return resolve(
        settings or Settings(),
        world_size=world_size,
        precision=precision_policy(flag),
        device_type="cpu",
        environment=Environment(),
        ranks_per_node=ranks_per_node,
    )


def test_the_shard_axis_is_what_the_copies_leave():
    plan = plan_for(Settings(zero=Zero(stage=2, replicate=2)))
    assert (plan.mesh.dp_replicate, plan.mesh.dp_shard) == (2, 2)


def test_stage_zero_has_copies_only():
    assert plan_for(Settings(zero=Zero(stage=0))).mesh.dp_replicate == 4


def test_ranks_that_share_layers_are_taken_off_first():
    plan = plan_for(Settings(zero=Zero(replicate=2), tensor_parallel=TensorParallel(2)), world_size=16)
    assert plan.mesh.sizes() == {"dp_replicate": 2, "dp_shard": 4, "tp": 2}
    assert plan.rows()["mesh.tp"] == 2
    assert plan.rows()["tensor_parallel.size"] == 2


@pytest.mark.parametrize(("ranks_per_node", "sizes"), [(2, (4, 2)), (8, (1, 8)), (None, (1, 8)), (1, (8, 1))])
def test_a_size_may_be_the_ranks_of_a_machine(ranks_per_node, sizes):
    settings = Settings(zero=Zero(0), tensor_parallel=TensorParallel("node"))
    mesh = plan_for(settings, world_size=8, ranks_per_node=ranks_per_node).mesh
    assert (mesh.dp_replicate, mesh.tp) == sizes


def test_rows_name_every_effective_value_as_plain_data():
    rows = plan_for(flag="bf16-mixed").rows()
    assert rows["zero.stage"] == 3
    assert rows["mesh.dp_shard"] == 4
    assert rows["precision.param_dtype"] == "bfloat16"
    assert all(isinstance(value, (bool, int, float, str, list, type(None))) for value in rows.values())


def test_axes_that_do_not_divide_the_world_are_refused():
    with pytest.raises(TopologyError, match="replicate"):
        plan_for(Settings(zero=Zero(replicate=3)))
