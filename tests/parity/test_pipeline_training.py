"""Models under pipeline parallelism train in a Trainer as in one process; rows beyond a small sample carry the mark `full`."""

from __future__ import annotations

import importlib

import pytest
from tests.parity.pipeline_rows import PipelineRow, pipeline_rows
from tests.parity.worlds import Worlds

# Every setting of few ranks, and kinds of models: tied, with skips, of encoder and decoder, with state.
SELECTED = {
    "llama-pp2_zero3_accumulated",
    "llama-pp2_tp2",
    "llama_tied-pp2_zero2_accumulated",
    "gpt2-pp2_zero1_accumulated",
    "nanogpt-pp2_zbv",
    "unet-pp2",
    "whisper-pp2_chosen",
    "nanogpt-pp2_interleaved",
    "llama-pp2_gpipe_odd",
}
ROWS = pipeline_rows()
PARAMETERS = [pytest.param(row, marks=[] if str(row) in SELECTED else pytest.mark.full, id=str(row)) for row in ROWS]


@pytest.fixture(scope="session")
def transformers() -> None:
    """Import it before ranks are forked, each of which would import it by itself."""
    importlib.import_module("transformers")


@pytest.fixture(scope="session")
def pipeline_worlds(request: pytest.FixtureRequest, transformers: None) -> Worlds:
    called = (getattr(item, "callspec", None) for item in request.session.items)
    return Worlds(call.params["pipeline_row"] for call in called if call is not None and "pipeline_row" in call.params)


# Networks drop nothing out, on purpose.
@pytest.mark.filterwarnings(
    "ignore:Found .* module.s. in eval mode:lightning.fabric.utilities.warnings.PossibleUserWarning"
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
# Blocks of T5 end in a view, of which torch's FSDP2 warns without a pipeline too.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("pipeline_row", PARAMETERS)
def test_a_model_under_pipeline_parallelism_trains_as_one_process_does(
    pipeline_row: PipelineRow, pipeline_worlds: Worlds
) -> None:
    print(pipeline_worlds.compare(pipeline_row))


def test_the_selection_is_of_rows() -> None:
    assert {str(row) for row in ROWS} >= SELECTED
