"""`PipelineTimeline` measures a step of a pipeline on its ranks, and draws it beside the schedule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import lightning.pytorch as pl
import pytest

from meshbolt import MeshStrategy, PipelineParallel
from meshbolt.callbacks import PipelineTimeline
from meshbolt.demos import ByteGPT, PydocText
from meshbolt.errors import ConfigError
from meshbolt.testing import run_ranks

SVG = "{http://www.w3.org/2000/svg}"


class Steps(pl.Callback):
    """Notes at which steps there is a picture when a batch is over."""

    def __init__(self, path: str) -> None:
        self.path, self.seen = Path(path), list[bool]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.path.exists())


def fit(path: str, ranks: int, pipeline: PipelineParallel, step: int) -> list[bool]:
    pl.seed_everything(1, verbose=False)
    steps = Steps(path)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=MeshStrategy(zero=1, pipeline_parallel=pipeline),
        max_steps=3,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[PipelineTimeline(path, step=step), steps],
    )
    trainer.fit(
        ByteGPT(dim=16, num_layers=4, num_heads=2, max_length=16), PydocText(length=16, batch_size=4, num_workers=0)
    )
    return steps.seen


def told(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}title")]


def drawn(path: Path) -> tuple[list[str], Sequence[str]]:
    head, *passes = told(ElementTree.fromstring(path.read_text()))
    return head.split("; "), passes


@pytest.mark.parametrize(
    ("ranks", "pipeline"),
    [
        (2, PipelineParallel(2, microbatches=4)),
        (2, PipelineParallel(2, microbatches=2, schedule="interleaved_1f1b")),
    ],
    ids=["1f1b", "interleaved"],
)
def test_a_step_is_measured_on_all_ranks_and_drawn_beside_its_schedule(
    ranks: int, pipeline: PipelineParallel, tmp_path: Path
) -> None:
    path = tmp_path / "pictures" / "step.svg"
    seen = run_ranks(fit, ranks, str(path), ranks, pipeline, 1, timeout=60)
    assert seen[0] == [False, False, True, True, True, True], "only the first batch of the second step is measured"
    titles, passes = drawn(path)
    each = [
        f"stage {stage}, microbatch {number}: {work}"
        for stage in range(pipeline.stages)
        for number in range(int(pipeline.microbatches))
        for work in ("forward", "backward")
    ]
    assert sorted(passes) == sorted(2 * each)
    measured, planned = titles
    assert measured.startswith("measured, ")
    assert planned.startswith("planned, ")
    bubbles = [float(re.search(r"bubble ([\d.]+)%", title)[1]) for title in titles]  # type: ignore[index]
    assert all(0 < bubble < 100 for bubble in bubbles)


def test_a_strategy_without_stages_has_nothing_to_measure() -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[PipelineTimeline("step.svg")],
    )
    with pytest.raises(ConfigError, match="the strategy has none"):
        trainer.fit(ByteGPT(dim=16, num_layers=1, num_heads=2, max_length=16), PydocText(length=16))


@pytest.mark.parametrize("step", [-1, True, "3"])
def test_a_step_that_is_none_is_refused(step: Any) -> None:
    with pytest.raises(ConfigError, match="is not the number of a step"):
        PipelineTimeline("step.svg", step=step)
