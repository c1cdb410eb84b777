"""If these fail, ranks are divided among the axes wrongly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbolt.errors import TopologyError
from meshbolt.mesh import MeshAxis, MeshShape, shape_for


def test_sizes_follow_the_order_of_the_axes():
    assert list(MeshShape(dp_replicate=2, dp_shard=3, tp=4, pp=5).sizes().items()) == [
        ("pp", 5),
        ("dp_replicate", 2),
        ("dp_shard", 3),
        ("tp", 4),
    ]
    assert [axis.value for axis in MeshAxis] == ["pp", "dp_replicate", "dp_shard", "tp"]


def test_ranks_of_a_pipeline_and_of_shared_layers_see_the_same_samples():
    shape = shape_for(world_size=24, shards=True, replicate=1, tensor_parallel=2, pipeline_parallel=3)
    assert (shape.pp, shape.dp_shard, shape.tp, shape.copies, shape.world_size) == (3, 4, 2, 6, 24)
    by_samples = [shape.data_parallel_rank(rank) for rank in range(24)]
    assert all(by_samples.count(own) == 6 for own in range(4))
    assert [shape.pipeline_rank(rank) for rank in (0, 7, 8, 15, 16, 23)] == [0, 0, 1, 1, 2, 2]


def test_a_pipeline_that_does_not_divide_the_ranks_is_refused_with_what_would():
    with pytest.raises(TopologyError, match=r"pipeline_parallel=4 .* 6 ranks .*\[1, 2, 3, 6\]"):
        shape_for(world_size=6, shards=True, replicate=1, pipeline_parallel=4)
    with pytest.raises(TopologyError, match=r"4 groups of 2 that share layers .*\[1, 2, 4\].*multiple of 6"):
        shape_for(world_size=8, shards=True, replicate=1, pipeline_parallel=3, tensor_parallel=2)


def test_an_axis_of_one_rank_is_left_out_unless_it_is_of_data_parallelism():
    assert MeshShape(dp_replicate=1, dp_shard=1).sizes() == {"dp_replicate": 1, "dp_shard": 1}


@given(replicate=st.integers(1, 8), shard=st.integers(1, 8))
def test_axes_multiply_to_the_world_and_every_rank_has_its_own_samples(replicate, shard):
    shape = shape_for(world_size=replicate * shard, shards=True, replicate=replicate)
    assert shape == MeshShape(dp_replicate=replicate, dp_shard=shard)
    assert shape.world_size == shape.data_parallel_size == replicate * shard
    assert sorted(shape.data_parallel_rank(rank) for rank in range(shape.world_size)) == list(range(shape.world_size))


@given(replicate=st.integers(1, 4), shard=st.integers(1, 4), tp=st.integers(1, 4))
def test_ranks_that_share_layers_see_the_same_samples(replicate, shard, tp):
    shape = shape_for(world_size=replicate * shard * tp, shards=True, replicate=replicate, tensor_parallel=tp)
    assert shape == MeshShape(dp_replicate=replicate, dp_shard=shard, tp=tp)
    assert (shape.world_size, shape.data_parallel_size) == (replicate * shard * tp, replicate * shard)
    seen = [shape.data_parallel_rank(rank) for rank in range(shape.world_size)]
    assert seen == [rank for rank in range(replicate * shard) for _ in range(tp)]


def test_ranks_that_cannot_share_layers_are_refused_with_those_that_can():
    with pytest.raises(TopologyError, match=r"6 ranks cannot be divided by 4.*\[1, 2, 3, 6\]"):
        shape_for(world_size=6, shards=True, replicate=1, tensor_parallel=4)
    with pytest.raises(TopologyError, match=r"6 groups of 2 that share layers cannot be divided by 4.*multiple of 8"):
        shape_for(world_size=12, shards=True, replicate=4, tensor_parallel=2)


def test_without_sharding_every_rank_is_a_replica():
    assert shape_for(world_size=4, shards=False, replicate=1) == MeshShape(dp_replicate=4, dp_shard=1)
    shape = shape_for(world_size=4, shards=False, replicate=1, tensor_parallel=2)
    assert shape == MeshShape(dp_replicate=2, dp_shard=1, tp=2)


def test_copies_that_do_not_divide_the_world_are_refused_with_those_that_do():
    with pytest.raises(TopologyError, match=r"6 ranks cannot be divided by 4.*\[1, 2, 3, 6\]"):
        shape_for(world_size=6, shards=True, replicate=4)
