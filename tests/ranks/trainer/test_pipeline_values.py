"""What hooks may do with parameters that another stage holds, and what they are told where they ask for values."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from tests.ranks.trainer.test_pipeline_fit import data
from tests.ranks.trainer.test_pipeline_steps import Plain
from tests.rows import full
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshbolt import MeshStrategy
from meshbolt.compat import whole_of
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.pipeline import is_foreign
from meshbolt.testing import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"
)

Read = Callable[["Reads", torch.nn.Parameter], Any]
READS: dict[str, Read] = {
    "item": lambda _, p: p.detach().square().mean().item(),
    "branch": lambda _, p: p.max() > 100 and None,
    "equal": lambda _, p: torch.equal(p, p.detach().clone()),
    "numpy": lambda _, p: p.detach().cpu().numpy(),
    "asarray": lambda _, p: np.asarray(p.detach()),
    "tolist": lambda _, p: p.tolist(),
    "write": lambda _, p: torch.zeros(p.shape).copy_(p.detach()),
    "save": lambda _, p: torch.save(p, io.BytesIO()),
}


class Reads(Plain):
    """Tries to read values in a hook of every kind."""

    def __init__(self, zero: int) -> None:
        super().__init__()
        self.zero, self.found = zero, dict[str, str]()

    def configure_optimizers(self) -> Any:
        self.attempt("configure_optimizers", READS["item"])
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        for name, read in READS.items():
            self.attempt(name, read)
        self.attempt("state", lambda module, _: torch.save(module.state_dict(), io.BytesIO()))
        foreign = next(filter(is_foreign, self.parameters()))
        self.found["print"] = f"{foreign} {foreign!r}"
        self.found["shapes"] = str(copy.deepcopy(foreign).shape == foreign.shape)
        self.found["kind"] = str(isinstance(foreign, torch.nn.Parameter))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.attempt("before the step", READS["item"])
        self.found["gradients"] = str({p.grad is None for p in self.parameters() if is_foreign(p)})

    def attempt(self, name: str, read: Read) -> None:
        try:
            read(self, next(filter(is_foreign, self.parameters())))
        except Exception as error:  # every kind is looked at by the test
            self.found[name] = f"{type(error).__name__}: {error}"


def trainer(zero: int, ranks: int, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        strategy=MeshStrategy(zero=zero, pipeline_parallel=2) if ranks > 1 else "auto",
        accelerator="cpu",
        devices=ranks,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def read_in_hooks(zero: int) -> dict[str, str]:
    module = Reads(zero)
    trainer(zero, 2, max_steps=1).fit(module, data(1, 0))
    return module.found


@pytest.mark.parametrize("zero", [1, full(3)])
def test_a_value_of_another_stage_is_refused_by_the_parameters_name(zero: int) -> None:
    held = [("head.weight", 1), ("embed.weight", 0)]
    for found, (name, rank) in zip(run_ranks(read_in_hooks, 2, zero), held, strict=True):
        whose = rf"'{name}' is held by stage {rank}, on rank {rank}"
        for read in (*READS, "state", "configure_optimizers", "before the step"):
            assert re.match(rf"HeldElsewhereError: {whose}, and this rank has no values of it", found[read]), found[
                read
            ]
        assert "trainer.save_checkpoint" in found["state"]
        assert "strategy.gathered(" in found["item"]
        assert re.fullmatch(rf"(<Parameter {whose}: \[\d, 8\] float64, no values on this rank> ?){{2}}", found["print"])
        assert (found["shapes"], found["kind"], found["gradients"]) == ("True", "True", "{True}")


class Thaws(BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.embed)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.embed, optimizer, initial_denom_lr=2.0)


class Finetuned(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


def finetune(zero: int, ranks: int) -> tuple[dict[str, Tensor], list[int]]:
    torch.set_default_dtype(torch.float64)
    pl.seed_everything(1, verbose=False)
    module = Finetuned()
    run = trainer(zero, ranks, max_epochs=2, callbacks=[Thaws()])
    try:
        run.fit(module, data(1, 0))
    finally:
        torch.set_default_dtype(torch.float32)
    held = {name: p for name, p in module.named_parameters() if not held_elsewhere(p)}
    weights = {name: (whole_of(p) if isinstance(p, DTensor) else p).detach().clone() for name, p in held.items()}
    return weights, [len(group["params"]) for group in run.optimizers[0].param_groups]


@pytest.mark.parametrize("zero", [1, full(0), full(3)])
def test_a_finetuning_callback_thaws_layers_as_in_one_process(zero: int) -> None:
    ((expected, groups),) = run_ranks(finetune, 1, zero, 1)
    results = run_ranks(finetune, 2, zero, 2)
    merged = {name: value for weights, _ in results for name, value in weights.items()}
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=0.0, atol=1e-12, msg=name)
    assert groups[1:] == [2]
    assert [found for _, found in results] == [groups, groups]
