"""The parity matrix as data: what is trained, under which plan, and which rows of their product are run.

A new feature adds one entry to `FEATURES`; the rows, the seeded selection of `make test` and the table in `docs/parity.md`
follow from it.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from tests.parity import models
from torch import nn

from meshbolt import Zero
from meshbolt.engine.optimizer import ELEMENTWISE
from meshbolt.plugins import MeshPrecision, MixedPrecision
from meshbolt.testing.parity.case import Case

# Arguments of the optimizers; those without an entry take lr alone.
_OPTIMIZER_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
}
# torch's kernels for CPUs round differently in the last elements of a tensor, and a shard ends elsewhere than the whole. Where
# weights are used in 16 bits, such a difference in the last digit may decide which way one of them is rounded. These settings
# leave nothing to round twice.
_EXACT_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "SGD": {"lr": 1 / 32, "momentum": 0.875},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1, "fused": True},
}
OPTIMIZERS = tuple(sorted(kind.__name__ for kind in ELEMENTWISE))


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One thing that a module may have.

    Attributes:
        name: short; in test names and in the table.
        words: what the row proves, for the table.
        network: makes the network.
        task: the LightningModule around it.
        batch: draws a batch.
        arguments: further arguments of `MeshStrategy`.
        unit: classes whose instances are units; none: they are found.
        late: the network is made in `configure_model`, on the meta device.
        loops: who can run it.
        samples: the data are a dataset of samples, divided among ranks by Lightning's sampler.
    """

    name: str
    words: str
    network: Callable[[], nn.Module] = models.Plain
    task: Callable[..., models.Task] = models.Task
    batch: Callable[[torch.Generator], models.Batch] = models.numbers
    arguments: Mapping[str, Any] = field(default_factory=dict)
    unit: tuple[str, ...] = ()
    late: bool = False
    loops: tuple[str, ...] = ("trainer", "fabric")
    samples: bool = False


FEATURES: Mapping[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature(name="plain", words="repeated blocks between layers of the root, all of uneven shapes"),
        Feature(name="sampler", words="a dataset divided among ranks by Lightning's sampler", samples=True),
        Feature(
            name="small",
            words="parameters without dimensions, and with fewer rows than ranks",
            network=models.SmallShapes,
        ),
        Feature(name="tied", words="one weight in two layers, and one in two blocks", network=models.Tied),
        Feature(name="frozen", words="frozen layers, blocks, and parts of blocks", network=models.Frozen),
        Feature(name="unused", words="parameters and blocks that no batch uses", network=models.Unused),
        Feature(name="shared", words="a block and a layer called twice in a forward", network=models.Shared),
        Feature(
            name="sometimes",
            words="a block that some batches leave out, and blocks whose order changes",
            network=models.Sometimes,
            task=models.SometimesTask,
        ),
        Feature(
            name="nested",
            words='units inside of units, `Zero(unit=["Attention", "Block"])`',
            network=models.Gpt,
            batch=models.tokens,
            unit=("Attention", "Block"),
        ),
        Feature(name="batchnorm", words="BatchNorm; its statistics stay the rank's own", network=models.Normalised),
        Feature(name="dropout", words="dropout, from the rank's own random state", network=models.Dropped),
        Feature(name="dtypes", words="float64 layers and blocks among float32 ones", network=models.MixedDtypes),
        Feature(name="groups", words="parameter groups with settings of their own", task=models.GroupedTask),
        Feature(
            name="schedule",
            words="a learning rate that changes with every step",
            task=models.ScheduledTask,
            loops=("trainer",),
        ),
        Feature(name="apart", words="weights that differ between ranks before the start", task=models.ApartTask),
        Feature(name="full", words='`recompute="full"`', network=models.Dropped, arguments={"recompute": "full"}),
        Feature(
            name="selective",
            words='`recompute="selective"`',
            network=models.Gpt,
            batch=models.tokens,
            arguments={"recompute": "selective"},
        ),
        Feature(name="late", words="built in `configure_model`, without weights until it is sharded", late=True),
        Feature(
            name="gpt",
            words="a transformer over tokens, its head tied to its embedding",
            network=models.Gpt,
            batch=models.tokens,
        ),
    )
}

STRATEGIES: Mapping[str, Zero] = {
    **{f"zero{stage}": Zero(stage=stage) for stage in range(4)},
    **{f"hsdp{stage}": Zero(stage=stage, replicate=2) for stage in (1, 2, 3)},
}
PRECISIONS: Mapping[str, str | Callable[[], MeshPrecision]] = {
    "64-true": "64-true",
    "32-true": "32-true",
    "bf16-mixed": "bf16-mixed",
    "bf16-mixed without autocast": functools.partial(MixedPrecision, "bf16-mixed", "cpu", autocast=False),
    "16-mixed": functools.partial(MixedPrecision, "16-mixed", "cpu", init_scale=2.0**10),
    "16-mixed without autocast": functools.partial(
        MixedPrecision, "16-mixed", "cpu", autocast=False, init_scale=2.0**10
    ),
    "bf16-true": "bf16-true",
}
CLIPS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "norm": {"gradient_clip_val": 0.5},
    "value": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
}
WINDOWS = (1, 3)
LOOPS = ("trainer", "fabric")
STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison, in words of the tables above."""

    feature: str
    strategy: str
    precision: str
    ranks: int
    window: int = 1
    clip: str = "none"
    optimizer: str = "SGD"
    loop: str = "trainer"

    def __str__(self) -> str:
        """Return the row as a test id."""
        words = [f"w{value}" if key == "window" else str(value) for key, value in asdict(self).items()]
        return "-".join(words).replace(" without autocast", "_no_autocast")

    def case(self) -> Case:
        """Return the comparison that the row stands for."""
        feature = FEATURES[self.feature]
        return Case(
            module=functools.partial(_task, self.feature, self.optimizer, exact="16" in self.precision),
            data=_data(self.feature, STEPS * self.window * self.ranks),
            strategy={"zero": self.zero(), **feature.arguments},
            ranks=self.ranks,
            steps=STEPS,
            loop=self.loop,  # type: ignore[arg-type]
            precision=PRECISIONS[self.precision],
            accumulate_grad_batches=self.window,
            **CLIPS[self.clip],
        )

    def zero(self) -> Zero:
        """Return how the row's ranks divide the module."""
        unit = FEATURES[self.feature].unit
        return replace(STRATEGIES[self.strategy], unit=list(unit)) if unit else STRATEGIES[self.strategy]

    def reference(self) -> Row:
        """Return a row that has the same reference in one process: that does not look at the strategy or the loop."""
        # Where weights are used in 16 bits, it follows the order in which gradients are added up.
        rounded = "16" in self.precision and self.strategy in ("zero2", "zero3")
        return replace(self, strategy="zero2" if rounded else "zero0", loop="trainer")


