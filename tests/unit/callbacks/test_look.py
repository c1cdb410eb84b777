"""A step that is looked at gives its operations, and leaves no trace in the run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from tests.unit.callbacks.support import Module, tokens, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric

from meshbolt.callbacks.look import MAX_FORMS, FlopsOfBatches, Look
from meshbolt.errors import UnsupportedError
from meshbolt.monitoring.flops import Flops

# Embedding 10 x 4, then Linear(4, 1): for each token, 4 weights, twice forwards and four times backwards.
PER_TOKEN = 6 * 4


class Busy(Module):
    """Draws, counts, normalises, measures, and keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.metric = nn.BatchNorm1d(4), nn.Dropout(0.5), MeanMetric()
        self.seen: list[int] = []
        self.steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch_idx)
        self.steps += 1
        x = self.drop(self.norm(self.embedding(batch[0]).flatten(0, 1)))
        loss = (self.out(x) * torch.rand(())).square().mean()
        self.metric.update(loss)
        self.log("loss", loss)
        return loss


class Looking(pl.Callback):
    """Looks at each batch before it is trained on."""

    def __init__(self) -> None:
        self.found: list[Flops] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look = Look(pl_module, None)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.found.append(self.look.flops(trainer, batch, batch_idx))


def fit(module: pl.LightningModule, *callbacks: pl.Callback) -> pl.Trainer:
    torch.manual_seed(3)
    fitting = trainer(callbacks=list(callbacks), enable_progress_bar=False)
    fitting.fit(module, tokens(4), tokens(1))
    return fitting


def test_a_run_that_is_looked_at_is_the_same_run() -> None:
    torch.manual_seed(2)
    plain = Busy()
    torch.manual_seed(2)
    looked_at, looking = Busy(), Looking()
    logged = fit(plain).callback_metrics
    assert fit(looked_at, looking).callback_metrics == logged

    assert all(torch.equal(value, looked_at.state_dict()[key]) for key, value in plain.state_dict().items())
    assert (looked_at.seen, looked_at.steps) == (plain.seen, plain.steps) == ([0, 1, 2, 3], 4)
    assert torch.equal(looked_at.metric.mean_value, plain.metric.mean_value)
    assert vars(looked_at).keys() == vars(plain).keys()
    assert [each.model for each in looking.found] == [PER_TOKEN * 10] * 4


def test_gradients_and_parameters_of_the_run_are_not_touched() -> None:
    module, looking = Module(), Looking()
    before = dict(module.named_parameters())
    fit(module, looking)
    assert all(each is before[name] for name, each in module.named_parameters())


class Recomputes(Module):
    """Recomputes a part by itself."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        def part(x: Tensor) -> Tensor:
            return self.out(x).square()

        return checkpoint(part, self.embedding(batch[0]), use_reentrant=False).mean()


def test_recomputation_of_the_users_is_the_hardwares_alone() -> None:
    looking = Looking()
    fit(Recomputes(), looking)
    assert looking.found[0] == Flops(
        model=PER_TOKEN * 10, model_causal=PER_TOKEN * 10, hardware=PER_TOKEN * 10 + 2 * 4 * 10
    )


def test_what_is_frozen_takes_no_gradient() -> None:
    module, looking = Module(), Looking()
    module.embedding.requires_grad_(False)
    fit(module, looking)
    assert looking.found[0].model == 4 * 4 * 10


def test_a_compiled_part_is_counted_as_it_is_written() -> None:
    class Compiled(Module):
        def __init__(self) -> None:
            super().__init__()
            self.out.compile(backend="eager")

    looking = Looking()
    fit(Compiled(), looking)
    assert looking.found[0].model == PER_TOKEN * 10


class Reads(Module):
    """Branches on a value that depends on its parameters."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if loss.item() > 0 else loss * 2


class Manual(Module):
    """Takes its steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = self.out(self.embedding(batch[0])).square().mean()
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()


class Nothing(Module):
    """Multiplies no matrices."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.embedding(batch[0]).square().mean()


class _Clock:
    def __init__(self) -> None:
        self.phases: list[str] = []

    def begin(self, phase: str) -> None:
        self.phases.append(phase)


class Counting(pl.Callback):
    """Counts the operations of batches, as a monitor does."""

    def __init__(self, given: Any = None) -> None:
        self.given, self.found, self.clock = given, list[Flops | None](), _Clock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.counted = FlopsOfBatches(Look(pl_module, None), given=self.given)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.counted.count(trainer, batch, batch_idx, around=self.clock)
        self.found.append(self.counted.take())


@pytest.mark.parametrize(
    ("module", "why"), [(Reads, "reads a value"), (Manual, "manual optimisation"), (Nothing, "no matrix products")]
)
def test_a_step_whose_operations_cannot_be_counted_is_said_once_and_trains(module: type[Module], why: str) -> None:
    counting = Counting()
    fitted = module()
    before = fitted.embedding.weight.detach().clone()
    with pytest.warns(UserWarning, match=rf"(?s)no MFU.*{why}.*ThroughputMonitor\(flops="):
        fit(fitted, counting)
    assert counting.found == [None] * 4
    assert counting.clock.phases == ["pause", "between"], "looked at once"
    assert not torch.equal(before, fitted.embedding.weight)


def test_a_module_that_never_was_whole_here_is_not_looked_at() -> None:
    class Elsewhere(Counting):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.counted = FlopsOfBatches(None, given=None)

    counting = Elsewhere()
    with pytest.warns(UserWarning, match="SingleDeviceStrategy may hold the module in parts"):
        fit(Module(), counting)
    assert counting.found == [None] * 4


def test_what_the_user_gives_is_taken_and_nothing_is_looked_at() -> None:
    counting = Counting(given=lambda batch: 100 * batch[0].numel())
    fit(Manual(), counting)
    assert [each.model for each in counting.found if each] == [1000.0] * 4
    assert counting.clock.phases == []


def test_each_form_of_batch_is_looked_at_once_and_beyond_many_a_near_one_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = 0

    class Counted(Look):
        def flops(self, trainer: Any, batch: Any, batch_idx: int) -> Flops:
            nonlocal looks
            looks += 1
            return Flops(model=6.0 * batch.numel())

    counted = FlopsOfBatches(Counted(Module(), None), given=None)
    far, near = range(1, MAX_FORMS + 5), range(1000, 1030)
    sizes = [*far, *near, 3, 3]
    for size in sizes:
        counted.count(None, torch.zeros(size), 0, around=_Clock())  # type: ignore[arg-type]
    step = counted.take()
    assert step is not None
    assert step.model == pytest.approx(6 * sum(sizes))
    assert looks == len(far) + 1  # of those that are near each other, one


def test_a_step_that_asks_other_ranks_is_refused_before_it_waits(tmp_path: Any) -> None:
    class Asks(Module):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            """Log nothing."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            dist.all_reduce(torch.ones(()))
            return super().training_step(batch, batch_idx)

    class Expecting(Looking):
        def on_train_batch_start(self, *args: Any) -> None:
            with pytest.raises(UnsupportedError, match="communicates by itself"):
                super().on_train_batch_start(*args)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fit(Asks(), Expecting())
    finally:
        dist.destroy_process_group()
