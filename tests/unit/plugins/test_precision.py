import pytest
import torch
from lightning.fabric.plugins import precision as fabric_plugins
from lightning.pytorch.plugins import precision as trainer_plugins

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.plugins import (
    DoublePrecision,
    FullPrecision,
    HalfPrecision,
    MeshPrecision,
    MixedPrecision,
    convert_precision,
)

STOCK = [
    (None, FullPrecision, "32-true"),
    (trainer_plugins.Precision(), FullPrecision, "32-true"),
    (fabric_plugins.Precision(), FullPrecision, "32-true"),
    (trainer_plugins.DoublePrecision(), DoublePrecision, "64-true"),
    (fabric_plugins.DoublePrecision(), DoublePrecision, "64-true"),
    (trainer_plugins.HalfPrecision("bf16-true"), HalfPrecision, "bf16-true"),
    (fabric_plugins.HalfPrecision("bf16-true"), HalfPrecision, "bf16-true"),
    (trainer_plugins.MixedPrecision("bf16-mixed", "cpu"), MixedPrecision, "bf16-mixed"),
    (fabric_plugins.MixedPrecision("bf16-mixed", "cpu"), MixedPrecision, "bf16-mixed"),
]


@pytest.mark.parametrize(("stock", "kind", "flag"), STOCK, ids=lambda value: getattr(value, "__name__", None))
def test_a_stock_plugin_becomes_ours_of_the_same_flag(stock: object, kind: type[MeshPrecision], flag: str) -> None:
    converted = convert_precision(stock)
    assert type(converted) is kind
    assert converted.precision == flag
    assert converted.policy(reduce_dtype="auto").flag == flag


@pytest.mark.parametrize("plugins", [trainer_plugins, fabric_plugins])
def test_a_stock_plugin_keeps_its_scaling(plugins: object) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=7)
    converted = convert_precision(plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler))
    assert converted.loss_scaler.current_scale == 512.0
    assert converted.loss_scaler.growth_interval == 7


def test_our_own_plugin_stays_the_object_it_is() -> None:
    plugin = MixedPrecision("16-mixed", "cpu")
    assert convert_precision(plugin) is plugin


def test_a_plugin_of_another_kind_is_refused_by_name() -> None:
    class Odd(trainer_plugins.MixedPrecision):
        pass

    with pytest.raises(UnsupportedError, match=r"plugin Odd cannot .*meshbolt\.plugins"):
        convert_precision(Odd("bf16-mixed", "cpu"))


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (FullPrecision(), trainer_plugins.Precision),
        (DoublePrecision(), trainer_plugins.DoublePrecision),
        (HalfPrecision(), trainer_plugins.HalfPrecision),
        (MixedPrecision(), trainer_plugins.MixedPrecision),
    ],
)
def test_callbacks_that_ask_for_lightnings_classes_find_them(ours: object, stock: type) -> None:
    assert isinstance(ours, stock)


def test_only_fp16_scales_the_loss() -> None:
    assert MixedPrecision("bf16-mixed", "cpu").loss_scaler is None
    scaler = MixedPrecision(
        "16-mixed", "cpu", init_scale=64.0, growth_interval=3, hysteresis=2, min_scale=4.0
    ).loss_scaler
    assert (scaler.current_scale, scaler.growth_interval, scaler.hysteresis, scaler.min_scale) == (64.0, 3, 2, 4.0)


@pytest.mark.parametrize("flag", ["32-true", "64-true", "bf16-true", "fp16"])
def test_mixed_precision_takes_mixed_flags_only(flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        MixedPrecision(flag, "cpu")


def test_float16_without_a_master_copy_has_to_be_asked_for_twice() -> None:
    with pytest.raises(ConfigError, match="allow_no_master=True"):
        HalfPrecision("16-true")
    policy = HalfPrecision("16-true", allow_no_master=True).policy(reduce_dtype="auto")
    assert policy.storage_dtype == torch.float16


def test_autocast_runs_where_it_is_on_and_not_where_it_is_off() -> None:
    for autocast in (True, False):
        plugin = MixedPrecision("bf16-mixed", "cpu", autocast=autocast)
        assert (plugin.policy(reduce_dtype="auto").autocast_dtype is not None) == autocast
        with plugin.forward_context():
            assert torch.is_autocast_enabled("cpu") == autocast


def test_without_autocast_a_batch_is_rounded_and_what_is_no_number_is_left_alone() -> None:
    batch = {"x": torch.ones(2), "y": torch.ones(2, dtype=torch.int64)}
    plain, cast = (MixedPrecision("bf16-mixed", "cpu", autocast=on).convert_input(batch) for on in (True, False))
    assert plain["x"].dtype == torch.float32
    assert (cast["x"].dtype, cast["y"].dtype) == (torch.bfloat16, torch.int64)


def test_the_reduce_dtype_of_the_user_reaches_the_policy() -> None:
    for plugin in (FullPrecision(), HalfPrecision(), MixedPrecision("bf16-mixed", "cpu")):
        assert plugin.policy(reduce_dtype="bfloat16").reduce_dtype == torch.bfloat16


def test_the_scale_travels_with_a_checkpoint() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", init_scale=64.0)
    other = MixedPrecision("16-mixed", "cpu")
    other.load_state_dict(plugin.state_dict())
    assert other.loss_scaler.current_scale == 64.0
    assert FullPrecision().state_dict() == {}
    FullPrecision().load_state_dict(plugin.state_dict())  # a checkpoint of another precision


def test_a_plugin_that_no_strategy_has_attached_says_so() -> None:
    with pytest.raises(AssertionError, match="before the strategy attached"):
        _ = FullPrecision().engine
