"""Every schedule on ranks computes what the whole module does: losses, gradients, and what is tied over stages."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.parity.pipeline_models import CUTS, Cut
from tests.parity.test_pipeline_models import in_float64, made
from tests.rows import full
from torch import nn
from torch.utils.checkpoint import checkpoint

from meshbolt.errors import ConfigError
from meshbolt.pipeline import SCHEDULES, Pipeline, emulate, split_batch
from meshbolt.pipeline.schedule import find_schedule
from meshbolt.testing import run_ranks

# Four stages each.
MODELS: dict[str, tuple[str, ...]] = {
    "nanogpt": ("network.transformer.h.0", "network.transformer.h.1", "network.transformer.h.3"),
    "unet": CUTS["unet"].cuts,  # type: ignore[dict-item]
    "t5": CUTS["t5"].cuts,  # type: ignore[dict-item]
    "resnet": ("network.layer1.0", "network.layer1.1", "network.layer2.1"),
}


def cuts_for(name: str, stages: int) -> tuple[str, ...]:
    """Return where a model is cut into 2 or 4 stages, or the simplest one into 8."""
    if stages == 8:
        return tuple(f"network.{layer}" for layer in range(1, 8))
    return MODELS[name] if stages == 4 else MODELS[name][1:2]


def steps(cut: Cut, module: nn.Module, count: int) -> tuple[Any, list[Any]]:
    """Return the step, and the microbatches: of a batch of six."""
    draws = max(3, count // 2)
    batches = [in_float64(cut.model.batch(torch.Generator().manual_seed(seed))) for seed in range(draws)]
    batch = {key: torch.cat([each[key] for each in batches]) for key in batches[0]}
    return lambda part: cut.model.loss(module["network"], part), split_batch(batch, count)  # type: ignore[index]


def train(name: str, schedule: str, stages: int, count: int) -> tuple[list[float], dict[str, Any], list[str]]:
    """Return losses, gradients, and buffers' names, on a rank."""
    torch.set_default_dtype(torch.float64)
    cut, cuts = CUTS[name], cuts_for(name, stages)
    module = made(cut, training=True)
    function, parts = steps(cut, module, count)
    group = dist.group.WORLD
    pipeline = Pipeline(module, cuts, schedule=schedule, microbatches=count, group=group, device=torch.device("cpu"))
    losses = list[float]()
    for step in range(2):  # the second adds to the first one's gradients
        results = pipeline.step(function, parts, weights=[1 / count] * count, loss_of=lambda loss: loss, seed=step)
        losses += [float(loss.detach()) for loss in results]
    plan = pipeline.plan(function, parts[0])
    pipeline.close()
    own = {name for stage in pipeline._stages for name in plan.owned(stage.stage_index)}
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert gradients.keys() <= own, "a gradient of another rank's stage"
    torch.set_default_dtype(torch.float32)
    return losses, gradients, sorted(own)


def expected(name: str, stages: int, count: int) -> tuple[list[float], dict[str, Any]]:
    torch.set_default_dtype(torch.float64)
    cut = CUTS[name]
    cuts = cuts_for(name, stages)
    module = made(cut, training=True)
    function, parts = steps(cut, module, count)
    losses = list[float]()
    for step in range(2):
        runs = [lambda part=part: function(part) for part in parts]
        results, _ = emulate(module, runs, cuts, loss_of=lambda loss: loss / count, seed=step)
        losses += [float(loss.detach()) for loss in results]
    torch.set_default_dtype(torch.float32)
    return losses, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


ROWS = [
    ((model, schedule, ranks) if (model, ranks) == ("nanogpt", 2) else full(model, schedule, ranks))
    for model in MODELS
    for schedule in SCHEDULES
    for ranks in (2, 4)
    if ranks == 2 or SCHEDULES[schedule].single
]


@pytest.mark.parametrize(("model", "schedule", "ranks"), ROWS)
def test_a_schedule_computes_what_one_process_does(model: str, schedule: str, ranks: int) -> None:
    stages, count = (2 if SCHEDULES[schedule].single and ranks == 2 else 4), 6 if model == "resnet" else 4
    found = run_ranks(train, ranks, model, schedule, stages, count, timeout=120)
    losses, gradients = expected(model, stages, count)
    assert [loss for rank in found for loss in rank[0]] == pytest.approx(losses, abs=CUTS[model].tolerance)
    merged: dict[str, Any] = {}
    for _, own, _ in found:
        for name, value in own.items():
            torch.testing.assert_close(value, gradients[name], rtol=0.0, atol=max(1e-12, CUTS[model].tolerance))
            merged[name] = value
    assert merged.keys() == gradients.keys()


