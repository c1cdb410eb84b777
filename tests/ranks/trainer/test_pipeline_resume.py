"""A checkpoint of a pipeline goes on under any other plan, and one of any other plan under a pipeline."""

from __future__ import annotations

import tempfile
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.ranks.trainer.test_pipeline_fit import Classifier, data
from tests.rows import full
from torch.distributed.tensor import DTensor

import meshbolt
from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.compat import whole_of
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.testing import run_ranks

PIPELINE: dict[str, Any] = {"pipeline_parallel": 2, "zero": 1}
OTHERS: dict[str, tuple[dict[str, Any], int]] = {
    "the_same": (PIPELINE, 2),
    "another_cut": ({"pipeline_parallel": PipelineParallel(2, cuts=["layers.1"]), "zero": 3}, 2),
    "interleaved": ({"pipeline_parallel": PipelineParallel(2, schedule="interleaved_1f1b"), "zero": 2}, 2),
    "four_stages": ({"pipeline_parallel": 4, "zero": 1}, 4),
    "no_pipeline": ({"zero": 1}, 1),
    "divided_layers": ({"zero": 0, "tensor_parallel": 2}, 2),
}


def fit(settings: dict[str, Any], ranks: int, epochs: int, save: str | None, resume: str | None) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    pl.seed_everything(1, verbose=False)
    module = Classifier()
    trainer = pl.Trainer(
        strategy=MeshStrategy(**settings),
        accelerator="cpu",
        devices=ranks,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        max_epochs=epochs,
    )
    trainer.fit(module, data(1, 0), data(1, 0), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    torch.set_default_dtype(torch.float32)
    held = {name: p for name, p in module.named_parameters() if not held_elsewhere(p)}
    return {name: (whole_of(p) if isinstance(p, DTensor) else p).detach().clone() for name, p in held.items()}


def weights(settings: dict[str, Any], ranks: int, *rest: Any) -> dict[str, Any]:
    return {name: p for rank in run_ranks(fit, ranks, settings, ranks, *rest, timeout=60) for name, p in rank.items()}


# Said in one process too, where ranks that could be are connected.
@pytest.mark.filterwarnings("ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.parametrize("name", ["another_cut", *(full(name) for name in OTHERS if name != "another_cut")])
def test_a_pipeline_resumes_under_another_plan_and_another_plan_under_a_pipeline(name: str) -> None:
    settings, ranks = OTHERS[name]
    with tempfile.TemporaryDirectory() as folder:
        expected = weights(PIPELINE, 2, 3, None, None)
        weights(PIPELINE, 2, 1, f"{folder}/of_pipeline.ckpt", None)
        there = weights(settings, ranks, 2, f"{folder}/of_other.ckpt", f"{folder}/of_pipeline.ckpt")
        back = weights(PIPELINE, 2, 3, None, f"{folder}/of_other.ckpt")
        assert there.keys() == expected.keys() == back.keys()
        for key, value in expected.items():
            torch.testing.assert_close(back[key], value, rtol=0.0, atol=1e-12, msg=key)
        torch.set_default_dtype(torch.float64)
        whole = meshbolt.load_from_checkpoint(Classifier, f"{folder}/of_other.ckpt")
        torch.set_default_dtype(torch.float32)
        for key, value in there.items():
            torch.testing.assert_close(whole.get_parameter(key).detach(), value, rtol=0.0, atol=1e-15, msg=key)
