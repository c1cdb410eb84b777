"""A report of a run on ranks: all of them are in it, under every plan, and it costs a step nothing that others wait for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from tests.rows import full

from meshbolt import MeshStrategy
from meshbolt.callbacks import MemoryMonitor, OffloadMonitor, PipelineTimeline, RunReport, ThroughputMonitor
from meshbolt.demos import ByteGPT, PydocText
from meshbolt.errors import RankError
from meshbolt.monitoring.report import find_runs
from meshbolt.monitoring.report.gather import gather
from meshbolt.testing import run_ranks

PLANS = [
    pytest.param({"zero": 2}, id="dp2"),
    full({"zero": 0, "tensor_parallel": 2}, id="tp2"),
    pytest.param({"zero": 1, "pipeline_parallel": 2}, id="pp2"),
    full({"zero": 2, "offload": "cpu"}, id="offload"),
]
STEPS = 5
pytestmark = pytest.mark.filterwarnings(
    "ignore:It is recommended to use:lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Failing(ByteGPT):
    """Fails on one rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3 and self.trainer.global_rank == 1:
            raise ValueError("only here")
        return super().training_step(batch, batch_idx)


def fit(path: str, plan: dict[str, Any], kind: type[ByteGPT] = ByteGPT, own_timeline: bool = False) -> list[str]:
    monitors: list[pl.Callback] = [RunReport(), ThroughputMonitor(every=1), MemoryMonitor(every=1)]
    if plan.get("offload"):
        monitors.append(OffloadMonitor(every=1))
    if own_timeline:
        monitors.append(PipelineTimeline(f"{path}/step.svg", step=2))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=MeshStrategy(**plan),
        max_steps=STEPS,
        limit_val_batches=1,
        val_check_interval=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        callbacks=monitors,
    )
    trainer.fit(
        kind(dim=16, num_layers=4, num_heads=2, max_length=16), PydocText(length=16, batch_size=4, num_workers=0)
    )
    return sorted(str(each.relative_to(path)) for each in Path(path).rglob("*") if each.is_file())


@pytest.mark.parametrize("plan", PLANS)
def test_all_ranks_and_monitors_are_in_one_report(plan: dict[str, Any], tmp_path: Path) -> None:
    files, _ = run_ranks(fit, 2, str(tmp_path), plan)
    page, found = (tmp_path / "report.html").read_text(), gather(find_runs(tmp_path)[0])

    assert files == ["meshbolt_records/rank_0.jsonl", "meshbolt_records/rank_1.jsonl", "report.html"]
    assert found.ranks == [0, 1]
    assert [each.first for each in found.logged["train_loss"].stretches()] == [1, 2, 3, 4, 5]
    assert [each.first for each in found.logged["val_loss"].stretches()] == [2, 4]
    assert set(found.measured["memory/parameters_bytes"].ranks) == {0, 1}
    assert found.measured["throughput/step_seconds"].whole.num_values > 0
    for part in ("Rank 1", "Time of a step", "finished", "Mean times of each rank"):
        assert part in page
    assert ('id="pipeline"' in page) == ("pipeline_parallel" in plan)
    assert ('id="offload"' in page) == ("offload" in plan)
    assert page.count('class="lanes"') == (2 if "pipeline_parallel" in plan else 0)


def test_settings_tell_where_they_are_from(tmp_path: Path) -> None:
    run_ranks(fit, 2, str(tmp_path), {"zero": 1})
    settings = {name: (value, origin) for name, value, origin in gather(find_runs(tmp_path)[0]).run.start["settings"]}

    assert settings["zero.stage"] == ("1", "strategy: zero")
    assert settings["zero.replicate"] == ("1", "default")
    assert settings["trainer.max_steps"] == ("5", "Trainer(max_steps=...)")
    assert settings["recompute.mode"] == ("none", "default")


def test_a_rank_that_fails_is_in_the_report_that_rank_0_writes(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="only here"):
        run_ranks(fit, 2, str(tmp_path), {"zero": 1}, Failing)
    page = (tmp_path / "report.html").read_text()

    assert RankError.__name__ in page
    assert "ValueError: only here" in page
    assert "failed" in page


def test_a_step_that_another_callback_draws_is_measured_once(tmp_path: Path) -> None:
    run_ranks(fit, 2, str(tmp_path), {"zero": 1, "pipeline_parallel": 2}, ByteGPT, True)
    lines = (tmp_path / "meshbolt_records" / "rank_0.jsonl").read_text().splitlines()
    drawn = [record for record in map(json.loads, lines) if record["kind"] == "pipeline"]

    assert [record["step"] for record in drawn] == [2]
    assert {each["name"] for each in drawn[0]["timelines"]} == {"measured", "by its schedule"}