def _task(feature: str, optimizer: str, *, exact: bool) -> models.Task:
    wanted = FEATURES[feature]
    arguments = (_EXACT_ARGUMENTS if exact else _OPTIMIZER_ARGUMENTS).get(optimizer, {"lr": 1e-2})
    make = functools.partial(_optimizer, optimizer, arguments)
    return wanted.task(wanted.network, make, late=True) if wanted.late else wanted.task(wanted.network, make)


def _optimizer(name: str, arguments: Mapping[str, Any], parameters: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = getattr(torch.optim, name)(parameters, **arguments)
    # Lightning's own fp16 plugin, in the one process, does not clip for an optimizer that says it unscales by itself.
    made._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return made


@functools.cache
def _data(feature: str, count: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    batches = [FEATURES[feature].batch(generator) for _ in range(count)]
    if not FEATURES[feature].samples:
        return batches
    return torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


# Rows -------------------------------------------------------------------------------------------------------------------


def core_rows() -> Iterable[Row]:
    """Yield the whole product of plans on one module, which has what shards unevenly."""
    rotating = itertools.cycle(("SGD", "AdamW"))
    for strategy, window, clip, precision, loop in itertools.product(STRATEGIES, WINDOWS, CLIPS, PRECISIONS, LOOPS):
        for ranks in _worlds(strategy):
            yield Row(
                feature="small",
                strategy=strategy,
                precision=precision,
                ranks=ranks,
                window=window,
                clip=clip,
                optimizer=next(rotating),
                loop=loop,
            )


def feature_rows() -> Iterable[Row]:
    """Yield every feature under every strategy and precision; the rest of the plan takes turns."""
    turns = itertools.cycle(itertools.product(WINDOWS, CLIPS, ("SGD", "AdamW"), LOOPS, range(3)))
    for feature, strategy, precision in itertools.product(FEATURES.values(), STRATEGIES, PRECISIONS):
        for _ in range(5):  # 5 and the 72 turns have no common divisor: every turn is taken
            window, clip, optimizer, loop, world = next(turns)
        worlds = _worlds(strategy)
        yield Row(
            feature=feature.name,
            strategy=strategy,
            precision=precision,
            ranks=worlds[world % len(worlds)],
            window=window,
            clip=clip,
            optimizer=optimizer,
            loop=loop if loop in feature.loops else feature.loops[0],
        )


def optimizer_rows() -> Iterable[Row]:
    """Yield every optimizer that runs on shards, under every strategy."""
    for optimizer, strategy in itertools.product(OPTIMIZERS, STRATEGIES):
        yield Row(
            feature="small", strategy=strategy, precision="64-true", ranks=_worlds(strategy)[-1], optimizer=optimizer
        )


def _worlds(strategy: str) -> tuple[int, ...]:
    return (4,) if strategy.startswith("hsdp") else (2, 3, 4)


def all_rows() -> tuple[Row, ...]:
    """Return every row once."""
    return tuple(dict.fromkeys(map(_comparable, [*core_rows(), *feature_rows(), *optimizer_rows()])))


def _comparable(row: Row) -> Row:
    """Return the row, or one that runs and whose roundings one process can follow.

    torch reduces a unit's gradients after each of its calls, so that stages 0 and 1 reduce a window in two parts where a
    unit is called twice. The sum is the same, but `bf16-true` rounds each part.
    """
    twice = row.feature == "shared" and row.precision == "bf16-true"
    # Replicas of stages 2 and 3 refuse a window whose batches use different parameters (see docs/stages.md).
    refused = row.feature == "sometimes" and row.strategy in ("hsdp2", "hsdp3")
    return replace(row, window=1) if twice or refused else row


def selected_rows(rows: Iterable[Row], *, count: int, seed: int) -> frozenset[Row]:
    """Return a seeded selection that has every value of every column, and every feature under every strategy.

    Args:
        rows: to select from.
        count: how many, where the above needs fewer.
        seed: of the selection.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    seen: set[Any] = set()
    chosen: list[Row] = []
    for row in shuffled:
        shown = {(key, value) for key, value in asdict(row).items()} | {
            (row.strategy, row.precision),
            (row.feature, row.strategy.startswith("hsdp")),
            (row.strategy, row.loop, row.window),
            (row.strategy, row.clip),
            (row.precision, row.clip),
            (row.precision, row.loop),
        }
        if shown - seen:
            chosen.append(row)
            seen |= shown
    rest = (row for row in shuffled if row not in set(chosen))
    chosen.extend(itertools.islice(rest, max(0, count - len(chosen))))
    return frozenset(chosen)
