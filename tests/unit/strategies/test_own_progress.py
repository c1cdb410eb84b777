"""Which progress bar a Trainer ends up with; the run itself is that of any other test."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from tests.unit.callbacks.support import Module

from meshbolt import MeshStrategy
from meshbolt.callbacks import LogProgress
from meshbolt.strategies.own_progress import OwnProgress


class Parent:
    """What stands behind in the bases, without ranks."""

    def _configure_launcher(self) -> None:
        pass

    def connect(self, model: pl.LightningModule) -> None:
        self._user_module = model

    def setup_environment(self) -> None:
        pass


class Only(OwnProgress, Parent):
    default_progress_bar = LogProgress


class Trainer(pl.Trainer):
    """Asks the strategy at the moment that its own constructor has one, as for a strategy of meshbolt."""

    def __init__(self, **options: Any) -> None:
        self.only = Only()
        super().__init__(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **options)

    def bar_of_run(self, module: pl.LightningModule) -> ProgressBar | None:
        """As far as `fit` goes until the bar is told of the run."""
        module.trainer = self
        self.strategy._lightning_module = module
        self.only.connect(module)
        self._callback_connector._attach_model_callbacks()
        self.only.setup_environment()
        (bar,) = [each for each in self.callbacks if isinstance(each, ProgressBar)] or [None]
        return bar

    @property
    def _accelerator_connector(self) -> Any:
        return self.__dict__["_accelerator_connector"]

    @_accelerator_connector.setter
    def _accelerator_connector(self, connector: Any) -> None:
        self.__dict__["_accelerator_connector"] = connector
        self.only._configure_launcher()


def test_the_bar_that_lightning_chose_is_exchanged() -> None:
    trainer = Trainer()
    assert type(trainer.progress_bar_callback) is RichProgressBar

    assert type(trainer.bar_of_run(Module())) is LogProgress


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
@pytest.mark.parametrize("in_list", [True, False])
def test_a_bar_that_was_asked_for_stays(kind: type[ProgressBar], in_list: bool) -> None:
    bar = kind()
    trainer = Trainer(callbacks=[bar] if in_list else bar)

    assert trainer.bar_of_run(Module()) is bar


def test_where_bars_are_switched_off_there_is_none() -> None:
    assert Trainer(enable_progress_bar=False).bar_of_run(Module()) is None


def test_a_bar_that_the_module_brings_along_stays() -> None:
    class Own(RichProgressBar):
        pass

    class WithBar(Module):
        def configure_callbacks(self) -> list[pl.Callback]:
            return [Own()]

    assert type(Trainer().bar_of_run(WithBar())) is Own


def test_a_bar_that_was_added_to_the_trainer_later_is_not_exchanged() -> None:
    trainer = Trainer()
    trainer.callbacks.append(TQDMProgressBar())
    module = Module()
    module.trainer = trainer
    trainer.only.connect(module)
    trainer.only.setup_environment()

    assert [type(each) for each in trainer.callbacks if isinstance(each, ProgressBar)] == [
        RichProgressBar,
        TQDMProgressBar,
    ]


def test_a_list_of_callbacks_that_is_used_twice_does_not_pass_lightnings_bar_on_as_the_users() -> None:
    callbacks: list[Any] = [pl.callbacks.EarlyStopping("loss")]
    assert type(Trainer(callbacks=callbacks).bar_of_run(Module())) is LogProgress
    assert any(type(each) is RichProgressBar for each in callbacks), "Lightning adds its bar to the list it was given"

    assert type(Trainer(callbacks=callbacks).bar_of_run(Module())) is LogProgress


def test_the_strategy_of_the_trainer_has_meshbolts_bar() -> None:
    assert MeshStrategy.default_progress_bar is LogProgress
    assert issubclass(MeshStrategy, OwnProgress)
