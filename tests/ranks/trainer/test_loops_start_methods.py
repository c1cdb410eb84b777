"""Ranks that a script or a notebook starts by itself: the trained weights come back to the process that asked for them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.rows import full

SCRIPT = """
    import sys
    import warnings

    import lightning.pytorch as pl
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from meshbolt import MeshStrategy

    warnings.simplefilter("ignore")


    class Plain(pl.LightningModule):
        def __init__(self, folder):
            super().__init__()
            self.folder = folder
            self.body, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 1)

        def forward(self, x):
            for layer in self.body:
                x = layer(x).tanh()
            return self.head(x)

        def training_step(self, batch, _index):
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.log("loss", loss, sync_dist=True)
            return loss

        test_step = training_step

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

        def on_fit_end(self):
            whole = {name: value.full_tensor() for name, value in self.state_dict().items()}
            if self.global_rank == 0:
                torch.save({"weights": whole, "ranks": self.trainer.world_size}, f"{self.folder}/on_rank_zero.pt")


    class OnMeta(Plain):
        def __init__(self, folder):
            super().__init__(folder)
            del self.body, self.head

        def configure_model(self):
            if not hasattr(self, "head"):
                self.body, self.head = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), nn.Linear(6, 1)


    def check(start_method, folder, kind):
        module = {"Plain": Plain, "OnMeta": OnMeta}[kind](folder)
        data = DataLoader(TensorDataset(torch.randn(16, 6), torch.randn(16, 1)), batch_size=2)
        strategy = MeshStrategy(zero=3, start_method=start_method)
        trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_epochs=2, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        trainer.fit(module, data)
        seen = torch.load(f"{folder}/on_rank_zero.pt")
        assert seen["ranks"] == 2
        assert {name: type(value) for name, value in module.named_parameters()}.keys() == seen["weights"].keys()
        for name, value in module.state_dict().items():
            assert type(value) is torch.Tensor and torch.equal(value, seen["weights"][name]), name
        assert "loss" in trainer.callback_metrics
        assert trainer.state.finished
        if start_method == "spawn":  # starting processes again takes long
            return print("all is well")
        (scores,) = trainer.test(module, data, verbose=False)
        expected = torch.stack([nn.functional.mse_loss(module(x), y) for x, y in data]).mean()
        assert abs(scores["loss"] - float(expected)) < 1e-5, (scores, expected)
        try:
            trainer.fit(module, data)
        except NotImplementedError as error:  # Lightning's own, which nothing of ours may hide
            assert "twice on the same Trainer" in str(error), error
        else:
            raise AssertionError("fit was not refused")
        print("all is well")


    if __name__ == "__main__":
        start_method, folder, *kinds = sys.argv[1:]
        for kind in kinds:
            check(start_method, folder, kind)
"""


@pytest.mark.parametrize(("start_method", "kinds"), [full("fork", ["Plain", "OnMeta"]), ("spawn", ["Plain"])])
def test_trained_weights_come_back_to_the_process_that_called_fit(
    tmp_path: Path, start_method: str, kinds: list[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(script), start_method, str(tmp_path), *kinds]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all is well") == len(kinds)
