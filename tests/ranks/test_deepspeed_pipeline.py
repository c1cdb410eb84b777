"""DeepSpeed's pipelines: a list of layers trains as the same layers in one process, and as in DeepSpeed where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.rows import full
from torch import Tensor, nn

from meshbolt import ConfigError, UnsupportedError, deepspeed
from meshbolt.compat import whole_of
from meshbolt.deepspeed.pipe import LayerSpec, PipelineModule
from meshbolt.engine.placeholders import held_elsewhere
from meshbolt.testing import run_ranks

WORDS, WIDTH, LENGTH, MICRO, STEPS = 11, 8, 5, 2, 4
CLIP = 0.3
ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 2e-2, "warmup_num_steps": 3, "warmup_min_lr": 1e-3}}
Batches = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.tanh(self.up(x))))


def as_head(embedding: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, embedding.weight)


def loss_of(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def layers(pipe: Any, *, tied: bool = True, drop: float = 0.0) -> list[Any]:
    """Return layers of every kind, as `pipe` has them: meshbolt's module, or DeepSpeed's."""
    block = pipe.LayerSpec(Block, drop)
    if tied:
        first = pipe.TiedLayerSpec("words", nn.Embedding, WORDS, WIDTH)
        last = pipe.TiedLayerSpec("words", nn.Embedding, WORDS, WIDTH, forward_fn=as_head)
    else:
        first, last = pipe.LayerSpec(nn.Embedding, WORDS, WIDTH), pipe.LayerSpec(nn.Linear, WIDTH, WORDS)
    return [first, block, torch.tanh, block, block, pipe.LayerSpec(nn.LayerNorm, WIDTH), last]


class Plain(nn.Module):
    """The same layers, as one writes them without stages."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = None if tied else nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.blocks[0](self.words(x)))
        x = self.norm(self.blocks[2](self.blocks[1](x)))
        return F.linear(x, self.words.weight) if self.head is None else self.head(x)


NAMES = {
    "tied_modules.words": "words",
    "0": "words",
    "1": "blocks.0",
    "3": "blocks.1",
    "4": "blocks.2",
    "5": "norm",
    "6": "head",
}


def plain_name(name: str) -> str:
    start = next(prefix for prefix in sorted(NAMES, key=len, reverse=True) if name.startswith(f"{prefix}."))
    return NAMES[start] + name.removeprefix(start)


