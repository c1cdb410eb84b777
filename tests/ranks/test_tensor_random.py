"""The random state after a resume: if these fail, ranks that share layers draw different numbers, or a run does not go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import seed_everything
from tests.ranks.tensor_support import Net, loader, strategy, trainer
from tests.rows import full

from meshbolt.testing import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint"),
]


class Watching(Net):
    """Notes the random numbers of every step; each data-parallel rank begins with its own."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)

    def on_train_start(self) -> None:
        if self.trainer.global_step == 0:
            torch.manual_seed(10 + self.trainer.strategy.data_parallel_rank)

    def training_step(self, batch: Any, index: int) -> Any:
        self.seen.append(torch.rand(1).item())
        return super().training_step(batch, index)


def begin(path: Path, size: int) -> list[float]:
    seed_everything(1, verbose=False)
    module = Watching()
    owner = trainer(strategy(size=size), max_steps=2, max_epochs=-1)
    owner.fit(module, loader(8, batch_size=1))
    owner.save_checkpoint(path)
    torch.rand(1)
    return [torch.rand(1).item()]


def go_on(path: Path, size: int) -> list[float]:
    seed_everything(2, verbose=False)
    module = Watching()
    trainer(strategy(size=size), max_steps=4, max_epochs=-1).fit(module, loader(8, batch_size=1), ckpt_path=path)
    return module.seen


def whole_run(size: int) -> list[float]:
    seed_everything(1, verbose=False)
    module = Watching()
    trainer(strategy(size=size), max_steps=4, max_epochs=-1).fit(module, loader(8, batch_size=1))
    return module.seen[2:]


SAME = [(4, 2, 4, 2), (2, 1, 4, 2), (4, 2, 2, 1), full(4, 4, 2, 2)]


@pytest.mark.parametrize(("ranks", "size", "later_ranks", "later_size"), SAME)
def test_as_many_data_parallel_ranks_go_on_with_their_own_numbers(
    ranks: int, size: int, later_ranks: int, later_size: int, tmp_path: Path
) -> None:
    run_ranks(begin, ranks, tmp_path / "run.ckpt", size)
    by_rank = run_ranks(go_on, later_ranks, tmp_path / "run.ckpt", later_size)
    expected = run_ranks(whole_run, ranks, size)
    for rank, found in enumerate(by_rank):
        assert found == expected[rank // later_size * size]
    assert len(by_rank[0]) == 2


@pytest.mark.parametrize(("ranks", "size", "later_ranks", "later_size"), [(4, 1, 4, 2), (2, 2, 4, 2), (4, 1, 4, 4)])
def test_on_other_layouts_ranks_that_share_layers_draw_alike_and_others_apart(
    ranks: int, size: int, later_ranks: int, later_size: int, tmp_path: Path
) -> None:
    run_ranks(begin, ranks, tmp_path / "run.ckpt", size)
    by_rank = run_ranks(go_on, later_ranks, tmp_path / "run.ckpt", later_size)
    places = {tuple(found): rank // later_size for rank, found in enumerate(by_rank)}
    assert [places[tuple(found)] for found in by_rank] == [rank // later_size for rank in range(later_ranks)]
    assert len(places) == later_ranks // later_size