@pytest.mark.parametrize("schedule", [full(name) for name in SCHEDULES if not SCHEDULES[name].single])
def test_eight_stages_on_four_ranks_compute_what_one_process_does(schedule: str) -> None:
    found = run_ranks(train, 4, "sequential", schedule, 8, 8, timeout=120)
    losses, gradients = expected("sequential", 8, 8)
    assert [loss for rank in found for loss in rank[0]] == pytest.approx(losses, abs=1e-12)
    merged = {name: value for _, own, _ in found for name, value in own.items()}
    assert merged.keys() == gradients.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, gradients[name], rtol=0.0, atol=1e-12)


def passes(splits: bool, recomputes: bool = False) -> tuple[dict[str, int], list[str]]:
    """Return how often each work was done in a step after the first, by work and stage, and what was warned of."""
    torch.set_default_dtype(torch.float64)
    cut, counted, said = CUTS["nanogpt"], Counter[str](), list[str]()
    module: Any = made(cut, training=True)
    for block in module.network.transformer["h"] if recomputes else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    function, parts = steps(cut, module, 4)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("meshbolt.pipeline.runtime").addHandler(handler)
    group, device = dist.group.WORLD, torch.device("cpu")
    pipeline = Pipeline(
        module, MODELS["nanogpt"], schedule="zbv", microbatches=4, group=group, device=device, splits_backward=splits
    )
    for step in range(2):
        counted.clear()
        pipeline.observe_passes(lambda work, stage, _: contextlib.nullcontext(counted.update([f"{work}{stage}"])))
        pipeline.step(function, parts, weights=[0.25] * 4, loss_of=lambda loss: loss, seed=step)
    pipeline.close()
    torch.set_default_dtype(torch.float32)
    return dict(counted), said


def test_the_backward_pass_is_made_in_halves() -> None:
    for own, (counted, said) in zip(((0, 3), (1, 2)), run_ranks(passes, 2, True), strict=True):
        assert not said
        # Nobody waits for gradients of what the first stage was given.
        works = {f"{work}{stage}" for stage in own for work in ("FW" if stage == 0 else "FIW")}
        assert counted == dict.fromkeys(works, 4)


def test_a_stage_that_recomputes_is_not_halved() -> None:
    found = run_ranks(passes, 2, True, True)
    assert sorted(text for _, said in found for text in said) == [
        f"pipeline: stage {stage} makes gradients of parameters together with those of inputs, not apart as its schedule "
        "allows: LayerNorm is computed again in the backward pass, and would be in each half."
        for stage in (1, 2, 3)
    ]
    merged = found[0][0] | found[1][0]
    assert all(merged[f"B{stage}"] == 4 for stage in (1, 2, 3))


def test_halves_can_be_switched_off() -> None:
    for own, (counted, said) in zip(((0, 3), (1, 2)), run_ranks(passes, 2, False), strict=True):
        assert not said
        assert counted == {f"{work}{stage}": 4 for stage in own for work in "FB"}


def evaluate(name: str, schedule: str, count: int) -> list[float]:
    torch.set_default_dtype(torch.float64)
    module = made(CUTS[name], training=False)
    group, device = dist.group.WORLD, torch.device("cpu")
    pipeline = Pipeline(module, MODELS[name], schedule=schedule, microbatches=4, group=group, device=device)
    function, parts = steps(CUTS[name], module, count)
    results = pipeline.evaluate(function, parts, seed=0)
    pipeline.close()
    torch.set_default_dtype(torch.float32)
    assert not any(loss.requires_grad for loss in results)
    return [float(loss) for loss in results]


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])  # stages in turns, and folded
@pytest.mark.parametrize("model", ["t5", full("unet"), full("resnet")])
def test_any_number_of_microbatches_is_evaluated_as_in_one_process(model: str, schedule: str) -> None:
    found = [loss for rank in run_ranks(evaluate, 2, model, schedule, 5) for loss in rank]
    torch.set_default_dtype(torch.float64)
    function, parts = steps(CUTS[model], made(CUTS[model], training=False), 5)
    torch.set_default_dtype(torch.float32)
    assert found == pytest.approx([float(function(part).detach()) for part in parts], abs=CUTS[model].tolerance)


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages", "microbatches", "message"),
    [
        ("1f1", 2, 2, 4, r"schedule='1f1': there is no such schedule \(did you mean '1f1b'\?"),
        ("1f1b", 2, 3, 4, "3 stages on 2 ranks: each rank needs as many"),
        ("1f1b", 2, 4, 4, "it has one stage a rank. Use 2 stages"),
        ("1f1b", 2, 2, 1, "needs as many microbatches as stages, and has 1"),
        ("zbv", 2, 2, 4, "it has two stages a rank. Use 4 stages"),
        ("looped_bfs", 2, 2, 4, "it has two stages a rank or more"),
        ("dualpipev", 2, 4, 3, "needs as many microbatches as stages, and has 3"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(
    schedule: str, ranks: int, stages: int, microbatches: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_schedule(schedule, stages=stages, ranks=ranks, microbatches=microbatches)
