"""If these fail, units are too large, too small, or modules that are never called."""

import pytest
from torch import nn

from meshbolt.blocks import find_blocks, modules_by_name_or_class
from meshbolt.errors import ConfigError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.inner = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])


def test_blocks_of_a_list_are_found_and_lists_inside_them_are_not():
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(3))
    model.head = nn.Linear(2, 2)
    assert list(find_blocks(model)) == ["layers.0", "layers.1", "layers.2"]


def test_a_sequence_of_single_layers_has_no_blocks():
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == {}


def test_sequences_in_a_list_are_blocks_but_lists_in_a_list_are_not():
    model = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])
    assert list(find_blocks(model)) == ["0", "1"]
    lists = nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()])])
    assert list(find_blocks(lists)) == ["0.0", "0.1", "1.0", "1.1"]


def test_a_class_that_occurs_once_in_its_container_is_no_block():
    model = nn.ModuleList([Block(), nn.Sequential(nn.Linear(2, 2))])
    assert find_blocks(model)["0.inner.0"] is model[0].inner[0]
    assert "0" not in find_blocks(model)


def test_a_model_that_names_its_unsplittable_classes_is_believed():
    model = nn.Module()
    model._no_split_modules = ["Block"]
    model.only = Block()
    assert list(find_blocks(model)) == ["only"]


def test_torchs_transformer_layers_are_blocks():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False)
    assert list(find_blocks(model)) == ["layers.0", "layers.1"]


def test_modules_are_chosen_by_path_and_by_class():
    model = nn.ModuleDict({"a": Block(), "b": nn.Linear(2, 2)})
    assert list(modules_by_name_or_class(model, ["Block", "b"], setting="Zero.unit")) == ["a", "b"]


def test_a_name_that_selects_nothing_is_refused_with_the_closest_one():
    with pytest.raises(ConfigError, match=r"'Blok' is neither.*did you mean 'Block'"):
        modules_by_name_or_class(nn.ModuleList([Block()]), ["Blok"], setting="Zero.unit")