def batches(steps: int, window: int, ranks: int, rank: int) -> Batches:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, WORDS, (steps * window, ranks, MICRO, LENGTH + 1), generator=generator)[:, rank]
    return [(each[:, :-1].contiguous(), each[:, 1:].contiguous()) for each in tokens]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pipeline.

    Attributes:
        ranks: in all.
        stages: of the pipeline.
        window: microbatches of a step.
        zero: stage of ZeRO.
        module: arguments of the module.
        tied: the head is the embedding.
        blocks: further ones of the file.
    """

    ranks: int = 2
    stages: int = 2
    window: int = 4
    zero: int = 0
    module: dict[str, Any] = field(default_factory=dict)
    tied: bool = True
    blocks: dict[str, Any] = field(default_factory=dict)

    @property
    def data_ranks(self) -> int:
        return self.ranks // self.stages

    def file(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": self.window,
            "gradient_clipping": CLIP,
            "optimizer": ADAM,
            "scheduler": WARMUP,
            "zero_optimization": {"stage": self.zero},
            "steps_per_print": 10**9,
            **self.blocks,
        }


ROWS = {
    "pp2": Row(),
    "pp2_dp2_zero1": Row(ranks=4, zero=1),
    "pp2_untied_uniform": Row(tied=False, module={"partition_method": "uniform"}),
    "pp2_by_type": Row(module={"partition_method": "type:block"}, zero=1),
    "pp2_dp2_zero0": Row(ranks=4),
    "pp4_zero1": Row(ranks=4, stages=4, zero=1),
    "pp2_one_microbatch": Row(window=1),
    "pp2_odd_window": Row(window=3, ranks=4, zero=1),
    "pp2_recomputed": Row(module={"activation_checkpoint_interval": 2}),
    "pp2_recomputed_by_the_file": Row(blocks={"pipeline": {"activation_checkpoint_interval": 1}}),
    "one_stage": Row(ranks=2, stages=1, zero=1),
}
# DeepSpeed refuses these.
FURTHER = {
    "pp2_dp2_zero2": Row(ranks=4, zero=2),
    "pp2_dp2_zero3": Row(ranks=4, zero=3, window=3),
    "pp2_offloaded": Row(
        ranks=4, zero=3, blocks={"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    ),
    "pp2_tp2": Row(ranks=4, stages=2, zero=1, blocks={"tensor_parallel": {"autotp_size": 2}}),
}


def trained(row: Row, dtype: torch.dtype) -> dict[str, Any]:
    torch.set_default_dtype(dtype)
    torch.manual_seed(7)
    module = PipelineModule(layers(deepspeed.pipe, tied=row.tied), num_stages=row.stages, loss_fn=loss_of, **row.module)
    if "tensor_parallel" in row.blocks:
        module.example_input_array = torch.zeros(MICRO, LENGTH, dtype=torch.long)
    start = {plain_name(name): value.clone() for name, value in module.state_dict().items()}
    engine, _, _, scheduler = deepspeed.initialize(model=module, config=row.file())
    data = batches(STEPS, row.window, engine.dp_world_size, engine.get_data_parallel_rank())
    iterator = iter(data)
    losses = [float(engine.train_batch(data_iter=iterator)) for _ in range(STEPS)]
    norm = engine.get_global_grad_norm()
    evaluated = float(engine.eval_batch(iter(data)))
    torch.set_default_dtype(torch.float32)
    held = {name: p for name, p in module.named_parameters() if not held_elsewhere(p)}
    weights = {
        plain_name(n): (whole_of(p) if hasattr(p, "placements") else p).detach().clone() for n, p in held.items()
    }
    counts = (engine.global_steps, engine.micro_steps, engine.global_samples)
    rate = scheduler.get_last_lr()
    return {
        "start": start,
        "losses": losses,
        "norm": norm,
        "evaluated": evaluated,
        "weights": weights,
        "counts": counts,
        "lr": rate,
    }


def expected_of(row: Row, start: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Train the plain module in this process: the mean over microbatches and ranks, a clip, a step."""
    module = Plain(tied=row.tied).to(dtype)
    module.load_state_dict(start)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = deepspeed.WarmupLR(optimizer, **WARMUP["params"])
    ranks = row.ranks // (row.stages * (2 if "tensor_parallel" in row.blocks else 1))
    data = [batches(STEPS, row.window, ranks, rank) for rank in range(ranks)]
    losses: list[float] = []
    for step in range(STEPS):
        own = [batch for each in data for batch in each[step * row.window : (step + 1) * row.window]]
        loss = torch.stack([loss_of(module(x), y) for x, y in own]).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    with torch.no_grad():
        first = [batch for each in data for batch in each[: row.window]]
        evaluated = float(torch.stack([loss_of(module(x), y) for x, y in first]).mean())
    weights = {name: value.detach() for name, value in module.state_dict().items()}
    return {
        "losses": losses,
        "norm": float(norm),
        "evaluated": evaluated,
        "weights": weights,
        "lr": scheduler.get_last_lr(),
    }


QUICK = {"pp2_dp2_zero1"}


