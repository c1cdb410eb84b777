"""Whole weights of the engine of `initialize`, and the shards that no script is to take for them."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks.initialize_support import Net, config, made, train, whole
from tests.rows import full

from meshbolt import UnsupportedError, deepspeed
from meshbolt.testing import run_ranks


def weights(stages: tuple[int, ...], block: dict[str, Any]) -> None:
    for stage in stages:
        engine = made(Net(), config=config(stage, **block))
        dtype = torch.bfloat16 if block else torch.float32
        train(engine, range(2), dtype=dtype)
        now, state = whole(engine), engine.module_state_dict()
        assert list(state) == [*Net().state_dict()]
        assert {type(value) for value in state.values()} == {torch.Tensor}
        torch.testing.assert_close(
            {name: state[name] for name in now}, {name: value.to(dtype) for name, value in now.items()}, rtol=0, atol=0
        )
        file = io.BytesIO()
        if dist.get_rank() == 0 and stage > 0:  # on one rank, so that nothing may wait for another
            for module in (engine, engine.module, engine.module.layers):
                with pytest.raises(UnsupportedError, match=r"engine\.module_state_dict\(\) on every rank"):
                    torch.save(module.state_dict(), file)
        if stage == 0:
            assert {type(value) for value in engine.module.layers.state_dict().values()} == {torch.Tensor}
            torch.testing.assert_close(engine.module.state_dict()["scale"], now["scale"], rtol=0, atol=0)
        train(engine, range(2, 3), dtype=dtype)


@pytest.mark.parametrize(("stages", "block"), [((0, 2), {}), full((1, 3), {}), ((3,), {"bf16": {"enabled": True}})])
def test_whole_weights_are_returned_and_shards_refused(stages: tuple[int, ...], block: dict[str, Any]) -> None:
    run_ranks(weights, 2, stages, block, timeout=60)


def loaded(folder: str) -> None:
    first = made(Net(), config=config(1))
    train(first, range(2))
    state = first.module_state_dict()
    for stage in (0, 3):
        engine = made(Net(), config=config(stage))
        engine.load_module_state_dict(state)
        torch.testing.assert_close(whole(engine), whole(first), rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="scale"):
            engine.load_module_state_dict({"module": {name: state[name] for name in state if name != "scale"}})
        engine.load_module_state_dict({"module": {"scale": torch.tensor([4.0])}}, strict=False)
        assert whole(engine)["scale"].item() == 4.0
        engine.fabric.save(f"{folder}/{stage}", {"module": engine.module})
        engine.load_module_state_dict(state)
        engine.fabric.load(f"{folder}/{stage}", {"module": engine.module})
        assert whole(engine)["scale"].item() == 4.0
        with deepspeed.zero.GatheredParameters(engine.module, modifier_rank=0):
            engine.module.load_state_dict(state)
        torch.testing.assert_close(whole(engine), whole(first), rtol=0, atol=0)


def test_whole_weights_are_loaded_into_shards_and_fabric_still_saves_shards(tmp_path: Any) -> None:
    run_ranks(loaded, 2, str(tmp_path), timeout=60)
