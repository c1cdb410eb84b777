"""If these fail, stages begin with other values than one process does, or a rank holds more of a model than its stages."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.ranks.trainer.loops_support import trainer, whole
from tests.rows import full
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader

import meshbolt
from meshbolt.compat import TorchDispatchMode, local_tensor, tree_leaves
from meshbolt.engine.deferred import Deferred, attach
from meshbolt.pipeline import is_foreign
from meshbolt.testing import run_ranks

WIDTH, WORDS, BLOCKS, SEED = 48, 64, 4, 3
SLACK_BYTES = 8 * 1024  # batches, and Lightning's numbers; each matrix of the model has more
WAYS = ("__init__", "configure_model", "init_module", "fit --meta", "load_pretrained")


class Angles(nn.Module):
    """Has no parameters: a table that all blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(16, WIDTH), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        steps = torch.arange(16 * WIDTH, dtype=torch.float32, device=self.table.device)
        with torch.no_grad():
            self.table.copy_(steps.div(WIDTH).cos().view(16, WIDTH))


class Block(nn.Module):
    """Layers, a parameter of its own, and a buffer that is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.register_buffer("noise", torch.empty(WIDTH, WIDTH))
        self.reset_parameters()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.gain, std=0.1)
        nn.init.normal_(self.noise)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.down(self.up(x * angles[: x.shape[1]]).relu()) + x @ (self.gain + self.noise)
        return x + self.norm(y.flatten(0, 1)).view_as(y)


class Recurrent(nn.Module):
    """Holds a layer that keeps a list of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0].tanh()


class Net(nn.Module):
    """Tied words, of which one name is on the first stage and one on the last."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.angles = Angles()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.state = Recurrent()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.words.weight.requires_grad_(True)
        self.blocks[3].up.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        angles = self.angles.table + 0.0
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.state(x))


class Module(pl.LightningModule):
    """Notes at the beginning of training what this rank has."""

    def __init__(self, *, is_built: bool, path: str = "") -> None:
        super().__init__()
        self.path, self.net = path, None
        self.found: dict[str, Any] = {}
        self.look: Callable[[], dict[str, Any]] = dict
        if is_built:
            self.net = Net()

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Net()
            if self.path:
                meshbolt.load_pretrained(self.net, self.path)

    def on_train_start(self) -> None:
        self.found = self.look()

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.1)


def live_bytes() -> int:
    """Return the bytes of all storages that some tensor of Python's has."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    plain = [
        each for each in tensors if not is_foreign(each) and not each.is_meta and not hasattr(each, "_local_tensor")
    ]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in plain if each.numel()}
    return sum(storages.values())


def built(way: str, run: pl.Trainer, path: str) -> Module:
    if way == "init_module":
        with run.init_module():
            return Module(is_built=True)
    deferred = Deferred()
    with deferred.building() if way == "fit --meta" else nullcontext():
        module = Module(is_built=way in ("__init__", "fit --meta"), path=path if way == "load_pretrained" else "")
    if way == "fit --meta":
        attach(module, deferred)
    return module


