"""If these fail, a parameter has no owner, two owners, or an owner that cannot hold it."""

import torch
from torch import nn

from meshbolt.zero import Zero, plan_units
from meshbolt.zero.units import KeepNorms


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)


def model_of(*blocks):
    model = nn.Module()
    model.embed, model.blocks, model.head = nn.Embedding(5, 4), nn.ModuleList(blocks), nn.Linear(4, 5, bias=False)
    return model


def test_every_block_is_a_unit_and_the_rest_is_the_roots():
    plan = plan_units(model_of(Block(), Block()), Zero())
    assert list(plan.units) == ["blocks.0", "blocks.1"]
    assert plan.whole == frozenset()


def test_a_tie_inside_the_root_leaves_the_units_alone():
    model = model_of(Block(), Block())
    model.head.weight = model.embed.weight
    assert list(plan_units(model, Zero()).units) == ["blocks.0", "blocks.1"]


def test_blocks_that_share_a_parameter_merge_into_the_root():
    first, second, third = Block(), Block(), Block()
    second.linear.weight = first.linear.weight
    assert list(plan_units(model_of(first, second, third), Zero()).units) == ["blocks.2"]


def test_one_block_used_under_two_names_stays_a_unit():
    block = Block()
    assert len(plan_units(model_of(block, block, Block()), Zero()).units) == 2


def test_scalars_integers_and_odd_dtypes_stay_whole():
    block = Block()
    block.scale = nn.Parameter(torch.tensor(1.0))
    block.counts = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    block.norm.double()
    whole = plan_units(model_of(block, Block()), Zero()).whole
    assert whole == {block.scale, block.counts, block.norm.weight, block.norm.bias}


def test_norms_stay_whole_only_where_16_bits_would_break_them():
    model = model_of(Block(), Block())
    model.batch_norm = nn.BatchNorm1d(4)
    assert plan_units(model, Zero()).whole == frozenset()
    statistics = plan_units(model, Zero(), keep_norms=KeepNorms.RUNNING_STATISTICS).whole
    assert statistics == {model.batch_norm.weight, model.batch_norm.bias}
    assert plan_units(model, Zero(), keep_norms=KeepNorms.ALL).whole >= {
        *model.blocks[0].norm.parameters(),
        *statistics,
    }


def test_nested_units_come_innermost_first():
    plan = plan_units(model_of(Block(), Block()), Zero(unit=["Block", "blocks.0.linear"]))
    assert next(iter(plan.units)) == "blocks.0.linear"
