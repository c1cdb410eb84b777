from typing import Any

import pytest
import torch
from torch import nn

from meshbolt.checkpoint import TensorInfo
from meshbolt.engine.load import check_weights, load_model
from meshbolt.errors import CheckpointError

ONE = torch.zeros(2)


def test_all_that_differs_is_listed_in_one_message() -> None:
    live = {"a": ONE, "b": ONE, "wide": torch.zeros(3, 2)}
    saved = {"a": ONE, "c": ONE, "wide": TensorInfo(shape=(2, 2), dtype=torch.float32)}
    with pytest.raises(CheckpointError, match=r"(?s)weights in run\.ckpt do not fit.*strict_loading=False") as refused:
        check_weights(live, saved, strict=True, source="run.ckpt")
    said = str(refused.value)
    assert "1 missing there:\n    b\n" in said
    assert "1 unknown here:\n    c\n" in said
    assert "1 of another shape or kind:\n    wide: float32[2, 2] there, float32[3, 2] here" in said


def test_names_that_may_differ_are_returned_and_shapes_may_never() -> None:
    lists = check_weights({"a": ONE, "b": ONE}, {"a": ONE, "c": ONE}, strict=False, source="it")
    assert lists == "\n  1 missing there:\n    b\n  1 unknown here:\n    c"
    assert check_weights({"a": ONE}, {"a": ONE}, strict=True, source="it") == ""
    with pytest.raises(CheckpointError, match=r"a: float32\[3\] there"):
        check_weights({"a": ONE}, {"a": torch.zeros(3)}, strict=False, source="it")
    with pytest.raises(CheckpointError, match=r"a: float32\[2\] there, int64\[2\] here"):
        check_weights({"a": torch.zeros(2, dtype=torch.int64)}, {"a": ONE}, strict=True, source="it")


def test_names_that_were_left_out_on_purpose_may_be_missing_but_not_unknown() -> None:
    left_out = frozenset({"base"})
    check_weights({"a": ONE, "base": ONE}, {"a": ONE}, strict=True, source="it", left_out=left_out)
    with pytest.raises(CheckpointError, match=r"missing there:\n    other"):
        check_weights({"a": ONE, "base": ONE, "other": ONE}, {"a": ONE}, strict=True, source="it", left_out=left_out)
    with pytest.raises(CheckpointError, match=r"unknown here:\n    base"):
        check_weights({"a": ONE}, {"a": ONE}, strict=True, source="it", left_out=left_out)


def test_a_long_list_of_names_is_cut() -> None:
    live = {f"layer{index}": ONE for index in range(20)}
    with pytest.raises(CheckpointError, match=r"20 missing there(.|\n)*and 10 more"):
        check_weights(live, {}, strict=True, source="it")


def test_weights_are_copied_into_the_parameters_that_are_there() -> None:
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    weight = module.weight
    load_model(module, other.state_dict())
    assert module.weight is weight
    assert torch.equal(module.weight, other.weight)


def test_what_has_no_counterpart_is_left_alone() -> None:
    module = nn.Linear(2, 3)
    bias = module.bias.detach().clone()
    load_model(module, {"weight": torch.ones(3, 2), "extra": torch.ones(1)})
    assert torch.equal(module.weight, torch.ones(3, 2))
    assert torch.equal(module.bias, bias)


class Counting(nn.Module):
    """Keeps something beside its tensors."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


def test_extra_state_of_modules_is_given_back() -> None:
    for own, saved in ((Counting(0), Counting(7)), (nn.Sequential(Counting(0)), nn.Sequential(Counting(7)))):
        load_model(own, saved.state_dict())
        assert own.state_dict() == saved.state_dict()


class Ledger(nn.Module):
    """Keeps a tensor that is neither parameter nor buffer, as metrics do."""

    def __init__(self, total: float) -> None:
        super().__init__()
        self.total = torch.tensor(total)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "total"] = self.total

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.total = state_dict.pop(prefix + "total").clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Keeping(Ledger):
    """Keeps what it is given, as metrics do."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.total = state_dict.pop(prefix + "total")
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


def test_state_that_a_module_keeps_is_its_own_and_on_its_device() -> None:
    own, saved = nn.Sequential(nn.Linear(2, 2, device="meta"), Keeping(0.0)), {"1.total": torch.tensor(7.0)}
    load_model(own, saved)
    assert own[1].total.device.type == "meta"
    own = nn.Sequential(nn.Linear(2, 2), Keeping(0.0))
    load_model(own, saved)
    saved["1.total"].zero_()
    assert float(own[1].total) == 7.0


def test_state_that_a_module_saves_in_its_own_way_is_given_back_in_its_own_way() -> None:
    own, saved = nn.Sequential(nn.Linear(2, 2), Ledger(0.0)), nn.Sequential(nn.Linear(2, 2), Ledger(7.0))
    load_model(own, saved.state_dict())
    assert float(own[1].total) == 7.0
    assert torch.equal(own[0].weight, saved[0].weight)
