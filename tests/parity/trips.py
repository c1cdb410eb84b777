"""Round trips of checkpoints as data: who saves, who loads, which of all pairs are run, and running them.

A run trains one epoch and saves; another one loads that and trains the second epoch. The samples of a step are the same under
every layout, each rank taking its share of them, so that any pair ends where one process ends that trains through.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning.fabric as lf
import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.parity import models
from tests.parity.plain_files import write_plain_file
from torch import Tensor
from torch.utils.data import DataLoader

from meshbolt import MeshStrategy, Zero
from meshbolt.demos import ByteGPT
from meshbolt.demos.model import VOCABULARY
from meshbolt.strategies import FabricMeshStrategy
from meshbolt.testing import RankFailure, run_ranks
from meshbolt.testing.parity.loaders import as_it_is
from meshbolt.testing.parity.record import whole

Loop = Literal["trainer", "fabric"]
Model = Literal["shapes", "gpt"]
Values = dict[str, Tensor]

LOOPS: tuple[Loop, ...] = ("trainer", "fabric")
STEPS, SAMPLES = 3, 12  # of an epoch, and of a step: 12 can be divided among 1, 2, 3 and 4 ranks
LENGTH = 4  # of a text
RUNS_PER_WORLD = 8
TIMEOUT_SECONDS = 100


@dataclass(frozen=True, order=True)
class Layout:
    """How one run holds the module.

    Attributes:
        ranks: how many.
        stage: ZeRO stage; None for a plain run of Lightning's on one device, which knows nothing of meshbolt.
        replicate: copies of the sharded state.
        tensor: ranks that share each layer.
    """

    ranks: int
    stage: int | None = None
    replicate: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        if self.stage is None:
            return "plain"
        shared = f"tp{self.tensor}-" if self.tensor > 1 else ""
        return f"{shared}{'hsdp' if self.replicate > 1 else 'zero'}{self.stage}x{self.ranks}"

    @property
    def data_parallel_size(self) -> int:
        """Into how many shares the samples of a step are divided."""
        return self.ranks // self.tensor

    def strategy(self, kind: Callable[..., Any]) -> Any:
        """Return the strategy of a Trainer or of Fabric.

        Args:
            kind: the class of meshbolt's.
        """
        if self.stage is None:
            return "auto"
        return kind(zero=Zero(stage=self.stage, replicate=self.replicate), tensor_parallel=self.tensor)


PLAIN = Layout(1)
LAYOUTS: tuple[Layout, ...] = (
    PLAIN,
    *(Layout(ranks, stage) for ranks in (1, 2, 3, 4) for stage in (0, 1, 2, 3)),
    *(Layout(ranks, stage, 2) for ranks in (2, 4) for stage in (1, 2, 3)),
)
TENSOR_LAYOUTS: tuple[Layout, ...] = (
    Layout(2, 1, tensor=2),
    *(Layout(4, stage, tensor=2) for stage in (0, 1, 3)),
    Layout(4, 3, 2, tensor=2),
    Layout(4, 1, tensor=4),
)
UNDIVIDED_LAYOUTS: tuple[Layout, ...] = (
    PLAIN,
    *(Layout(ranks, stage) for ranks in (1, 2, 4) for stage in (0, 1, 2, 3)),
)


@dataclass(frozen=True)
class Trip:
    """Save in one layout, load in another, in one of the loops."""

    loop: Loop
    saving: Layout
    loading: Layout
    model: Model = "shapes"

    def __str__(self) -> str:
        return f"{self.loop}-{self.saving}-{self.loading}"


def all_trips() -> tuple[Trip, ...]:
    """Return every pair of layouts that divide no layer in both loops, and every pair with one that does in one of them."""
    loops = itertools.cycle(LOOPS)
    every = (*TENSOR_LAYOUTS, *UNDIVIDED_LAYOUTS)
    pairs = [pair for pair in itertools.product(every, every) if pair[0].tensor * pair[1].tensor > 1]
    return (
        *itertools.starmap(Trip, itertools.product(LOOPS, LAYOUTS, LAYOUTS)),
        *(Trip(next(loops), *pair, model="gpt") for pair in pairs),
    )


def selected_trips(*, seed: int) -> frozenset[Trip]:
    """Return a seeded selection in which every layout saves and loads, and each loop does so with a plain run.

    Args:
        seed: of the selection.
    """
    generator = random.Random(seed)
    savers, loaders = list(LAYOUTS), list(LAYOUTS)
    generator.shuffle(savers)
    generator.shuffle(loaders)
    loops = itertools.cycle(LOOPS)
    chosen = {Trip(next(loops), saving, loading) for saving, loading in zip(savers, loaders, strict=True)}
    sharded = Layout(3, 3)
    plain = {Trip(loop, *pair) for loop in LOOPS for pair in ((PLAIN, sharded), (sharded, PLAIN))}
    return frozenset(chosen | plain | set(_selected_with_divided_layers(generator)))


def _selected_with_divided_layers(generator: random.Random) -> Iterator[Trip]:
    """Yield a trip from every layout that divides layers to a drawn one that does not, and one to it, from one of two."""
    trips = {(trip.saving, trip.loading): trip for trip in all_trips() if trip.model == "gpt"}
    loaders = [PLAIN, *generator.sample(UNDIVIDED_LAYOUTS, len(TENSOR_LAYOUTS) - 1)]
    for layout, loading, saving in zip(TENSOR_LAYOUTS, loaders, itertools.cycle((PLAIN, Layout(2, 3))), strict=False):
        yield trips[layout, loading]
        yield trips[saving, layout]


# One run ---------------------------------------------------------------------------------------------------------------


class Task(models.Task):
    """Shapes that shard unevenly, two groups of parameters, and a schedule."""

    def __init__(self) -> None:
        super().__init__(models.SmallShapes, torch.optim.AdamW)
        # A plain run reads weights before it converts the module, and would round them.
        self.double()

    def configure_optimizers(self) -> Any:
        return _configured(self, eps=1e-8)


class TextTask(pl.LightningModule):
    """A transformer whose queries, keys and values lie in one projection, with one weight for tokens and head."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ByteGPT(dim=8, num_layers=1, num_heads=4, max_length=LENGTH)
        self.network.head.weight = self.network.tokens.weight
        self.double()

    def training_step(self, batch: models.Batch, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self.network(batch[0]).flatten(0, 1), batch[1].flatten())}

    def configure_optimizers(self) -> Any:
        # The gradient of a key's bias is nothing but rounding, of which the usual epsilon would make whole steps.
        return _configured(self, eps=1e-4)