@pytest.mark.parametrize("name", [name if name in QUICK else full(name) for name in {**ROWS, **FURTHER}])
def test_layers_in_stages_train_as_in_one_process(name: str) -> None:
    row = {**ROWS, **FURTHER}[name]
    results = run_ranks(trained, row.ranks, row, torch.float64, timeout=60)
    expected = expected_of(row, results[0]["start"], torch.float64)
    merged = {name: value for found in results for name, value in found["weights"].items()}
    assert merged.keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        torch.testing.assert_close(merged[key], value, rtol=0.0, atol=1e-12, msg=key)
    for found in results:
        # The loss is told in float32, as DeepSpeed does.
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-6)
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-6)
        assert found["lr"] == expected["lr"]
        samples = (
            STEPS * row.window * MICRO * (len(results) // (row.stages * (2 if "tensor_parallel" in row.blocks else 1)))
        )
        assert found["counts"] == (STEPS, STEPS * row.window, samples)


# Beside real DeepSpeed ----------------------------------------------------------------------------------------------------

SEEDED = {"seed_layers": True, "base_seed": 42, "partition_method": "uniform"}
RECOMPUTED = {"activation_checkpoint_interval": 1, "use_reentrant": False}  # re-entering, DeepSpeed fails on tokens
# At stage 0, DeepSpeed 0.19.8 clips stages of a pipeline by another norm than at stage 1, whose norm is that of one process.
BESIDE = {
    **{name: row for name, row in ROWS.items() if row.zero and not row.module.get("activation_checkpoint_interval")},
    "pp2": Row(blocks={"gradient_clipping": 0.0}),
    "pp2_untied_uniform": Row(tied=False, module={"partition_method": "uniform"}, zero=1),
    "pp2_one_microbatch": Row(window=1, zero=1),
    "pp2_dp2_zero0": Row(ranks=4, blocks={"gradient_clipping": 0.0}),
    "pp2_recomputed": Row(zero=1, blocks={"pipeline": RECOMPUTED}),
    "pp2_seeded_dropout": Row(zero=1, module=SEEDED, blocks={"drop": 0.3}),
    "pp4_seeded_dropout": Row(module=SEEDED, ranks=4, stages=4, zero=1, blocks={"drop": 0.3}),
    "pp2_seeded_recomputed": Row(zero=1, module=SEEDED, tied=False, blocks={"drop": 0.3, "pipeline": RECOMPUTED}),
}


def beside(library: str, row: Row) -> Any:
    """Return an engine; of the script only the import differs."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(dist.get_world_size()), LOCAL_RANK=str(dist.get_rank()))
    ds = importlib.import_module(library)
    pipe = importlib.import_module(f"{library}.pipe")
    ds.init_distributed(dist_backend="gloo")
    file = row.file()
    drop = file.pop("drop", 0.0)
    torch.manual_seed(7)
    module = pipe.PipelineModule(
        layers=layers(pipe, tied=row.tied, drop=drop), num_stages=row.stages, loss_fn=loss_of, **row.module
    )
    return ds.initialize(model=module, model_parameters=list(module.parameters()), config=file)[0]


def script(library: str, row: Row) -> dict[str, Any]:
    engine = beside(library, row)
    module = engine.module
    place = module.topology().get_coord(dist.get_rank())
    data = batches(STEPS, row.window, row.data_ranks, place.data)
    iterator = iter(data)
    losses = [float(engine.train_batch(data_iter=iterator)) for _ in range(STEPS)]
    evaluated = float(engine.eval_batch(iter(data)))
    logits = None
    if row.stages > 1:
        _, logits = engine.eval_batch(iter(data), return_logits=True)
    return {
        "losses": losses,
        "evaluated": evaluated,
        "parts": list(module.parts),
        "logits": None if logits is None else logits.detach(),
        "is_last": engine.is_last_stage(),
        "lr": engine.get_lr(),
    }


def both(rows: dict[str, Row]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    return {name: (script("meshbolt.deepspeed", row), script("deepspeed", row)) for name, row in rows.items()}


# One start of DeepSpeed, which takes longer than any row, is for all rows of as many ranks.
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("ranks", [full(2), full(4)])
def test_a_script_gives_the_numbers_of_deepspeed_with_another_import(ranks: int) -> None:
    rows = {name: row for name, row in BESIDE.items() if row.ranks == ranks}
    differ = []
    for by_name in run_ranks(both, ranks, rows, timeout=150, start="spawn"):
        for name, (ours, theirs) in by_name.items():
            for key in ("losses", "evaluated", "lr", "parts", "is_last"):
                if ours[key] != pytest.approx(theirs[key], rel=1e-5):
                    differ.append(f"{name}: {key} {ours[key]}, and {theirs[key]} in DeepSpeed")
            if (ours["logits"] is None) != (theirs["logits"] is None):
                differ.append(f"{name}: logits on one side only")
            elif ours["logits"] is not None and not torch.allclose(
                ours["logits"], theirs["logits"], rtol=1e-5, atol=1e-5
            ):
                differ.append(f"{name}: logits {ours['logits'][0, 0]}, and {theirs['logits'][0, 0]} in DeepSpeed")
    assert not differ, "\n".join(differ)


def goes_on_from(rows: dict[str, Row], folder: str) -> dict[str, tuple[list[float], list[float], int]]:
    """Train two steps in DeepSpeed, save, train two more, and go on from its checkpoint here."""
    found = {}
    for name, row in rows.items():
        place = f"{folder}/{name}"
        engine = beside("deepspeed", row)
        data = batches(4, row.window, row.data_ranks, engine.grid.get_data_parallel_rank())
        iterator = iter(data)
        for _ in range(2):
            engine.train_batch(iterator)
        engine.save_checkpoint(place, tag="two", client_state={"note": name})
        theirs = [float(engine.train_batch(iterator)) for _ in range(2)]
        engine = beside("meshbolt.deepspeed", row)
        _, state = engine.load_checkpoint(place)
        assert state["note"] == name
        iterator = iter(data[2 * row.window :])
        found[name] = [float(engine.train_batch(iterator)) for _ in range(2)], theirs, engine.global_steps
    return found


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.filterwarnings("ignore")  # DeepSpeed's own
@pytest.mark.parametrize("ranks", [full(2), full(4)])
def test_a_pipeline_goes_on_from_a_checkpoint_of_deepspeed(ranks: int, tmp_path: Path) -> None:
    names = ("pp2", "pp2_dp2_zero1", "pp2_by_type", "pp2_dp2_zero0", "pp4_zero1")
    rows = {name: BESIDE[name] for name in names if BESIDE[name].ranks == ranks}
    for by_name in run_ranks(goes_on_from, ranks, rows, str(tmp_path), timeout=150, start="spawn"):
        for name, (ours, theirs, steps) in by_name.items():
            assert ours == pytest.approx(theirs, rel=1e-5), name
            assert steps == 4


# Data, modes and checkpoints ----------------------------------------------------------------------------------------------


def engine_of(row: Row, **arguments: Any) -> Any:
    torch.manual_seed(7)
    module = PipelineModule(layers(deepspeed.pipe), num_stages=row.stages, loss_fn=loss_of, **row.module)
    return deepspeed.initialize(model=module, config=row.file(), **arguments)[0]


class Samples(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.tokens = torch.randint(0, WORDS, (count, LENGTH + 1), generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index]}


def in_form(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["tokens"][:, :-1], batch["tokens"][:, 1:]


def ways_of_data(row: Row) -> list[list[float]]:
    samples = Samples(MICRO * row.window * row.data_ranks * 2)
    found = []
    for way in ("dataset", "loader", "iterator", "first stages"):
        engine = engine_of(row, training_data=samples if way == "dataset" else None)
        engine.set_batch_fn(in_form)
        own = samples.tokens[engine.get_data_parallel_rank() :: row.data_ranks].split(MICRO)
        batches = [{"tokens": tokens} for tokens in own] * 2
        if way == "loader":
            engine.set_dataloader(batches)
        iterator = iter(batches) if way == "iterator" or (way == "first stages" and engine.is_first_stage()) else None
        # In the third step the dataset begins again.
        found.append([float(engine.train_batch(iterator)) for _ in range(3)])
    return found


@pytest.mark.parametrize("row", [Row(window=2), full(Row(ranks=4, zero=1, window=2))], ids=["pp2", "pp2_dp2"])
def test_microbatches_come_from_a_dataset_a_loader_or_an_iterator_which_later_stages_need_not_have(row: Row) -> None:
    for found in run_ranks(ways_of_data, row.ranks, row, timeout=60):
        assert len(set(found[0])) == 3
        assert all(losses == found[0] for losses in found)


def ends(row: Row) -> list[str]:
    engine = engine_of(row)
    count = row.window + (1 if dist.get_rank() else 0)
    iterator = iter(batches(1, count, row.data_ranks, engine.get_data_parallel_rank()))
    engine.train_batch(iterator)
    told = []
    for call in (lambda: engine.train_batch(iterator), lambda: engine.eval_batch(iter([]))):
        with pytest.raises(StopIteration) as stopped:
            call()
        told.append(str(stopped.value))
    return [*told, str(engine.global_steps)]


def test_an_iterator_at_its_end_ends_the_loop_on_every_rank() -> None:
    expected = ["The iterator of rank 0 has fewer than the 4 microbatches of a step."] * 2
    assert run_ranks(ends, 2, Row()) == [[*expected, "1"]] * 2


def breaks(row: Row) -> list[str]:
    engine = engine_of(row)
    own = batches(1, row.window, row.data_ranks, 0)

    def on_rank_1() -> Any:
        yield own[0]
        if dist.get_rank() == 1:
            raise ValueError("only here")
        yield from own[1:]

    with pytest.raises(ValueError, match="only here"):
        engine.train_batch(on_rank_1())
    return [str(float(engine.train_batch(iter(own)))), str(engine.global_steps)]


def test_an_error_of_one_ranks_iterator_is_raised_on_every_rank_and_another_may_go_on() -> None:
    first, second = run_ranks(breaks, 2, Row())
    assert first == second
    assert first[1] == "1"


def evaluations(row: Row) -> dict[str, Any]:
    engine = engine_of(row)
    own = batches(1, row.window, row.data_ranks, engine.get_data_parallel_rank())
    found = {
        "loss": engine.eval_batch(iter(own)),
        "two": engine.eval_batch(iter(own), num_micro_batches=2),
        "last only": engine.eval_batch(iter(own), bcast_loss=False),
        "list": engine.eval_batch(iter(own), reduce_output=None),
        "mean logits": engine.eval_batch(iter(own), compute_loss=False),
        "each logits": engine.eval_batch(iter(own), compute_loss=False, reduce_output=None),
        "both": engine.eval_batch(iter(own), return_logits=True),
    }
    assert not engine.module.training
    engine.train_batch(iter(own))
    assert engine.module.training
    return {**found, "is last": engine.is_last_stage()}


def test_an_evaluation_returns_what_it_was_asked_for_on_the_stages_that_have_it() -> None:
    row = Row(zero=1)
    (alone,) = run_ranks(evaluations, 1, Row(stages=1))
    for found in run_ranks(evaluations, 2, row):
        assert torch.isclose(found["loss"], torch.stack(found["list"] or [found["loss"]]).mean())
        assert found["two"].shape == found["loss"].shape == ()
        assert found["both"][0] == found["loss"]
        if not found["is last"]:
            assert [found[key] for key in ("last only", "list", "mean logits", "each logits")] == [None] * 4
            assert found["both"][1] is None
            continue
        assert found["last only"] == found["loss"]
        assert len(found["list"]) == len(found["each logits"]) == row.window
        assert torch.equal(found["both"][1], found["each logits"][-1])
        assert torch.allclose(found["mean logits"], torch.stack(found["each logits"]).mean(0))
        assert found["loss"] != alone["loss"]  # other weights: stages draw theirs as DeepSpeed's do


def saves(row: Row, folder: str) -> dict[str, Any]:
    engine = engine_of(row)
    data = batches(4, row.window, row.data_ranks, engine.get_data_parallel_rank())
    iterator = iter(data)
    for _ in range(2):
        engine.train_batch(iterator)
    engine.save_checkpoint(folder, tag="two", client_state={"note": "here"})
    return {"losses": [float(engine.train_batch(iterator)) for _ in range(2)]}


def loads(row: Row, folder: str) -> dict[str, Any]:
    engine = engine_of(row)
    path, state = engine.load_checkpoint(folder)
    data = batches(4, row.window, row.data_ranks, engine.get_data_parallel_rank())
    iterator = iter(data[2 * row.window :])
    losses = [float(engine.train_batch(iterator)) for _ in range(2)]
    return {"losses": losses, "steps": engine.global_steps, "note": state["note"], "path": path}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        full(Row(zero=1), Row(stages=1, ranks=1)),
        full(Row(ranks=4, zero=1), Row(ranks=2, stages=1, zero=3)),
        full(Row(ranks=1, stages=1), Row(ranks=4, stages=4, zero=1)),
    ],
    ids=["pp2_to_one", "pp2_dp2_to_dp2", "one_to_pp4"],
)
def test_a_checkpoint_goes_on_with_other_stages(first: Row, second: Row, tmp_path: Path) -> None:
    expected = run_ranks(saves, first.ranks, first, str(tmp_path), timeout=60)[0]
    for found in run_ranks(loads, second.ranks, second, str(tmp_path), timeout=60):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert (found["steps"], found["note"]) == (4, "here")


# Forms of layers and microbatches -----------------------------------------------------------------------------------------


WIDE = 40  # what is smaller is built with its values even under zero.Init


class Masked(nn.Module):
    """A layer that passes on what it does not change, among it a tensor that needs no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDE, WIDE)

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = given
        return x + torch.tanh(self.inner(x)) * mask, mask


