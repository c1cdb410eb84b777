"""If these fail, pretrained weights are lost, or the whole model stands on one rank."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

import meshbolt
from meshbolt.errors import CheckpointError
from meshbolt.testing import run_ranks


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight


class Module(LightningModule):
    def __init__(self, path):
        super().__init__()
        self.path, self.net, self.extra = path, None, nn.Linear(3, 1)

    def configure_model(self):
        if self.net is None:
            self.net = Net()
            meshbolt.load_pretrained(self.net, self.path)

    def training_step(self, batch, _):
        x = self.net.embed(batch).mean(1)
        for block in self.net.blocks:
            x = x + block(x)
        return self.net.head(self.net.norm(x)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def write(folder, *, shards=False):
    torch.manual_seed(7)
    net = Net()
    net.norm.running_mean.fill_(3.0)
    state = {name: value.clone() for name, value in net.state_dict().items() if name != "head.weight"}
    if not shards:
        save_file(state, folder / "model.safetensors")
        return state
    halves = {f"part-{index}.safetensors": dict(list(state.items())[index::2]) for index in range(2)}
    for name, half in halves.items():
        save_file(half, folder / name)
    index = {"weight_map": {key: name for name, half in halves.items() for key in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def fit(path):
    module = Module(path)
    trainer = Trainer(
        strategy="zero3",
        accelerator="cpu",
        devices=2,
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.randint(0, 11, (8, 5)), batch_size=4))
    tied = module.net.head.weight is module.net.embed.weight
    with trainer.strategy.gathered(module):
        return tied, {name: value.clone() for name, value in module.net.state_dict().items() if "running" not in name}


@pytest.mark.parametrize("shards", [False, True])
def test_weights_are_streamed_into_a_module_on_the_meta_device(tmp_path, shards):
    state = write(tmp_path, shards=shards)
    for tied, loaded in run_ranks(fit, 2, str(tmp_path)):
        assert tied
        for name, value in loaded.items():
            if name != "norm.num_batches_tracked":
                torch.testing.assert_close(value, state[name.replace("head", "embed")], rtol=0, atol=0)


def test_real_modules_are_filled_at_once(tmp_path):
    state = write(tmp_path)
    net = Net()
    meshbolt.load_pretrained(net, tmp_path / "model.safetensors")
    torch.testing.assert_close(net.norm.running_mean, state["norm.running_mean"])
    torch.testing.assert_close(net.head.weight, state["embed.weight"])


def test_weights_that_do_not_fit_are_refused_with_their_names(tmp_path):
    state = write(tmp_path)
    save_file({**{"old." + k: v for k, v in state.items()}}, tmp_path / "old.safetensors")
    meshbolt.load_pretrained(Net(), tmp_path / "old.safetensors", prefix="old.")
    with pytest.raises(CheckpointError, match=r"Missing there: \['embed.weight'"):
        meshbolt.load_pretrained(Net(), tmp_path / "old.safetensors")
    save_file({"embed.weight": torch.zeros(2, 2)}, tmp_path / "small.safetensors")
    with pytest.raises(CheckpointError, match=r"embed.weight is \(2, 2\), here \(11, 4\)"):
        meshbolt.load_pretrained(Net(), tmp_path / "small.safetensors", strict=False)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        meshbolt.load_pretrained(Net(), tmp_path)