def begun(way: str, alike: bool, path: str, zero: int, tensor: int = 1) -> dict[str, Any]:
    """Return what a rank has when training begins."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)
    data = DataLoader(torch.randint(0, WORDS, (8, 9), generator=torch.Generator().manual_seed(0)), batch_size=4)
    pipeline = meshbolt.PipelineParallel(2, cuts=["net.blocks.2"], microbatches=2)
    strategy = meshbolt.MeshStrategy(zero=zero, pipeline_parallel=pipeline, tensor_parallel=tensor)
    run = trainer(strategy, max_steps=1, max_epochs=None)
    before_bytes = live_bytes()
    torch.manual_seed(SEED if alike else SEED + dist.get_rank())
    module = built(way, run, path)
    originals = {name: StorageWeakRef(p.untyped_storage()) for name, p in module.named_parameters()}

    def look() -> dict[str, Any]:
        here = {name: p for name, p in module.named_parameters(remove_duplicate=False) if not is_foreign(p)}
        return {
            "values": {name: whole(p).detach().clone() for name, p in here.items()},
            "trained": [name for name, p in here.items() if p.requires_grad],
            "buffers": {name: buffer.clone() for name, buffer in module.named_buffers()},
            "foreign": [name for name, p in module.named_parameters(remove_duplicate=False) if is_foreign(p)],
            "kept": [name for name, storage in originals.items() if not storage.expired() and name not in here],
            "tied": module.net.words.weight is module.net.head.weight,
        }

    module.look = look
    own_bytes: list[int] = []

    def weigh() -> None:
        held = [local_tensor(t) for t in [*module.parameters(), *module.buffers()] if not is_foreign(t)]
        own = {id(t): t.untyped_storage().nbytes() for t in held}
        own_bytes.extend([live_bytes() - before_bytes, sum(own.values())])

    module.on_fit_start = weigh  # type: ignore[method-assign]
    run.fit(module, data)
    return {
        **module.found,
        "grown": own_bytes[0],
        "own": own_bytes[1],
        "said": [x for x in said if "built with all its values in __init__" in x],
    }


def plain(path: str = "") -> Module:
    torch.manual_seed(SEED)
    module = Module(is_built=True)
    if path:
        meshbolt.load_pretrained(module.net, path)
    return module


def saved(folder: Path) -> str:
    """Write weights of all but the last block, and return where."""
    torch.manual_seed(9)
    state = {n: torch.randn_like(v) if v.dtype.is_floating_point else v for n, v in Net().state_dict().items()}
    state.pop("head.weight")
    save_file(state, folder / "model.safetensors")
    return str(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("way", "alike", "ranks", "zero"),
    [
        *((way, True, 2, 1) for way in WAYS),
        *((way, False, 2, 3) for way in WAYS),
        *(full(way, False, 4, zero) for way in WAYS for zero in (0, 3)),
    ],
)
def test_stages_begin_with_the_values_of_one_process_and_hold_no_others(
    way: str, alike: bool, ranks: int, zero: int, tmp_path: Path
) -> None:
    path = saved(tmp_path)
    module = plain(path if way == "load_pretrained" else "")
    values = dict(module.named_parameters(remove_duplicate=False))
    found = run_ranks(begun, ranks, way, alike, path, zero)
    for rank, each in enumerate(found):
        for name, value in each["values"].items():
            assert torch.equal(value, values[name]), f"{name} on rank {rank}"
        assert each["buffers"].keys() == dict(module.named_buffers()).keys()
        for name, buffer in module.named_buffers():
            assert torch.equal(each["buffers"][name], buffer), f"{name} on rank {rank}"
        assert each["trained"] == [name for name in each["values"] if values[name].requires_grad]
        assert {*each["values"], *each["foreign"]} == values.keys()
        assert not each["kept"]
        assert each["tied"]
    first, last = found[0], found[-1]
    shared = {"net.words.weight", "net.head.weight"}
    assert set(first["values"]) == shared | {n for n in values if n.startswith(("net.blocks.0.", "net.blocks.1."))}
    assert set(last["values"]) == (values.keys() - set(first["values"])) | shared
    for each in found:
        assert each["own"] <= each["grown"] < each["own"] + SLACK_BYTES
    assert [len(each["said"]) for each in found] == [int(way == "__init__"), *([0] * (ranks - 1))]


class Peak(TorchDispatchMode):
    """Adds up the storages that are alive of those that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is Tensor and leaf.device.type == "cpu" and leaf.is_floating_point():  # no generator's state
                storage = leaf.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.storages = {storage: nbytes for storage, nbytes in self.storages.items() if not storage.expired()}
        self.most = max(self.most, sum(self.storages.values()))
        return result


def largest(way: str, path: str) -> tuple[int, int]:
    """Return what a rank holds at most until training begins, and what it holds then, in bytes."""
    pipeline = meshbolt.PipelineParallel(2, cuts=["net.blocks.2"], microbatches=2)
    # All that is large is in units: the engine gathers the rest once before training begins.
    zero = meshbolt.Zero(1, unit=["Block", "Recurrent"])
    run = trainer(meshbolt.MeshStrategy(zero=zero, pipeline_parallel=pipeline), max_steps=1, max_epochs=None)
    data = DataLoader(torch.randint(0, WORDS, (8, 9)), batch_size=4)
    found: list[int] = []
    with Peak() as peak:
        module = built(way, run, path)

        def begin() -> None:
            held = [local_tensor(t) for t in [*module.parameters(), *module.buffers()] if not is_foreign(t)]
            found.extend([peak.most, sum(t.untyped_storage().nbytes() for t in held)])

        module.on_fit_start = begin  # type: ignore[method-assign]
        run.fit(module, data)
    return found[0], found[1]


@pytest.mark.parametrize("way", [way for way in WAYS if way != "__init__"])
def test_a_rank_never_holds_more_than_its_stages_and_one_module(way: str, tmp_path: Path) -> None:
    module = plain()
    # What is noted or read is taken tensor by tensor; where numbers are drawn, each module is drawn on every rank.
    one_by_one = way in ("fit --meta", "load_pretrained")
    parts = [[p] for p in module.parameters()] if one_by_one else [[*m.parameters(False)] for m in module.modules()]
    part = max(sum(p.nbytes for p in each) for each in parts)

    for most, own in run_ranks(largest, 2, way, saved(tmp_path)):
        assert own < most < own + part + 2 * SLACK_BYTES