TASKS: dict[Model, Callable[[], pl.LightningModule]] = {"shapes": Task, "gpt": TextTask}


def _configured(module: pl.LightningModule, *, eps: float) -> Any:
    vectors = [p for p in module.parameters() if p.dim() < 2]
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    groups = [{"params": vectors, "lr": 2e-2}, {"params": matrices, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=eps)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a run holds, whole: after it has loaded (where it does), and at its end."""

    start: Values = field(default_factory=dict)
    end: Values


def batches(layout: Layout, model: Model) -> Iterator[models.Batch]:
    """Yield this rank's share of every step of an epoch, in float64 where it is no text."""
    generator = torch.Generator().manual_seed(1)
    rank = dist.get_rank() // layout.tensor if layout.stage is not None else 0
    for _ in range(STEPS):
        if model == "gpt":
            text = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH + 1), generator=generator)
            whole_batch = (text[:, :-1], text[:, 1:])
        else:
            x = torch.randn(SAMPLES, models.IN, generator=generator, dtype=torch.float64)
            whole_batch = (x, torch.sin(x.sum(1, keepdim=True)))
        one, other = (part.chunk(layout.data_parallel_size)[rank] for part in whole_batch)
        yield one, other


def values_of(module: torch.nn.Module, optimizer: Any, strategy: Any) -> Values:
    """Return weights, moments and settings of the optimizer, whole."""
    found = {f"weight {name}": whole(value) for name, value in module.state_dict().items()}
    found |= {f"lr {i}": torch.tensor(group["lr"]) for i, group in enumerate(optimizer.param_groups)}
    names = {parameter: name for name, parameter in module.named_parameters()}
    if isinstance(strategy, (MeshStrategy, FabricMeshStrategy)):
        with strategy.gathered(module, optimizer=optimizer) as gathered:
            state = {name: dict(values) for name, values in gathered.items()}
            found |= {f"{key} {n}": whole(value) for n, values in state.items() for key, value in values.items()}
    else:
        state = {names[parameter]: values for parameter, values in optimizer.state.items()}
        found |= {f"{key} {n}": whole(value) for n, values in state.items() for key, value in values.items()}
    return found


