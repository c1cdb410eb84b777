"""The proof that users run on their own module."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import lightning.pytorch as pl
import torch.distributed as dist
from typing_extensions import Unpack

from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.testing.outcomes import RankFailure
from meshbolt.testing.parity.case import Case, Data, Loop, ModuleFactory, Strategy
from meshbolt.testing.parity.in_fabric import run_fabric
from meshbolt.testing.parity.in_trainer import run_trainer
from meshbolt.testing.parity.loaders import seed
from meshbolt.testing.parity.record import Record
from meshbolt.testing.parity.reference import run_reference
from meshbolt.testing.parity.report import ParityError, ParityReport, compare, limits_for
from meshbolt.testing.ranks import run_ranks
from meshbolt.zero import Zero


class TrainerArguments(TypedDict, total=False):
    """The arguments of a Trainer that a comparison can be made with; `Case` says what they mean."""

    precision: Any
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: Any


def assert_parity(
    module: pl.LightningModule | ModuleFactory,
    data: Data,
    strategy: Strategy,
    *,
    ranks: int,
    steps: int = 5,
    batch_size: int = 4,
    loop: Loop = "trainer",
    timeout: float = 60,
    **trainer: Unpack[TrainerArguments],
) -> ParityReport:
    """Check that a module trains under a strategy on several ranks as it trains in one process.

    The ranks are forked on this machine and meet over gloo, on CPUs. The one process sees the same samples in the same
    batches: for each optimizer step it takes the mean, over the ranks, of the gradients of their losses, with parameters
    whole and nothing communicated. Each rank's random generators and buffers (BatchNorm's statistics) are followed.
    Compared are the losses of every batch, the gradients of every step before clipping, and parameters, optimizer state
    and buffers after the last step.

    Args:
        module: a module, which is left as it is, or a function that makes one. It optimizes automatically, and its data
            do not depend on the rank.
        data: a map-style dataset of samples that are the same whenever they are asked for, or a list of batches, in the
            order (window, batch of the window, rank).
        strategy: "zero2" or another preset, a dictionary of the arguments of `MeshStrategy`, or a function that makes one.
        ranks: number of ranks.
        steps: number of optimizer steps.
        batch_size: samples per batch on each rank, where `data` is a dataset.
        loop: "trainer", or "fabric" for a plain Fabric loop around `training_step` and the one optimizer of
            `configure_optimizers`.
        timeout: seconds that a collective waits for its peers.
        trainer: `precision` (a flag, or a function that makes one of `meshbolt.plugins`), `accumulate_grad_batches`,
            `gradient_clip_val` and `gradient_clip_algorithm`, as the Trainer has them.

    Returns:
        The comparison; `print` shows it as a table.

    Raises:
        ParityError: it does not; the message names what differs most, with both values.
        RankFailure: a rank raised an error.
        ConfigError: the arguments make no sense together, or the strategy refuses its own.
        UnsupportedError: the module optimizes manually, or has what the strategy cannot train.

    Example:
        >>> print(assert_parity(MyModule(), my_dataset, "zero3", ranks=2, accumulate_grad_batches=2))
    """
    if isinstance(module, pl.LightningModule):
        module = functools.partial(copy.deepcopy, module)
    case = Case(
        module=module,
        data=data,
        strategy=strategy,
        ranks=ranks,
        steps=steps,
        batch_size=batch_size,
        loop=loop,
        **trainer,
    )
    meshed = meshed_records([case], timeout=timeout)[0]
    reference = reference_records([(case, meshed.zero)], timeout=timeout)[0]
    return check(case, meshed, reference)


def check(case: Case, meshed: Record, reference: Record) -> ParityReport:
    """Compare two records of a case.

    Raises:
        ParityError: they differ.
    """
    plugin = case.plugin()
    flag = str(case.precision if plugin is None else plugin.precision)
    report = compare(meshed, reference, limits=limits_for(flag, reference))
    if report.differences:
        words = f"strategy={case.strategy!r} on {case.ranks} ranks with precision={flag!r} in a {case.loop} loop"
        raise ParityError(report, case=words)
    return report


def meshed_records(cases: Sequence[Case], *, timeout: float) -> list[Record]:
    """Run cases of one number of ranks, one after the other on the same ranks, and return what the ranks saw.

    Args:
        cases: to run.
        timeout: seconds that a collective waits for its peers.
    """
    by_rank = _run_ranks(_all_meshed, cases[0].ranks, cases, timeout=timeout)
    records = []
    for parts in zip(*by_rank, strict=True):
        whole: Record = parts[0]
        for part in parts[1:]:
            whole.add(part)
        records.append(whole)
    return records


def reference_records(cases: Sequence[tuple[Case, Zero]], *, timeout: float) -> list[Record]:
    """Run the references of cases, one after the other in one process.

    Args:
        cases: each with how its ranks divide the module.
        timeout: seconds for all of them.
    """
    return _run_ranks(_all_references, 1, cases, timeout=timeout)[0]


def _run_ranks(fn: Callable[..., list[Record]], n: int, cases: Sequence[Any], *, timeout: float) -> list[list[Record]]:
    try:
        return run_ranks(fn, n, cases, timeout=timeout)
    except RankFailure as failure:
        for kind in (ConfigError, UnsupportedError):
            if all(outcome.raised(kind) for outcome in failure.outcomes):
                raise kind(failure.outcomes[0].message) from failure
        raise


def _all_meshed(cases: Sequence[Case]) -> list[Record]:
    records = [_run(case) for case in cases]
    # Whole tensors are the same on every rank that has them, and travel once.
    return [
        record if case.has_whole_tensors(dist.get_rank()) else Record(losses=record.losses, buffers=record.buffers)
        for case, record in zip(cases, records, strict=True)
    ]


def _run(case: Case) -> Record:
    _hush()
    seed(case.seed)
    return run_trainer(case) if case.loop == "trainer" else run_fabric(case)


def _all_references(cases: Sequence[tuple[Case, Zero]]) -> list[Record]:
    _hush()
    return [run_reference(case, zero=zero) for case, zero in cases]


def _hush() -> None:
    """Keep Lightning's notes on hardware and versions out of the test's output."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