def mean_of_pair(given: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> Tensor:
    return ((given[0] - labels[0]) ** 2).mean() * labels[1]


def in_odd_forms(stages: int, blocks: dict[str, Any], late: bool) -> list[float]:
    with deepspeed.zero.Init(enabled=late):
        # Seeds of their own give layers the same weights for any number of stages.
        specs = [LayerSpec(Masked) for _ in range(4)]
        module = PipelineModule(specs, num_stages=stages, loss_fn=mean_of_pair, seed_layers=True)
    assert late == any(parameter.is_meta for parameter in module.parameters())
    engine = deepspeed.initialize(model=module, config=Row(stages=stages, window=3, zero=1, blocks=blocks).file())[0]
    generator = torch.Generator().manual_seed(2)
    parts: list[Any] = []
    for samples, length in ((2, 5), (3, 2), (1, 7)) * 3:
        x = torch.randn(samples, length, WIDE, generator=generator)
        mask = torch.rand(samples, length, 1, generator=generator) > 0.3
        labels = [torch.randn(samples, length, WIDE, generator=generator), torch.tensor(0.5)]
        parts.append(((x, mask), labels))
    iterator = iter(parts)
    return [float(engine.train_batch(iterator)) for _ in range(3)]


PRECISIONS = {
    "float32": {},
    "bf16": {"bf16": {"enabled": True}, "optimizer": {"type": "SGD", "params": {"lr": 1 / 32}}},
    "fp16": {
        "fp16": {"enabled": True, "initial_scale_power": 8},
        "optimizer": {"type": "SGD", "params": {"lr": 1 / 32}},
    },
}


@pytest.mark.parametrize(
    ("precision", "late"), [("float32", False), full("float32", True), full("bf16", False), full("fp16", False)]
)
def test_tuples_cross_stages_in_microbatches_of_any_shape(precision: str, late: bool) -> None:
    blocks = {**PRECISIONS[precision], "scheduler": {}}
    ((*expected,),) = run_ranks(in_odd_forms, 1, 1, blocks, False, timeout=60)
    assert len(set(expected)) == 3
    for found in run_ranks(in_odd_forms, 2, 2, blocks, late, timeout=60):
        # In 16 bits each microbatch's gradients are rounded before they are added up in float32: the same sums.
        assert found == pytest.approx(expected, rel=1e-5)


# What is refused ----------------------------------------------------------------------------------------------------------


def refusals(row: Row) -> list[str]:
    engine = engine_of(row)
    own = batches(1, row.window, row.data_ranks, 0)
    calls = {
        "forward": lambda: engine(own[0][0]),
        "backward": lambda: engine.backward(torch.zeros(())),
        "step": engine.step,
        "nothing": engine.train_batch,
        "a loader": lambda: engine.train_batch(own),
        "no pair": lambda: engine.train_batch(iter([own[0][0]])),
        "reduction": lambda: engine.eval_batch(iter(own), reduce_output="sum"),
        "number": lambda: engine.eval_batch(iter(own), num_micro_batches=0),
        "weights": lambda: engine.save_16bit_model("nowhere"),
    }
    found = []
    for call in calls.values():
        with pytest.raises((ConfigError, UnsupportedError)) as error:
            call()
        found.append(f"{type(error.value).__name__}: {error.value}")
    with torch.no_grad(), pytest.raises(ConfigError, match="gradients disabled"):
        engine.train_batch(iter(own))
    return found


def test_single_passes_and_batches_of_another_form_are_refused_with_what_to_call() -> None:
    for told in run_ranks(refusals, 2, Row()):
        for text, words in zip(
            told,
            (
                "UnsupportedError: engine.forward was called .*engine.train_batch",
                "UnsupportedError: engine.backward was called .*engine.train_batch",
                "UnsupportedError: engine.step was called .*engine.train_batch",
                "ConfigError: There is no iterator .*training_data",
                "ConfigError: data_iter is a list.*iter.loader",
                r"ConfigError: A microbatch is a Tensor, .*\(inputs, labels\)",
                "ConfigError: eval_batch.reduce_output='sum'",
                "ConfigError: eval_batch.num_micro_batches=0",
                r"UnsupportedError: engine.save_16bit_model\(\): .* engine.save_checkpoint",
            ),
            strict=True,
        ):
            assert re.match(words, text), text


def file_with_other_stages() -> str:
    module = PipelineModule(layers(deepspeed.pipe), num_stages=2, loss_fn=loss_of)
    with pytest.raises(ConfigError) as error:
        deepspeed.initialize(model=module, config={**Row().file(), "pipeline": {"stages": 4}})
    return str(error.value)


def test_a_file_with_another_number_of_stages_is_refused_with_both() -> None:
    for told in run_ranks(file_with_other_stages, 2):
        assert "'pipeline.stages' is 4, and the PipelineModule has num_stages=2" in told
