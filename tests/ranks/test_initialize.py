"""The engine of `initialize`, against the same training in one plain process."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks.initialize_support import (
    SAMPLES,
    Net,
    Reference,
    assert_equal,
    batch,
    config,
    made,
    said,
    train,
    whole,
)
from tests.rows import full
from torch import nn
from torch.utils.data import TensorDataset

import meshbolt
from meshbolt import ConfigError, UnsupportedError, deepspeed
from meshbolt.testing import run_ranks

STAGES = (0, 1, 2, 3)


def as_in_one_process(window: int, clip: float) -> None:
    for stage in STAGES:
        engine = made(Net(), config=config(stage, window=window, clip=clip))
        reference = Reference(window=window, clip=clip)
        losses, expected = train(engine, range(3 * window)), reference.train(range(3 * window))
        torch.testing.assert_close(losses, expected[dist.get_rank()], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(engine.get_global_grad_norm(), reference.norms[-1], rtol=1e-5, atol=1e-6)
        assert_equal(engine, reference.module)
        assert engine.get_lr() == [group["lr"] for group in reference.optimizer.param_groups]
        counted = (engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps)
        assert counted == (3, 3 * window, 3 * window * SAMPLES * 2, 0), f"stage {stage}"


@pytest.mark.parametrize(("window", "clip"), [(3, 0.3), full(1, 0.3), full(1, 0.0), full(3, 0.0)])
def test_training_is_that_of_one_process_in_every_stage(window: int, clip: float) -> None:
    run_ranks(as_in_one_process, 2, window, clip, timeout=60)


PRECISIONS: dict[str, tuple[dict[str, Any], torch.dtype, float]] = {
    "bf16": ({"bf16": {"enabled": True}}, torch.bfloat16, 1.0),
    "fp16": ({"fp16": {"enabled": True, "initial_scale_power": 4}}, torch.float16, 16.0),
}


def as_in_one_process_in_16_bits(name: str, stages: tuple[int, ...]) -> None:
    block, dtype, scale = PRECISIONS[name]
    for stage in stages:
        engine = made(Net(), config=config(stage, window=2, **block))
        reference = Reference(window=2, dtype=dtype, scale=scale)
        losses, expected = train(engine, range(6), dtype=dtype), reference.train(range(6))
        assert losses == expected[dist.get_rank()], f"stage {stage}"
        assert_equal(engine, reference.module, rtol=0, atol=1e-6)
        assert (engine.fp16_enabled(), engine.bfloat16_enabled()) == (name == "fp16", name == "bf16")
        assert engine(batch(0, 0, dtype=dtype)[0]).dtype is dtype


@pytest.mark.parametrize(
    ("name", "stages"), [("bf16", (3,)), ("fp16", (0,)), full("bf16", (0, 1, 2)), full("fp16", (1, 2, 3))]
)
def test_16_bit_blocks_train_as_one_process_with_the_same_casts_and_leave_outputs_in_them(
    name: str, stages: tuple[int, ...]
) -> None:
    run_ranks(as_in_one_process_in_16_bits, 2, name, stages, timeout=60)


def an_overflow() -> None:
    engine = made(Net(), config=config(2, fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1}))
    train(engine, range(2), dtype=torch.float16)
    before, rates = whole(engine), engine.get_lr()
    assert (engine.was_step_applied(), engine.optimizer.overflow, engine.optimizer.cur_scale) == (True, False, 16.0)
    x, y = batch(2, dist.get_rank(), dtype=torch.float16)
    engine.backward(F.mse_loss(engine(x), y) * (float("inf") if dist.get_rank() == 1 else 1.0))
    engine.step()
    torch.testing.assert_close(whole(engine), before, rtol=0, atol=0)
    assert (engine.skipped_steps, engine.global_steps, engine.was_step_applied()) == (1, 3, False)
    assert (engine.optimizer.overflow, engine.cur_scale, engine.get_lr()) == (True, 8.0, rates)
    assert engine.get_global_grad_norm() == float("inf")
    train(engine, range(3, 4), dtype=torch.float16)
    assert engine.was_step_applied()
    assert engine.get_lr() != rates


def test_an_overflow_on_one_rank_skips_the_step_of_all_and_of_the_scheduler() -> None:
    run_ranks(an_overflow, 2, timeout=60)


def windows() -> None:
    engine = made(Net(), config=config(1, window=1))
    reference = Reference(window=1)
    train(engine, range(2)), reference.train(range(2))
    engine.set_train_batch_size(SAMPLES * 2 * 3)
    reference.window = 3
    assert (engine.gradient_accumulation_steps(), engine.train_micro_batch_size_per_gpu()) == (3, SAMPLES)
    boundaries = []
    for index in range(3, 6):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        train(engine, range(index, index + 1))
    reference.train(range(3, 6))
    # Three calls of step since 2: the window of three that the counter is in ends at 3, as in DeepSpeed.
    assert boundaries == [True, False, False]


def by_hand() -> None:
    for stage in STAGES:
        engine, reference = made(Net(), config=config(stage, window=3)), Reference(window=3)
        reference.train(range(3))
        for index in range(3):
            engine.set_gradient_accumulation_boundary(index == 2)
            engine.backward(F.mse_loss(engine(batch(index, dist.get_rank())[0]), batch(index, dist.get_rank())[1]))
            # In stages 0 and 1 nothing is reduced before the window's end.
            gradient = engine.optimizer.param_groups[0]["params"][0].grad
            assert any(each.is_partial() for each in gradient.placements) is (stage < 2 and index < 2)
        engine.step()
        assert_equal(engine, reference.module)
        assert (engine.global_steps, engine.micro_steps) == (1, 1)


def without_sync() -> None:
    for stage in STAGES:
        engine, reference = made(Net(), config=config(stage, window=1)), Reference(window=1, clip=0.3)
        for index in range(2):
            x, y = batch(index, dist.get_rank())
            if index == 0:
                with engine.no_sync():
                    engine.backward(F.mse_loss(engine(x), y) / 2)
                continue
            engine.backward(F.mse_loss(engine(x), y) / 2)
        engine.step()
        reference.window = 2
        reference.train(range(2))
        assert_equal(engine, reference.module)


@pytest.mark.parametrize("way", [windows, by_hand, without_sync])
def test_windows_end_where_they_are_counted_or_said_to_end(way: Callable[[], None]) -> None:
    run_ranks(way, 2, timeout=60)


def dropped_inside_of_a_window() -> None:
    engine, reference = made(Net(), config=config(2, window=3)), Reference(window=1, clip=0.3)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("meshbolt.deepspeed.engine").addHandler(handler)
    for index in range(6):
        engine.optimizer.zero_grad()
        train(engine, range(index, index + 1))
    assert [record.levelname for record in records] == ["WARNING"]
    assert "leave zero_grad() out" in records[0].getMessage()
    for index in (2, 5):  # what is left: a third of the gradient of the last batch
        reference.scale = 3.0
        for rank in range(2):
            x, y = batch(index, rank)
            (F.mse_loss(reference.module(x), y) / 2).backward()
        reference.step()
    assert_equal(engine, reference.module)


def test_gradients_that_are_dropped_inside_of_a_window_are_warned_of() -> None:
    run_ranks(dropped_inside_of_a_window, 2, timeout=60)


OTHER_PLACES: dict[str, dict[str, Any]] = {
    "state on the host": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "parameters too": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "cpu"},
        }
    },
}


def in_other_places(name: str, clip: float) -> None:
    engine = made(Net(), config=config(2, window=2, clip=clip, **OTHER_PLACES[name]))
    reference = Reference(window=2, clip=clip)
    losses, expected = train(engine, range(6)), reference.train(range(6))
    torch.testing.assert_close(losses, expected[dist.get_rank()], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(engine.get_global_grad_norm(), reference.norms[-1], rtol=1e-5, atol=1e-6)
    assert_equal(engine, reference.module)


@pytest.mark.parametrize(
    ("name", "clip"),
    [("state on the host", 0.0), full("state on the host", 0.3), full("parameters too", 0.0), ("parameters too", 0.3)],
)
def test_offloaded_state_and_parameters_train_as_one_process(name: str, clip: float) -> None:
    run_ranks(in_other_places, 2, name, clip, timeout=60)


def under_autocast() -> None:
    block = config(1, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    engine, expected = made(Net().layers, config=block), Net().layers
    x, y = batch(0, dist.get_rank())
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.mse_loss(expected(x).float(), y)
    assert F.mse_loss(engine(x), y).item() == loss.item()
    assert (engine.torch_autocast_enabled(), engine.torch_autocast_dtype()) == (True, torch.bfloat16)
    assert (engine.bfloat16_enabled(), engine.fp16_enabled(), engine(x).dtype) == (False, False, torch.float32)


def test_torch_autocast_casts_by_operation_as_on_one_device() -> None:
    run_ranks(under_autocast, 2, timeout=60)


def own_optimizers(stages: tuple[int, ...]) -> None:
    for stage in stages:
        reference = Reference(window=1)
        reference.train(range(3))
        block = config(stage, optimizer={"type": "SGD", "params": {"lr": 5.0}})
        module = Net()
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = deepspeed.WarmupLR(optimizer, warmup_max_lr=2e-2, warmup_num_steps=4, warmup_min_lr=1e-3)
        with said() as output:
            engine, returned, loader, scheduler = deepspeed.initialize(
                model=module, optimizer=optimizer, lr_scheduler=schedule, config=block
            )
        assert (returned, scheduler, loader) == (optimizer, schedule, None)
        assert (dist.get_rank() == 1) is not (
            "optimizer.type" in output.getvalue() and "is used instead" in output.getvalue()
        )
        train(engine, range(3))
        assert_equal(engine, reference.module)

        def adam(parameters: Any) -> torch.optim.Optimizer:
            return deepspeed.ops.adam.FusedAdam(parameters, lr=1e-2, weight_decay=0.1)

        def warmup(made_of: torch.optim.Optimizer) -> Any:
            return deepspeed.WarmupLR(made_of, warmup_max_lr=2e-2, warmup_num_steps=4, warmup_min_lr=1e-3)

        module = Net()
        groups = [{"params": module.layers.parameters()}, {"params": [module.scale]}, {"params": []}]
        engine = made(module, optimizer=adam, lr_scheduler=warmup, model_parameters=groups, config=block)
        train(engine, range(3))
        assert_equal(engine, reference.module)
        assert len(engine.optimizer.param_groups) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stages", [(1, 3), full((0, 2))])
def test_the_callers_optimizer_and_scheduler_are_used_and_win_over_the_files(stages: tuple[int, ...]) -> None:
    run_ranks(own_optimizers, 2, stages, timeout=60)


def script_of_two(modules: tuple[Any, Any], step: Callable[[Any, torch.Tensor], None]) -> None:
    """Train a generator and a discriminator in turn; the generator's loss goes through both."""
    generator, discriminator = modules
    for index in range(3):
        real = batch(index, dist.get_rank() if dist.is_initialized() else 0)[0]
        fake = generator(real)
        discriminator.zero_grad()
        step(discriminator, F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean())
        generator.zero_grad()
        step(generator, F.softplus(-discriminator(fake)).mean())