class _AtStart(pl.Callback):
    """Notes what a Trainer trains from."""

    values: Values

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.values = values_of(module, trainer.optimizers[0], trainer.strategy)


def in_trainer(layout: Layout, model: Model, *, save: Path | None, load: Path | None) -> Seen:
    """Train one epoch, or load and train the second one, in a Trainer."""
    start = _AtStart()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=layout.ranks,
        strategy=layout.strategy(MeshStrategy),
        precision="64-true",
        max_epochs=1 if load is None else 2,
        callbacks=[start],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = TASKS[model]()
    trainer.fit(module, DataLoader(list(batches(layout, model)), batch_size=None, collate_fn=as_it_is), ckpt_path=load)
    if save is not None:
        trainer.save_checkpoint(save)
    return Seen(start=start.values, end=values_of(module, trainer.optimizers[0], trainer.strategy))


def in_fabric(layout: Layout, kind: Model, *, save: Path | None, load: Path | None) -> Seen:
    """Train one epoch, or load and train the second one, in a Fabric loop."""
    strategy = layout.strategy(FabricMeshStrategy)
    fabric = lf.Fabric(accelerator="cpu", devices=layout.ranks, strategy=strategy, precision="64-true")
    fabric.launch()
    module = TASKS[kind]()
    made: Any = module.configure_optimizers()
    schedule = made["lr_scheduler"]["scheduler"]
    model, optimizer = fabric.setup(module, made["optimizer"])
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "steps": 0}
    if load is not None:
        fabric.load(load, state)
        assert state["steps"] == STEPS
    start = values_of(module, optimizer.optimizer, fabric.strategy)
    for index, batch in enumerate(batches(layout, kind)):
        fabric.backward(model.training_step(batch, index)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if save is not None:
        fabric.save(save, {**state, "steps": STEPS})
    return Seen(start=start, end=values_of(module, optimizer.optimizer, fabric.strategy))


RUNS: dict[Loop, Callable[..., Seen]] = {"trainer": in_trainer, "fabric": in_fabric}


@dataclass(frozen=True)
class Run:
    """One run: of a layout, that saves or loads."""

    loop: Loop
    model: Model
    layout: Layout
    save: Path | None = None
    load: Path | None = None

    def __call__(self) -> Seen:
        pl.seed_everything(0, verbose=False)
        return RUNS[self.loop](self.layout, self.model, save=self.save, load=self.load)


def _run_all(runs: Sequence[Run]) -> list[Seen]:
    if runs[0].layout.stage is None and dist.is_initialized():
        dist.destroy_process_group()
    return [run() for run in runs]


class Trips:
    """The results of trips: what saves is run when the first one is asked for, what loads a world at a time."""

    def __init__(self, trips: Iterable[Trip], folder: Path) -> None:
        """Prepare.

        Args:
            trips: all that may be asked for.
            folder: for the checkpoints.
        """
        self._trips, self._folder = tuple(dict.fromkeys(trips)), folder
        self._loaded: dict[Trip, Seen | RankFailure] = {}

    @functools.cached_property
    def _saved(self) -> dict[tuple[Loop, Model, Layout], Seen | RankFailure]:
        savers = sorted({(trip.loop, trip.model, trip.saving) for trip in self._trips}, key=str)
        runs = {saver: Run(*saver, save=self._path(*saver)) for saver in savers}
        seen: dict[tuple[Loop, Model, Layout], Seen | RankFailure] = {}
        for world in _worlds(runs):
            seen.update(_run_together(world))
        for trip in self._trips:
            if trip.loading == PLAIN != trip.saving and isinstance(seen[trip.loop, trip.model, trip.saving], Seen):
                path = self._path(trip.loop, trip.model, trip.saving)
                write_plain_file(path, path.with_suffix(".file"))
        return seen

    @functools.cached_property
    def _worlds(self) -> dict[Trip, dict[Trip, Run]]:
        able = [one for one in self._trips if isinstance(self._saved[one.loop, one.model, one.saving], Seen)]
        worlds = _worlds({one: Run(one.loop, one.model, one.loading, load=self._source(one)) for one in able})
        return {trip: world for world in worlds for trip in world}

    def saved(self, trip: Trip) -> Seen:
        """Return what the run of a trip held that has saved.

        Raises:
            RankFailure: it did not come so far.
        """
        return _or_raise(self._saved[trip.loop, trip.model, trip.saving])

    def loaded(self, trip: Trip) -> Seen:
        """Return what the run of a trip held that has loaded.

        Raises:
            RankFailure: it did not come so far.
        """
        if trip not in self._loaded:
            self._loaded.update(_run_together(self._worlds[trip]))
        return _or_raise(self._loaded[trip])

    @functools.cache  # noqa: B019 - lives as long as the session
    def through(self, model: Model) -> Values:
        """Return what one plain process holds that trains both epochs without a stop."""
        first = self._folder / f"through-{model}.ckpt"
        runs = [Run("trainer", model, PLAIN, save=first), Run("trainer", model, PLAIN, load=first)]
        return run_ranks(_run_all, 1, runs, timeout=TIMEOUT_SECONDS)[0][1].end

    def _path(self, loop: Loop, model: Model, layout: Layout) -> Path:
        return self._folder / f"{model}-{loop}-{layout}.ckpt"

    def _source(self, trip: Trip) -> Path:
        path = self._path(trip.loop, trip.model, trip.saving)
        return path.with_suffix(".file") if trip.loading == PLAIN != trip.saving else path


def _worlds(runs: dict[Any, Run]) -> Iterator[dict[Any, Run]]:
    """Divide runs by the ranks they need; plain runs go by themselves, since they need none."""

    def kind(key: Any) -> tuple[int, bool]:
        return runs[key].layout.ranks, runs[key].layout.stage is None

    for _, group in itertools.groupby(sorted(runs, key=kind), key=kind):
        keys = list(group)
        for start in range(0, len(keys), RUNS_PER_WORLD):
            yield {key: runs[key] for key in keys[start : start + RUNS_PER_WORLD]}


def _run_together(runs: dict[Any, Run]) -> dict[Any, Seen | RankFailure]:
    ranks = next(iter(runs.values())).layout.ranks
    try:
        results = run_ranks(_run_all, ranks, list(runs.values()), timeout=TIMEOUT_SECONDS)
    except RankFailure as failure:
        # Where one of them brings the others down, each runs by itself.
        if len(runs) == 1:
            return dict.fromkeys(runs, failure)
        return {key: seen for one in runs for key, seen in _run_together({one: runs[one]}).items()}
    return dict(zip(runs, results[-1], strict=True))


def _or_raise(seen: Seen | RankFailure) -> Seen:
    if isinstance(seen, RankFailure):
        raise seen
    return seen
