from __future__ import annotations

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tests.unit.callbacks.support import Module, tokens, trainer

from meshbolt.callbacks import LogProgress


def test_a_log_file_tells_what_began_each_step_and_what_validation_found(capsys: pytest.CaptureFixture[str]) -> None:
    fitting = trainer(callbacks=[LogProgress(interval_seconds=0)], num_sanity_val_steps=-1)
    fitting.fit(Module(), tokens(3), tokens(1))
    lines = capsys.readouterr().out.splitlines()

    assert lines[0] == "validation | batch 1 of 1"
    assert lines[1].startswith("validation before training | val_loss ")
    assert lines[2] == "training with SingleDeviceStrategy on 1 × cpu"
    assert [line.split(" | ")[1] for line in lines[3:6]] == ["step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert "tokens/s" in lines[4]
    assert "peak memory" in lines[4]
    assert "loss" in lines[4]
    assert lines[7].startswith("validation at step 3 | loss ")
    assert "val_loss" in lines[7]
    assert lines[8].startswith("trained to step 3 in ")
    assert len(lines) == 9


def test_between_the_first_and_the_last_step_the_interval_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    fitting = trainer(callbacks=[LogProgress(interval_seconds=3600)])
    fitting.fit(Module(), tokens(20), tokens(1))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training |")]

    assert [line.split(" | ")[1] for line in shown] == ["step 1 of 20", "step 20 of 20"]


def test_it_takes_the_place_of_lightnings_bar() -> None:
    bar = LogProgress()

    assert trainer(callbacks=[bar]).progress_bar_callback is bar


def test_lightning_refuses_it_where_bars_are_switched_off() -> None:
    with pytest.raises(MisconfigurationException, match="LogProgress"):
        trainer(callbacks=[LogProgress()], enable_progress_bar=False)


def test_a_bar_that_is_disabled_says_nothing_until_it_is_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    bar = LogProgress(interval_seconds=0)
    bar.disable()
    module = Module()
    fitting = trainer(callbacks=[bar], max_epochs=1)
    fitting.fit(module, tokens(2), tokens(1))
    assert capsys.readouterr().out == ""

    bar.enable()
    fitting.validate(module, tokens(2), verbose=False)
    assert "validation | batch 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "shown"), [("test", "test | batch 2 of 2"), ("predict", "prediction | batch 2 of 2")]
)
def test_testing_and_predicting_show_their_batches(stage: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    running = trainer(callbacks=[LogProgress(interval_seconds=0)])
    getattr(running, stage)(Module(), tokens(2))

    assert shown in capsys.readouterr().out


def test_what_a_module_prints_comes_through(capsys: pytest.CaptureFixture[str]) -> None:
    class Talkative(Module):
        def on_train_start(self) -> None:
            self.print("hello", 3, sep="-")

    trainer(callbacks=[LogProgress()]).fit(Talkative(), tokens(1), tokens(1))

    assert "hello-3\n" in capsys.readouterr().out


def test_metrics_that_are_not_logged_for_the_bar_are_still_shown_after_validation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Silent(Module):
        def validation_step(self, batch: object, batch_idx: int) -> None:
            self.log("hidden", 1.5)

    trainer(callbacks=[LogProgress()]).validate(Silent(), tokens(1), verbose=False)

    assert "validation at step 0 | hidden 1.5000" in capsys.readouterr().out


def test_an_error_in_training_leaves_no_screen_open() -> None:
    class Failing(Module):
        def training_step(self, batch: object, batch_idx: int) -> None:
            raise ValueError("on purpose")

    bar = LogProgress()
    with pytest.raises(ValueError, match="on purpose"):
        trainer(callbacks=[bar]).fit(Failing(), tokens(1), tokens(1))

    assert bar._screen is None
