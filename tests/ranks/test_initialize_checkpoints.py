"""Checkpoints of the engine of `initialize`: what goes on from them, on which ranks, and what they refuse."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.ranks.initialize_support import Net, Reference, assert_equal, config, made, train, whole
from tests.rows import full

from meshbolt import CheckpointError, ConfigError, UnsupportedError
from meshbolt.checkpoint import verify_checkpoint
from meshbolt.testing import run_ranks

WINDOW = 2


def saved_by(stage: int, folder: str, ranks: int, block: dict[str, Any]) -> list[float]:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(next(iter(block), ""), torch.float32)
    engine = made(Net(), config=config(stage, window=WINDOW, ranks=ranks, **block))
    train(engine, range(4), dtype=dtype)
    assert engine.save_checkpoint(folder, client_state={"epoch": 3, "args": argparse.Namespace(lr=0.1)})
    assert Path(folder, "latest").read_text() == "global_step2"
    return train(engine, range(4, 8), dtype=dtype)


def loaded_by(stage: int, folder: str, ranks: int, block: dict[str, Any]) -> list[float]:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(next(iter(block), ""), torch.float32)
    engine = made(Net(), config=config(stage, window=WINDOW, ranks=ranks, **block))
    train(engine, range(90, 93), dtype=dtype)  # into another state, in the middle of a window
    path, client_state = engine.load_checkpoint(folder)
    assert path == str(Path(folder, "global_step2"))
    assert client_state == {"epoch": 3, "args": argparse.Namespace(lr=0.1)}
    assert (engine.global_steps, engine.micro_steps % WINDOW, engine.skipped_steps) == (2, 0, 0)
    return train(engine, range(4, 8), dtype=dtype)


BLOCKS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}},
}


@pytest.mark.parametrize(
    ("name", "stage", "then"),
    [
        ("fp32", 0, 3),
        full("fp32", 3, 1),
        ("fp16", 2, 2),
        full("fp32", 1, 2),
        full("fp32", 2, 0),
        full("bf16", 3, 0),
        full("bf16", 1, 3),
        full("fp16", 3, 1),
    ],
)
def test_training_goes_on_from_a_checkpoint_in_any_stage_as_if_nothing_had_been(
    name: str, stage: int, then: int, tmp_path: Path
) -> None:
    losses = run_ranks(saved_by, 2, stage, str(tmp_path), 2, BLOCKS[name], timeout=60)
    again = run_ranks(loaded_by, 2, then, str(tmp_path), 2, BLOCKS[name], timeout=60)
    torch.testing.assert_close(torch.tensor(again), torch.tensor(losses), rtol=1e-5, atol=1e-6)


def loaded_by_another_number(folder: str, ranks: int) -> None:
    engine = made(Net(), config=config(3, window=WINDOW, ranks=ranks))
    engine.load_checkpoint(folder, tag="global_step2")
    reference = Reference(window=WINDOW)
    reference.train(range(4))
    assert_equal(engine, reference.module)
    assert engine.get_lr() == [group["lr"] for group in reference.optimizer.param_groups]
    reference.ranks = ranks
    train(engine, range(4, 8)), reference.train(range(4, 8))
    assert_equal(engine, reference.module)


@pytest.mark.parametrize("ranks", [1, full(3)])
def test_another_number_of_ranks_goes_on_from_a_checkpoint(ranks: int, tmp_path: Path) -> None:
    run_ranks(saved_by, 2, 2, str(tmp_path), 2, {}, timeout=60)
    run_ranks(loaded_by_another_number, ranks, str(tmp_path), ranks, timeout=60)


def nothing_there(folder: str) -> None:
    engine = made(Net(), config=config(2))
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("meshbolt.deepspeed.checkpoints").addHandler(handler)
    for place in (folder, folder + "/not/there"):
        assert engine.load_checkpoint(place) == (None, None)
    assert [record.levelname for record in records] == ["WARNING"] * 2 * (dist.get_rank() == 0)
    with pytest.raises(CheckpointError):
        engine.load_checkpoint(folder, tag="global_step7")
    for tag in ("a/b", "latest", "..", ""):
        with pytest.raises(ConfigError, match="is no name"):
            engine.save_checkpoint(folder, tag=tag)
    with pytest.raises(ConfigError, match="empty save_dir"):
        engine.save_checkpoint("")
    for call in (engine.save_checkpoint, engine.load_checkpoint):
        with pytest.raises(UnsupportedError, match="is a URL"):
            call("s3://bucket/run")
    with pytest.raises(ConfigError, match="dictionary"):
        engine.save_checkpoint(folder, client_state=3)
    with pytest.raises(UnsupportedError, match="custom_load_fn"):
        engine.load_checkpoint(folder, custom_load_fn=print)
    assert not list(Path(folder).iterdir())


def test_a_directory_without_a_checkpoint_is_warned_of_and_nothing_is_loaded(tmp_path: Path) -> None:
    run_ranks(nothing_there, 2, str(tmp_path), timeout=60)


def parts_of_it(folder: str) -> None:
    first = made(Net(), config=config(1))
    train(first, range(3))
    first.save_checkpoint(folder, tag="one")
    first.save_checkpoint(folder, tag="two", save_latest=False)
    first.save_checkpoint(folder, tag="one")  # again, over itself
    assert Path(folder, "latest").read_text() == "one"
    weights = whole(first)

    engine = made(Net(), config=config(3))
    before = torch.get_rng_state()
    _, client_state = engine.load_checkpoint(folder, load_module_only=True)
    assert (client_state, engine.global_steps, engine.get_lr()) == ({}, 0, made(Net(), config=config(3)).get_lr())
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(whole(engine), weights, rtol=0, atol=0)
    assert not engine.optimizer.state

    engine.load_checkpoint(folder, load_optimizer_states=False)
    assert (engine.global_steps, engine.get_lr(), bool(engine.optimizer.state)) == (3, first.get_lr(), False)
    rates = made(Net(), config=config(3))
    expected = rates.get_lr()
    rates.load_checkpoint(folder, load_lr_scheduler_states=False)
    assert rates.lr_scheduler.last_epoch == made(Net(), config=config(3)).lr_scheduler.last_epoch
    assert expected == made(Net(), config=config(3)).get_lr()

    plain = config(2)
    del plain["scheduler"]
    without = made(Net(), config=plain)
    without.load_checkpoint(folder)
    without.save_checkpoint(folder, tag="three")
    with pytest.raises(CheckpointError, match="load_lr_scheduler_states=False"):
        engine.load_checkpoint(folder, tag="three")
    bigger = Net()
    bigger.extra = torch.nn.Linear(2, 2)
    engine = made(bigger, config=config(2))
    with pytest.raises(CheckpointError, match=r"extra\.weight"):
        engine.load_checkpoint(folder, tag="one")
    engine.load_checkpoint(folder, tag="one", load_module_strict=False, load_optimizer_states=False)
    assert torch.equal(whole(engine)["scale"], weights["scale"])


@pytest.mark.filterwarnings("ignore")
def test_parts_of_a_checkpoint_can_be_loaded_and_what_it_lacks_is_named(tmp_path: Path) -> None:
    run_ranks(parts_of_it, 2, str(tmp_path), timeout=60)


def in_the_background(folder: str) -> None:
    block = config(2, checkpoint={"writer": {"type": "FAST", "decoupled": True}})
    engine = made(Net(), config=block)
    folder += "/not/there/yet"
    train(engine, range(2))
    engine.save_checkpoint(folder, tag="first")
    weights = whole(engine)
    train(engine, range(2, 4))
    engine.save_checkpoint(folder, tag="second")
    engine.destroy()
    if dist.get_rank() == 0:
        assert Path(folder, "latest").read_text() == "second"
        assert verify_checkpoint(Path(folder, "first")) is not None
    dist.barrier()
    other = made(Net(), config=config(0))
    other.load_checkpoint(folder, tag="first")
    torch.testing.assert_close(whole(other), weights, rtol=0, atol=0)


def test_latest_names_a_checkpoint_that_is_written_in_the_background_once_it_is_whole(tmp_path: Path) -> None:
    run_ranks(in_the_background, 2, str(tmp_path), timeout=60)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers[0].requires_grad_(False)


def single_files(folder: str) -> None:
    for stage in (0, 3):
        engine = made(Frozen(), config=config(stage, bf16={"enabled": True}))
        train(engine, range(1), dtype=torch.bfloat16)
        assert engine.save_16bit_model(folder + "/deep/er", "model.bin")
        engine.save_16bit_model(folder, "model.safetensors", exclude_frozen_parameters=True)
        expected = {name: value.bfloat16() for name, value in whole(engine).items()}
        expected["shift"] = torch.tensor([0.25])
        torch.testing.assert_close(torch.load(folder + "/deep/er/model.bin"), expected, rtol=0, atol=0)
        kept = {name: value for name, value in expected.items() if not name.startswith("layers.0.")}
        torch.testing.assert_close(load_file(folder + "/model.safetensors"), kept, rtol=0, atol=0)
        engine.save_checkpoint(folder, tag="t", exclude_frozen_parameters=True)
        other = made(Frozen(), config=config(1, bf16={"enabled": True}))
        with pytest.raises(CheckpointError, match=r"layers\.0"):
            other.load_checkpoint(folder, tag="t")
        other.load_checkpoint(folder, tag="t", load_module_strict=False)
        torch.testing.assert_close(whole(other), whole(engine), rtol=0, atol=0)
        dist.barrier()


@pytest.mark.filterwarnings("ignore")
def test_whole_weights_are_saved_in_one_file_and_frozen_ones_can_be_left_out(tmp_path: Path) -> None:
    run_ranks(single_files, 2, str(tmp_path), timeout=60)
