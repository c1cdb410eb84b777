"""If these fail, a run ends without its report, or with one that leaves out what happened."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.unit.callbacks.support import Module, tokens, trainer

from meshbolt import ConfigError
from meshbolt.callbacks import RunReport
from meshbolt.callbacks.surroundings import _without_secrets, surroundings
from meshbolt.callbacks.warned import Warned
from meshbolt.monitoring import read_records


def fit(path: Path, module: Any = None, *, batches: int = 6, report: RunReport | None = None, **options: Any) -> Any:
    fitting = trainer(default_root_dir=path, callbacks=[report or RunReport()], enable_progress_bar=False, **options)
    fitting.fit(module or Module(), tokens(batches), tokens(1))
    return fitting


def of_kind(path: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_records(path / "meshbolt_records") if record["kind"] == kind]


def test_a_fit_leaves_a_report_beside_its_records(tmp_path: Path) -> None:
    fit(tmp_path)
    page = (tmp_path / "report.html").read_text()

    assert "Module" in page
    assert "finished" in page
    assert "max_epochs=1 was reached" in page
    assert "Trainer(max_epochs=...)" in page


def test_every_step_is_recorded_once_with_what_was_logged_in_it(tmp_path: Path) -> None:
    losses = []

    class Noting(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss.detach()))
            return loss

    fit(tmp_path, Noting())
    found = {
        record["step"]: record["values"]["loss"]
        for record in of_kind(tmp_path, "metrics")
        if "loss" in record["values"]
    }

    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert list(found.values()) == pytest.approx(losses)


def test_what_validation_finds_is_recorded_once_at_its_step(tmp_path: Path) -> None:
    fit(tmp_path, val_check_interval=2, num_sanity_val_steps=2)
    steps = [record["step"] for record in of_kind(tmp_path, "metrics") if "val_loss" in record["values"]]

    assert steps == [2, 4, 6]


def test_a_mean_over_an_epoch_is_recorded_beside_the_values_of_steps(tmp_path: Path) -> None:
    class Both(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("both", float(batch_idx), on_step=True, on_epoch=True)
            self.log("whole", float(batch_idx), on_step=False, on_epoch=True)
            return loss

    fit(tmp_path, Both(), batches=4, max_epochs=2)
    records = of_kind(tmp_path, "metrics")

    def recorded(name: str) -> list[float]:
        return [record["values"][name] for record in records if name in record["values"]]

    assert recorded("both_step") == [0, 1, 2, 3, 0, 1, 2, 3]
    assert recorded("both_epoch") == [1.5, 1.5]
    assert recorded("whole") == [1.5, 1.5]
    assert recorded("both") == []


def test_of_a_window_of_batches_the_last_speaks(tmp_path: Path) -> None:
    fit(tmp_path, accumulate_grad_batches=3)

    assert [record["step"] for record in of_kind(tmp_path, "metrics") if "loss" in record["values"]] == [1, 2]


def test_an_interval_leaves_steps_out(tmp_path: Path) -> None:
    fit(tmp_path, report=RunReport(every=3), limit_val_batches=0)

    assert [record["step"] for record in of_kind(tmp_path, "metrics")] == [3, 6]


def test_an_error_is_in_the_report_with_all_that_was_before(tmp_path: Path) -> None:
    class Failing(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            if batch_idx == 3:
                raise ValueError("on <purpose>")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="purpose"):
        fit(tmp_path, Failing())
    page = (tmp_path / "report.html").read_text()

    assert "failed" in page
    assert "ValueError: on &lt;purpose&gt;" in page
    assert "raise ValueError" in page, "the traceback"
    assert of_kind(tmp_path, "metrics")[-1]["step"] == 3


def test_an_error_before_the_first_step_is_in_the_report_too(tmp_path: Path) -> None:
    class Failing(Module):
        def configure_optimizers(self) -> Any:
            raise RuntimeError("no optimizer")

    with pytest.raises(RuntimeError, match="no optimizer"):
        fit(tmp_path, Failing())

    assert "RuntimeError: no optimizer" in (tmp_path / "report.html").read_text()


def test_an_interruption_is_no_failure(tmp_path: Path) -> None:
    class Interrupted(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        fit(tmp_path, Interrupted())

    assert of_kind(tmp_path, "run")[-1]["values"]["status"] == "interrupted"


@pytest.mark.filterwarnings("default:told once")
def test_checkpoints_and_warnings_are_events(tmp_path: Path) -> None:
    class Talkative(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            warnings.warn("told once", stacklevel=1)
            logging.getLogger("somewhere").warning("logged once")
            return super().training_step(batch, batch_idx)

    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4)
    fitting = trainer(
        default_root_dir=tmp_path, callbacks=[RunReport(), saving], enable_progress_bar=False, enable_checkpointing=True
    )
    fitting.fit(Talkative(), tokens(6), tokens(1))
    events = [(record["values"]["what"], record["step"]) for record in of_kind(tmp_path, "event")]
    texts = [record["values"]["text"] for record in of_kind(tmp_path, "event")]

    assert ("checkpoint", 4) in events
    assert texts.count("UserWarning: told once") == 1
    assert texts.count("logged once") == 1


def test_warnings_are_shown_as_before_and_after_the_run_by_whom_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, heard = list[str](), list[str]()

    def show(message: Any, *_: Any, **__: Any) -> None:
        shown.append(str(message))

    monkeypatch.setattr(warnings, "showwarning", show)
    warned = Warned(heard.append)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for text in ("here", "here", "there"):
            warnings.warn(text, stacklevel=1)
    warned.close()

    assert heard == ["UserWarning: here", "UserWarning: there"]
    assert shown == ["here", "here", "there"]
    assert warnings.showwarning is show
    assert not any(type(each).__module__.endswith("warned") for each in logging.getLogger().handlers)


def test_a_second_fit_is_another_run_and_one_that_is_resumed_goes_on(tmp_path: Path) -> None:
    from meshbolt.monitoring.report import find_runs

    fitting = fit(tmp_path)
    fitting.save_checkpoint(tmp_path / "at_6.ckpt")
    fit(tmp_path)
    assert len(find_runs(tmp_path)) == 2

    resumed = trainer(default_root_dir=tmp_path, callbacks=[RunReport()], enable_progress_bar=False, max_epochs=2)
    resumed.fit(Module(), tokens(6), tokens(1), ckpt_path=tmp_path / "at_6.ckpt")
    (_, run) = find_runs(tmp_path)
    assert [attempt.first_step for attempt in run.attempts] == [0, 6]
    assert run.last_step == 12


def test_other_stages_than_fit_leave_no_report(tmp_path: Path) -> None:
    testing = trainer(default_root_dir=tmp_path, callbacks=[RunReport()], enable_progress_bar=False)
    testing.test(Module(), tokens(2), verbose=False)

    assert not (tmp_path / "report.html").exists()


def test_a_path_that_cannot_be_written_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="RunReport\\(path="):
        fit(tmp_path, report=RunReport(tmp_path / "file" / "report.html"))
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError, match="directory"):
        fit(tmp_path, report=RunReport(tmp_path / "directory"))


@pytest.mark.parametrize("step", [-1, True, 1.5, "3"])
def test_a_step_of_the_pipeline_that_is_none_is_refused(step: Any) -> None:
    with pytest.raises(ConfigError, match="pipeline_step="):
        RunReport(pipeline_step=step)


def test_what_may_be_a_password_is_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train.py", "--api_key", "abc", "--token=def", "--lr", "0.1", "--max_tokens=5"]
    monkeypatch.setenv("TORCHELASTIC_SECRET", "ghi")

    assert _without_secrets(words)[:3] == ["train.py", "--api_key", "(not shown)"]
    assert _without_secrets(words)[3] == "--token=(not shown)"
    assert "ghi" not in json.dumps(surroundings())
