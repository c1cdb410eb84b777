"""The table of precision flags, and the FSDP2 policies made of it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR

from meshbolt.errors import ConfigError
from meshbolt.precision.policy import PrecisionPolicy, precision_policy

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FLAGS = ["32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"]
MIXED = [("bf16-mixed", BF16), ("16-mixed", FP16)]


def policy_of(flag: str, **changes: object) -> PrecisionPolicy:
    return precision_policy(flag, allow_no_master=True, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_one_of_lightning(flag: str) -> None:
    assert flag in _PRECISION_INPUT_STR.__args__
    assert policy_of(flag).flag == flag


@pytest.mark.parametrize(("flag", "dtype"), MIXED)
def test_mixed_flags_keep_float32_shards_and_gather_sixteen_bits(flag: str, dtype: torch.dtype) -> None:
    policy = policy_of(flag)
    assert policy.storage_dtype is FP32
    assert policy.unit_policy().param_dtype is dtype
    assert policy.unit_policy().reduce_dtype is FP32
    assert policy.autocast_dtype is dtype


def test_only_mixed_float16_scales_the_loss() -> None:
    assert [flag for flag in FLAGS if policy_of(flag).scales_loss] == ["16-mixed"]


@pytest.mark.parametrize(("flag", "dtype"), MIXED)
def test_only_the_root_casts_its_outputs(flag: str, dtype: torch.dtype) -> None:
    policy = policy_of(flag)
    assert policy.root_policy().output_dtype is FP32
    assert policy.unit_policy().output_dtype is None
    assert dataclasses.replace(policy.root_policy(), output_dtype=None) == policy.unit_policy()


@pytest.mark.parametrize(("flag", "dtype"), MIXED)
def test_units_cast_their_inputs_only_where_autocast_does_not(flag: str, dtype: torch.dtype) -> None:
    assert not policy_of(flag).unit_policy().cast_forward_inputs
    without = policy_of(flag, autocast=False)
    assert without.autocast_dtype is None
    assert without.unit_policy().cast_forward_inputs
    assert without.unit_policy().param_dtype is dtype


@pytest.mark.parametrize(
    ("flag", "dtype"), [("32-true", None), ("64-true", FP64), ("bf16-true", BF16), ("16-true", FP16)]
)
def test_true_flags_gather_what_they_store_and_never_autocast(flag: str, dtype: torch.dtype | None) -> None:
    policy = policy_of(flag)
    assert policy.storage_dtype is dtype
    assert policy.unit_policy().param_dtype is None
    assert policy.root_policy().output_dtype is None
    assert policy.autocast_dtype is None


@pytest.mark.parametrize("flag", ["bf16-true", "16-true"])
def test_sixteen_bit_shards_are_reduced_in_float32(flag: str) -> None:
    assert policy_of(flag).unit_policy().reduce_dtype is FP32


@pytest.mark.parametrize(("stored", "reduced"), [(BF16, FP32), (FP16, FP32), (FP32, None), (FP64, None)])
def test_under_32_true_the_stored_dtype_says_what_gradients_are_reduced_in(
    stored: torch.dtype, reduced: torch.dtype | None
) -> None:
    policy = policy_of("32-true")
    assert policy.unit_policy(stored=stored).reduce_dtype is reduced
    assert policy.root_policy(stored=stored).reduce_dtype is reduced


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", BF16), ("float16", FP16), ("float32", FP32)])
def test_a_named_reduce_dtype_wins_for_every_flag(flag: str, name: str, dtype: torch.dtype) -> None:
    policy = policy_of(flag, reduce_dtype=name)
    assert policy.unit_policy(stored=BF16).reduce_dtype is dtype
    assert policy.unit_policy(stored=FP32).reduce_dtype is dtype


def test_16_true_is_refused_unless_the_missing_master_copy_is_accepted() -> None:
    with pytest.raises(ConfigError, match=r"'16-true'.*master.*'16-mixed'.*'bf16-true'.*allow_no_master=True"):
        precision_policy("16-true")
    assert precision_policy("16-true", allow_no_master=True).storage_dtype is FP16


def test_an_unknown_flag_is_answered_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"'b16-mixed'.*did you mean 'bf16-mixed'.*known: 16-mixed"):
        precision_policy("b16-mixed")


def test_an_unknown_reduce_dtype_is_answered_with_the_closest_one() -> None:
    with pytest.raises(ConfigError, match=r"'bf16'.*did you mean 'bfloat16'.*auto"):
        precision_policy("bf16-mixed", reduce_dtype="bf16")


def test_the_table_in_the_docstring_says_what_the_policies_say() -> None:
    """A row that drifts from the code would tell users a wrong dtype."""
    from meshbolt.precision import policy as module

    rows = [line.strip("| ").split(" | ") for line in (module.__doc__ or "").splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == FLAGS
    for flag, stored, gathered, reduced, autocast, scaled in rows:
        policy = policy_of(flag.strip("`"))
        assert _matches(stored, policy.storage_dtype, otherwise="as the module made it")
        assert _matches(gathered, policy.param_dtype, otherwise="as stored")
        reduce_dtype = policy.unit_policy(stored=policy.storage_dtype or BF16).reduce_dtype
        assert reduced.startswith("as stored" if reduce_dtype is None else "float32")
        assert _matches(autocast, policy.autocast_dtype, otherwise="no")
        assert scaled == ("yes" if policy.scales_loss else "no")


def _matches(cell: str, dtype: torch.dtype | None, *, otherwise: str) -> bool:
    return cell == (otherwise if dtype is None else str(dtype).removeprefix("torch."))
