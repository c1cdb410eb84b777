from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tests.unit.callbacks.support import Module, tokens, trainer

from meshbolt.callbacks.monitoring import Monitor
from meshbolt.errors import ConfigError
from meshbolt.monitoring import Value, latest_run, read_records

NAME = "throughput/samples_per_second"


class Watcher(Monitor):
    """Logs the step, under a name that is in the catalogue."""

    kind = "throughput"
    name = NAME

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.is_due(trainer.global_step):
            value: Value = float(trainer.global_step)
            self.report(trainer, {self.name: value})


class Other(Watcher):
    """Another monitor of the same run."""


def fit(monitors: list[pl.Callback], module: pl.LightningModule | None = None, **options: Any) -> pl.Trainer:
    fitting = trainer(callbacks=monitors, enable_progress_bar=False, **options)
    fitting.fit(module or Module(), tokens(6), tokens(1))
    return fitting


def test_values_go_to_the_records_every_so_many_steps_without_a_logger(tmp_path: Path) -> None:
    fit([Watcher(every=2)], default_root_dir=tmp_path)
    records = list(read_records(tmp_path / "meshbolt_records"))
    assert [(each["step"], each["kind"], each["values"]) for each in records] == [
        (step, "throughput", {NAME: step}) for step in (2, 4, 6)
    ]


def test_loggers_hear_of_them_under_the_step_of_what_the_module_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit([Watcher(every=2)], logger=logger, log_every_n_steps=2)
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index(NAME)
    assert [line.split(",")[column] for line in lines[1:]].count("") < len(lines) - 1
    assert Path(logger.log_dir, "meshbolt_records", "rank_0.jsonl").is_file()


def test_monitors_of_one_trainer_write_to_one_file(tmp_path: Path) -> None:
    monitors = [Watcher(every=3), Other(every=3)]
    fit(monitors, default_root_dir=tmp_path)
    records = list(read_records(tmp_path / "meshbolt_records"))
    assert len(records) == 4
    assert len({each["run"] for each in records}) == 1
    assert all(each.records is None for each in monitors), "closed with the run"


def test_a_second_run_in_the_same_directory_is_told_from_the_first(tmp_path: Path) -> None:
    for _ in range(2):
        fit([Watcher(every=6)], default_root_dir=tmp_path)
    records = list(read_records(tmp_path / "meshbolt_records"))
    assert len(records) == 2
    assert latest_run(records) == records[1:]


def test_records_go_where_they_are_told_to(tmp_path: Path) -> None:
    fit([Watcher(every=6, directory=tmp_path / "here")], default_root_dir=tmp_path)
    assert [each["step"] for each in read_records(tmp_path / "here")] == [6]


def test_the_same_monitor_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2 callbacks of Watcher.*Keep one"):
        fit([Watcher(), Watcher()], default_root_dir=tmp_path)


def test_a_directory_that_cannot_be_written_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    module = Module()
    weight = module.out.weight.detach().clone()
    with pytest.raises(ConfigError, match="cannot be written"):
        fit([Watcher(directory=tmp_path / "file")], module)
    assert torch.equal(weight, module.out.weight)


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_an_interval_that_is_no_number_of_steps_is_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="every="):
        Watcher(every=every)


def test_a_name_that_is_not_in_the_catalogue_is_an_error(tmp_path: Path) -> None:
    watcher = Watcher(every=1)
    watcher.name = "throughput/nonsense"
    with pytest.raises(ConfigError, match="not in the catalogue"):
        fit([watcher], default_root_dir=tmp_path)


def test_a_name_that_the_module_logs_is_said_once_and_stays_in_the_records(tmp_path: Path) -> None:
    class Logs(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.log(NAME, 1.0)
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([Watcher(every=2)], Logs(), logger=logger, log_every_n_steps=1)
    said = [str(each.message) for each in caught if "so does Watcher" in str(each.message)]
    assert len(said) == 1
    lines = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    assert {line[lines[0].index(NAME)] for line in lines[1:]} - {""} == {"1.0"}
    assert len(list(read_records(Path(logger.log_dir, "meshbolt_records")))) == 3


def test_a_logger_that_fails_does_not_hide_what_ended_the_fit(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                raise RuntimeError("enough")
            return super().training_step(batch, batch_idx)

    class Full(CSVLogger):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
            raise OSError("no space left")

    with pytest.raises(RuntimeError, match="enough"):
        fit([Watcher(every=1)], Fails(), logger=Full(tmp_path), log_every_n_steps=6)