def two_engines(stages: tuple[int, ...]) -> None:
    def networks() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)), nn.Sequential(
            nn.Linear(6, 9), nn.Linear(9, 1)
        )

    def plain_step(module: Any, loss: torch.Tensor) -> None:
        loss.backward()
        for parameter in module.parameters():
            dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)
            parameter.grad /= 2
        nn.utils.clip_grad_norm_(module.parameters(), 0.3)
        optimizers[module].step()

    def engine_step(engine: Any, loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    expected = networks()
    optimizers = {module: torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1) for module in expected}
    script_of_two(expected, plain_step)
    for stage in stages:
        block = config(stage)
        del block["scheduler"]
        engines = tuple(made(module, config=block) for module in networks())
        script_of_two(engines, engine_step)
        for engine, module in zip(engines, expected, strict=True):
            assert_equal(engine, module)
            engine.destroy()


@pytest.mark.parametrize("stages", [(1, 3), full((0, 2))])
def test_a_loss_may_go_through_the_modules_of_two_engines(stages: tuple[int, ...]) -> None:
    run_ranks(two_engines, 2, stages, timeout=60)


class Heavy(nn.Module):
    """A layer that is large enough to be built without values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 1)
        nn.init.orthogonal_(self.first.weight)


def without_values() -> None:
    for stage in (0, 3):
        torch.manual_seed(5)
        plain = Heavy()
        torch.manual_seed(5)
        with deepspeed.zero.Init(config_dict_or_path=config(stage)):
            module = Heavy()
        assert module.first.weight.is_meta
        with (
            pytest.raises(UnsupportedError, match=r"zero\.Init"),
            deepspeed.zero.GatheredParameters([module.first.weight]),
        ):
            pass
        engine = made(module, config=config(stage))
        assert_equal(engine, plain, rtol=0, atol=0)


def test_a_model_built_under_zero_init_has_the_values_of_a_plain_build() -> None:
    run_ranks(without_values, 2, timeout=60)


def parameters_whole_for_a_while(stages: tuple[int, ...]) -> None:
    for stage in stages:
        engine, expected = made(Net(), config=config(stage)), Net()
        own = dict(expected.named_parameters())
        for name, parameter in engine.module.named_parameters():
            assert (parameter.ds_shape, parameter.ds_numel) == (own[name].shape, own[name].numel())
            with deepspeed.zero.GatheredParameters(parameter):
                assert type(parameter.data.cpu()) is torch.Tensor
                torch.testing.assert_close(parameter.data.clone(), own[name].data, rtol=0, atol=0)
        rank = dist.get_rank()
        with deepspeed.zero.GatheredParameters([engine.module.layers[0].weight, engine.module.scale], modifier_rank=1):
            if rank == 1:
                engine.module.scale.data.fill_(3.0)
                nn.init.ones_(engine.module.layers[0].weight)
        values = whole(engine)
        assert values["scale"].item() == 3.0
        assert values["layers.0.weight"].eq(1).all()
        with pytest.raises(ConfigError, match="modifier_rank"), deepspeed.zero.GatheredParameters(engine.module):
            nn.init.zeros_(engine.module.layers[0].bias)
        train(engine, range(1))
        weight = engine.module.layers[2].weight
        assert deepspeed.utils.safe_get_full_optimizer_state(weight, "exp_avg").shape == (13, 10)
        assert deepspeed.utils.safe_get_full_optimizer_state(weight, "nothing") is None
        assert torch.equal(deepspeed.utils.safe_get_full_fp32_param(weight), whole(engine)["layers.2.weight"])
        deepspeed.utils.safe_set_full_fp32_param(weight, torch.full((13, 10), 2.0))
        assert whole(engine)["layers.2.weight"].eq(2).all()
        engine.backward(engine(batch(0, rank)[0]).sum())
        assert deepspeed.utils.safe_get_full_grad(weight).shape == (13, 10)
        engine.step()


@pytest.mark.parametrize("stages", [(1, 3), full((0, 2))])
def test_parameters_can_be_read_and_changed_whole_by_whoever_holds_them(stages: tuple[int, ...]) -> None:
    run_ranks(parameters_whole_for_a_while, 2, stages, timeout=60)


def parameters_inside_of_a_window(stages: tuple[int, ...]) -> None:
    for stage in stages:
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logging.getLogger("meshbolt.deepspeed.engine").addHandler(handler)
        engine, reference = made(Net(), config=config(stage, window=2)), Reference(window=2)
        held = dict(engine.module.named_parameters())
        expected = {name: parameter.detach().clone() for name, parameter in Net().named_parameters()}
        train(engine, range(1))
        for parameters in (held, dict(engine.module.named_parameters())):
            for name, parameter in parameters.items():
                with deepspeed.zero.GatheredParameters([parameter]):
                    assert torch.equal(parameter.data.clone(), expected[name]), (stage, name)
            with deepspeed.zero.GatheredParameters([parameters["scale"]], modifier_rank=0):
                parameters["scale"].data.add_(1.0)
            expected["scale"] += 1.0
        with torch.no_grad():
            reference.module.scale.add_(2.0)
        torch.testing.assert_close(whole(engine), expected, rtol=0, atol=0)
        gradients = {name: deepspeed.utils.safe_get_full_grad(parameter) for name, parameter in held.items()}
        assert not [name for name, gradient in gradients.items() if gradient is None]
        engine.zero_grad()
        assert {deepspeed.utils.safe_get_full_grad(parameter) for parameter in held.values()} == {None}
        engine.module.scale.grad = None
        train(engine, range(1, 2))
        for rank in range(2):
            x, y = batch(1, rank)
            (F.mse_loss(reference.module(x), y) / 4).backward()
        reference.step()
        assert_equal(engine, reference.module)
        assert len(records) == 1, stage


@pytest.mark.parametrize("stages", [(1, 3), full((0, 2))])
def test_parameters_are_whole_and_gradients_droppable_inside_of_a_window(stages: tuple[int, ...]) -> None:
    run_ranks(parameters_inside_of_a_window, 2, stages, timeout=60)


def data_of_each_rank(folder: str) -> None:
    values = torch.arange(14.0).reshape(14, 1)
    data = TensorDataset(values, values)
    path = Path(folder) / "config.json"
    block = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 1},
        "dataloader_drop_last": True,
        "bf16": {"enabled": False},
    }
    if dist.get_rank() == 0:
        path.write_text(json.dumps(block))
    dist.barrier()
    args = deepspeed.add_config_arguments(argparse.ArgumentParser()).parse_args(["--deepspeed_config", str(path)])
    args.local_rank = -1
    with said():
        engine, optimizer, loader, scheduler = deepspeed.initialize(
            args=args,
            model=nn.Linear(1, 1),
            training_data=data,
            collate_fn=lambda each: torch.stack([x for x, _ in each]),
        )
    assert (optimizer, scheduler, args.local_rank) == (None, None, dist.get_rank())
    loader = engine.deepspeed_io(data, num_local_io_workers=0)
    assert (len(loader), engine.train_micro_batch_size_per_gpu()) == (3, 2)
    seen = torch.cat(list(loader)).flatten().tolist()
    both: list[Any] = [None, None]
    dist.all_gather_object(both, seen)
    assert not set(both[0]) & set(both[1])
    in_order = engine.deepspeed_io(data, route="eval", batch_size=7, num_local_io_workers=0)
    assert next(in_order).flatten().tolist() == [*range(dist.get_rank(), 14, 2)]
    with pytest.raises(ConfigError, match="no optimizer"):
        engine.backward(engine(torch.ones(1, 1)).sum())
    with pytest.raises(ConfigError, match="no optimizer"):
        engine.step()


def test_training_data_is_divided_and_the_file_may_come_by_the_scripts_arguments(tmp_path: Path) -> None:
    run_ranks(data_of_each_rank, 2, str(tmp_path), timeout=60)


def calls_out_of_place() -> None:
    engine = made(Net(), config=config(2, window=2))
    train(engine, range(2))
    with pytest.raises(ConfigError, match=r"engine\.step\(\) instead"):
        engine.optimizer.step()
    loss = engine(batch(0, 0)[0]).sum()
    with pytest.raises(UnsupportedError, match=r"engine\.backward\(loss\)"):
        loss.backward()
    engine = made(Net(), config=config(2))
    with pytest.raises(ConfigError, match=r"engine\.backward\(loss\) not since"):
        engine.step()
    with torch.no_grad(), pytest.raises(ConfigError, match="without a graph"):
        engine.backward(engine(batch(0, 0)[0]).sum())
    with pytest.raises(ConfigError, match="shape"):
        engine.backward(engine(batch(0, 0)[0]))
    with engine.no_sync():
        with pytest.raises(ConfigError, match="no_sync"):
            engine.step()
        with pytest.raises(ConfigError, match="Enter it once"), engine.no_sync():
            pass
    for wrong in (5, 7, 0, -6, 6.0, True):
        with pytest.raises(ConfigError, match="multiple of"):
            engine.set_train_batch_size(wrong)
    for wrong in (0, "3", True):
        with pytest.raises(ConfigError, match="1 or more"):
            engine.set_train_micro_batch_size(wrong)
    with pytest.raises(UnsupportedError, match="compile"):
        engine.compile()
    with pytest.raises(AttributeError, match="nowhere"):
        engine.nowhere  # noqa: B018
    assert engine.layers is engine.module.layers


def test_calls_out_of_place_say_what_to_call() -> None:
    run_ranks(calls_out_of_place, 2, timeout=60)


def wrong_arguments() -> None:
    module = Net()
    adam = torch.optim.AdamW(module.parameters())
    other = torch.optim.AdamW(module.parameters())
    schedule = deepspeed.WarmupLR(other)
    sixteen = Net().bfloat16()
    stages = {"pipeline": {"stages": 2}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    file = argparse.Namespace(deepspeed_config="file.json")
    rows: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "torch.nn.Module", {"model": None}),
        (ConfigError, "no configuration", {"model": module}),
        (ConfigError, "of which one can count", {"model": module, "config": config(0), "args": file}),
        (ConfigError, "one can count", {"model": module, "config": config(0), "config_params": config(0)}),
        (UnsupportedError, "mpu", {"model": module, "config": config(0), "mpu": object()}),
        (ConfigError, "optimizer=int", {"model": module, "config": config(0), "optimizer": 3}),
        (ConfigError, "lr_scheduler=int", {"model": module, "config": config(0), "lr_scheduler": 3}),
        (ConfigError, "not that optimizer", {"model": module, "config": config(0), "lr_scheduler": schedule}),
        (
            ConfigError,
            "another one",
            {"model": module, "config": config(0), "lr_scheduler": schedule, "optimizer": adam},
        ),
        (ConfigError, "model_parameters is empty", {"model": module, "config": config(0), "model_parameters": []}),
        (ConfigError, "returned int", {"model": module, "config": config(0), "optimizer": lambda parameters: 3}),
        (
            ConfigError,
            "2 of the latter",
            {
                "model": module,
                "config": config(0),
                "optimizer": adam,
                "model_parameters": [*Net().layers[0].parameters()],
            },
        ),
        (ConfigError, "asks for float32", {"model": sixteen, "config": config(0)}),
        (ConfigError, "neither 'train_batch_size'", {"model": module, "config": {}}),
        (ConfigError, "13", {"model": module, "config": {**config(0), "train_batch_size": 13}}),
        (ConfigError, "did you mean", {"model": module, "config": {**config(0), "gradient_cliping": 1.0}}),
        (UnsupportedError, "pipeline.stages", {"model": module, "config": stages}),
        (TypeError, "unexpected", {"model": module, "config": config(0), "zero": 3}),
    ]
    for kind, words, arguments in rows:
        with pytest.raises(kind, match=words):
            made(arguments.pop("model"), **arguments)
    dist.destroy_process_group()
    with pytest.raises(ConfigError, match="and they are not"):
        made(module, config=config(0), dist_init_required=False)


def test_what_cannot_be_is_refused_with_what_to_do() -> None:
    run_ranks(wrong_arguments, 2, timeout=60)


def what_is_said() -> str:
    with said() as output:
        engine, *_ = meshbolt.initialize(
            model=Net(), config={**config(2, window=2), "steps_per_print": 2, "wandb": {"enabled": True}}
        )
    handler, records = logging.Handler(), []
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("meshbolt.deepspeed.engine")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    train(engine, range(8))
    assert [record.getMessage()[:18] for record in records] == (
        ["step=2, skipped=0,", "step=4, skipped=0,"] if dist.get_rank() == 0 else []
    )
    return output.getvalue()


def test_the_receipt_is_printed_on_rank_0_in_the_words_of_the_loop() -> None:
    first, second = run_ranks(what_is_said, 2, timeout=60)
    assert second == ""
    assert "train_batch_size = 12: honoured -> engine: 12" in first
    assert "gradient_clipping = 0.3: honoured -> engine.step() clips to a norm of 0.3" in first
    assert 'optimizer.type = "AdamW": mapped -> torch.optim.AdamW' in first
    assert "wandb.enabled = true: ignored (log from your loop" in first
    assert "Trainer" not in first


def the_versions_default() -> None:
    block = config(1)
    del block["gradient_clipping"]
    assert made(Net(), config=block).gradient_clipping() == 0.0
    assert made(Net(), config=block, deepspeed_version="0.19.8").gradient_clipping() == 1.0
    assert made(Net(), config=block, deepspeed_version="0.18.3").gradient_clipping() == 0.0


def test_without_the_key_gradients_are_clipped_only_for_a_version_that_does() -> None:
    run_ranks(the_versions_default, 1, timeout=60)


def whole_model_in_16_bits() -> None:
    for stage in (0, 3):
        module = Net()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16().float())
        engine = made(module, config=config(stage, bf16={"enabled": True}))
        half = made(Net().bfloat16(), config=config(stage, bf16={"enabled": True}))
        assert train(engine, range(3), dtype=torch.bfloat16) == train(half, range(3), dtype=torch.bfloat16)
        torch.testing.assert_close(whole(half), whole(engine), rtol=0, atol=0)
        assert {value.dtype for value in whole(half).values()} == {torch.float32}


def test_a_model_given_in_16_bits_gets_float32_master_weights() -> None:
    run_ranks(whole_model_in_16_bits, 2, timeout=60)
