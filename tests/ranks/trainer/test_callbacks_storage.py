"""ModelCheckpoint on a storage of fsspec's: what appears, is deleted, and is loaded again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.ranks.trainer.loops_support import ADVICE, Regressor, batches, difference, trainer, weights
from tests.shelf import Shelf

from meshbolt import Checkpoint, MeshStrategy
from meshbolt.checkpoint import verify_checkpoint
from meshbolt.testing import run_ranks

pytestmark = ADVICE


def fit(url: str, epochs: int, resume: bool, asynchronous: bool) -> dict[str, torch.Tensor]:
    kept = ModelCheckpoint(url, "{epoch}", monitor="val", save_top_k=1, save_last=True)
    strategy = MeshStrategy(checkpoint=Checkpoint(asynchronous=asynchronous))
    owner, module = trainer(strategy, max_epochs=epochs, callbacks=[kept]), Regressor()
    owner.fit(module, batches(), batches(), ckpt_path=f"{url}/last.ckpt" if resume else None)
    return weights(module)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_that_resumes_from_a_url_goes_on_exactly_and_keeps_what_it_should(
    tmp_path: Path, asynchronous: bool
) -> None:
    through = run_ranks(fit, 2, f"{Shelf.protocol}://{tmp_path}/through", 3, False, False)[0]
    url = f"{Shelf.protocol}://{tmp_path}/run"
    run_ranks(fit, 2, url, 1, False, asynchronous)
    resumed = run_ranks(fit, 2, url, 3, True, asynchronous)[0]
    assert difference(resumed, through) == 0.0
    names = sorted(place.name for place in (tmp_path / "run").iterdir())
    assert names == ["epoch=2.ckpt", "last.ckpt"]
    assert [verify_checkpoint(f"{url}/{name}") for name in names] == [(), ()]
