"""If these fail, ranks are divided among the axes wrongly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbolt.errors import TopologyError
from meshbolt.mesh import MeshAxis, MeshShape, shape_for


def test_sizes_follow_the_order_of_the_axes():
    assert list(MeshShape(dp_replicate=2, dp_shard=3, tp=4).sizes().items()) == [
        ("dp_replicate", 2),
        ("dp_shard", 3),
        ("tp", 4),
    ]
    assert [axis.value for axis in MeshAxis] == ["dp_replicate", "dp_shard", "tp"]


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
