"""Models under tensor parallelism train and evaluate as in one process; rows beyond a small sample carry the mark `full`.

Warnings are errors, on ranks too: "is computed on whole tensors" must not appear for any of these models.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
from tests.parity.tensor_models import MODELS, Task, TensorRow, batches, tensor_rows, tokens
from tests.parity.worlds import Worlds
from tests.rows import full
from torch.utils.data import DataLoader

from meshbolt import ConfigError, MeshStrategy, TensorParallel
from meshbolt.testing import assert_parity, run_ranks

# Every plan, every kind of attention, every setting and every number of ranks once or more.
SELECTED = {
    "byte_gpt-tp2_zero3_loss",
    "llama-tp2_zero3_accumulated",
    "llama_eager_tied-tp2_loss",
    "qwen3_own_plan-tp2",
    "gpt2_dropout-tp4",
    "bert_masked-tp2_zero1_accumulated",
    "vit-tp2_whole_sequences",
    "encoder_sequence_first-tp2",
    "decoder-tp2_zero2_whole_sequences",
    "attention_of_memory_weights-tp2",
    "fused_vit-tp2_zero3_recompute",
    "gpt2_dropout-tp2_traced",
    "llama-tp2_zero3_traced",
}
ROWS = tensor_rows()
PARAMETERS = [pytest.param(row, marks=[] if str(row) in SELECTED else pytest.mark.full, id=str(row)) for row in ROWS]


@pytest.fixture(scope="session")
def transformers() -> None:
    """Import it before ranks are forked, each of which would import it by itself."""
    importlib.import_module("transformers")


@pytest.fixture(scope="session")
def tensor_worlds(request: pytest.FixtureRequest, transformers: None) -> Worlds:
    called = (getattr(item, "callspec", None) for item in request.session.items)
    return Worlds(call.params["tensor_row"] for call in called if call is not None and "tensor_row" in call.params)


# Blocks of T5 end in a view, of which torch's FSDP2 warns without tensor parallelism too.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("tensor_row", PARAMETERS)
def test_a_model_under_tensor_parallelism_trains_as_one_process_does(
    tensor_row: TensorRow, tensor_worlds: Worlds
) -> None:
    print(tensor_worlds.compare(tensor_row))


def test_the_selection_has_every_setting() -> None:
    assert {str(row) for row in ROWS} >= SELECTED
    assert {row.setting for row in ROWS} == {row.setting for row in ROWS if str(row) in SELECTED}


# Evaluation -----------------------------------------------------------------------------------------------------------------


def losses(model: str, strategy: Mapping[str, Any] | None, inference_mode: bool) -> list[float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2 if strategy else 1,
        strategy=MeshStrategy(**strategy) if strategy else "auto",
        precision="64-true",
        inference_mode=inference_mode,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    predicted = trainer.predict(Task(MODELS[model]), DataLoader(batches(model, 3), batch_size=None))
    return [float(loss) for loss in predicted or ()]


EVALUATED = {"encoder_padded", "attention_weights"}


# In evaluation torch has kernels of its own for whole layers, which know nothing of divided weights; in one process they run.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("inference_mode", [True, full(False)])
@pytest.mark.parametrize("model", [name if name in EVALUATED else full(name) for name in MODELS])
def test_a_model_evaluates_as_in_one_process(model: str, inference_mode: bool, transformers: None) -> None:
    strategy = {"zero": 0, "tensor_parallel": TensorParallel(2, plan=MODELS[model].plan)}
    (expected,) = run_ranks(losses, 1, model, None, inference_mode)
    for found in run_ranks(losses, 2, model, strategy, inference_mode):
        # The models of Hugging Face compute their loss in float32.
        assert found == pytest.approx(expected, abs=1e-6 if MODELS[model].batch is tokens else 1e-12)


# Refusals -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "plan", "message"),
    [
        (
            "encoder",
            "auto",
            r"'network\.encoder\.layers\.0\.self_attn' has 4 heads, which 3 ranks cannot share.*\[1, 2, 4\]",
        ),
        (
            "encoder",
            {"network.encoder.layers.*.self_attn": "heads"},
            r"layers\.0\.self_attn' has 4 heads, which 3 ranks",
        ),
        ("fused_vit", "auto", r"'network\.blocks\.0\.attn' has 4 heads, which 3 ranks"),
        (
            "fused_vit",
            {"network.blocks.*.attn.qkv": "colwise/3"},
            r"'network\.blocks\.0\.attn' has 4 heads, which 3 ranks",
        ),
        full("llama", "auto", r"layers\.0\.self_attn' has 8 heads, which 3 ranks"),
        full("llama", {"network.model.layers.*.mlp.upproj": "colwise"}, r"matches no module of Task.*mlp\.up_proj"),
        full("bert_classifier", "auto", r"attention\.self' has 4 heads, which 3 ranks"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_on_every_rank(
    model: str, plan: Any, message: str, transformers: None
) -> None:
    with pytest.raises(ConfigError, match=message):
        refused(functools.partial(Task, MODELS[model]), model, TensorParallel(3, plan=plan))


def refused(task: Callable[[], pl.LightningModule], model: str, setting: TensorParallel) -> None:
    strategy = {"zero": 0, "tensor_parallel": setting}
    assert_parity(task, batches(model, 1), strategy, ranks=3, steps=1, precision="64-true")


def test_a_loss_in_parts_without_a_head_is_refused_on_every_rank() -> None:
    setting = TensorParallel(3, plan={"network.encoder.layers.*.linear1": "colwise"}, loss_parallel=True)
    with pytest.raises(ConfigError, match="no head of Task is in the plan"):
        refused(functools.partial(Task, MODELS["encoder"]), "encoder", setting)
