"""Keys that DeepSpeed's own code reads are in the table, where DeepSpeed is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from tests.rows import full

from meshbolt.deepspeed_json import translate
from meshbolt.deepspeed_json.key import REFUSED
from meshbolt.deepspeed_json.table import KEYS, names_in
from meshbolt.errors import MeshboltError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.filterwarnings("ignore"),  # DeepSpeed's own
]
MODELS = {
    "zero_optimization": ("runtime.zero.config", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_param": ("runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": ("runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig"),
    "zero_optimization.leaf_module": ("runtime.zero.leaf_module_config", "DeepSpeedZeroLeafModuleConfig"),
    "fp16": ("runtime.precision_config", "DeepSpeedFP16Config"),
    "bf16": ("runtime.precision_config", "DeepSpeedBF16Config"),
    "tensor_parallel": ("runtime.tensor_parallel.config", "TPTrainingConfig"),
    "tensor_parallel.tp": ("runtime.tensor_parallel.config", "TPConfig"),
    "tensorboard": ("monitor.config", "TensorBoardConfig"),
    "csv_monitor": ("monitor.config", "CSVConfig"),
    "wandb": ("monitor.config", "WandbConfig"),
    "comet": ("monitor.config", "CometConfig"),
    "comms_logger": ("comm.config", "CommsLoggerConfig"),
    "timers.throughput": ("utils.config", "DeepSpeedThroughputTimerConfig"),
}
"""Blocks whose keys are the fields of a class."""
RENAMED = {"tensor_parallel.tensor_parallel", "bfloat16"}
"""Written otherwise before they are looked up; see `given.py`."""
INSIDE_REFUSED = ("autotuning.", "data_efficiency.")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def of_deepspeed(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"deepspeed.{module}"), name)


@pytest.mark.parametrize("block", [full(block) for block in MODELS])
def test_every_field_of_a_block_is_in_the_table_with_its_other_name(block: str) -> None:
    fields = of_deepspeed(*MODELS[block]).model_fields
    names = {name for key, field in fields.items() for name in (key, field.alias or key)}
    names -= {name for name in names if f"{block}.{name}" in RENAMED}
    assert not names - set(names_in(block))


class Reads(dict[str, Any]):
    """A dictionary that notes which keys are asked for."""

    def __init__(self, values: dict[str, Any], path: str, seen: set[str]) -> None:
        super().__init__()
        self.path, self.seen = path, seen
        for key, value in values.items():
            inner = Reads(value, self._of(key), seen) if isinstance(value, dict) else value
            dict.__setitem__(self, key, inner)

    def _of(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(self._of(key))
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.seen.add(self._of(str(key)))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(self._of(key))
        return super().__getitem__(key)

    def keys(self) -> Any:
        return Names(self)


class Names:
    """The keys of a dictionary that notes which are asked for."""

    def __init__(self, of: Reads) -> None:
        self.of = of

    def __contains__(self, key: object) -> bool:
        return key in self.of

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)


def blocks() -> list[str]:
    """Return the blocks that DeepSpeed takes and the table has, each with its own keys."""
    tops = [path for path, key in KEYS.items() if "." not in path and key.values.words == "an object"]
    return [block for block in tops if "has removed" not in KEYS[block].why]


@pytest.mark.parametrize("all_blocks", [full(None)])
def test_every_key_that_is_asked_for_is_in_the_table(all_blocks: None) -> None:
    config, seen = of_deepspeed("runtime.config", "DeepSpeedConfig"), set[str]()
    for block in blocks():
        values: dict[str, Any] = {"train_batch_size": 1, block: {}}
        for path, key in KEYS.items():
            if path.startswith(f"{block}.") and key.values.is_block and path.count(".") == 1:
                values[block][path.rpartition(".")[2]] = {}
        config(Reads(values, "", seen))
    assert len(seen) > 100, "DeepSpeed asks otherwise than this test listens"
    unknown = {key for key in seen if key not in KEYS} - RENAMED
    assert not [key for key in sorted(unknown) if not key.startswith(INSIDE_REFUSED)]


@pytest.mark.parametrize("removed", [full(None)])
def test_every_key_that_deepspeed_has_removed_is_refused(removed: None) -> None:
    tops = of_deepspeed("runtime.config", "_REMOVED_TOP_LEVEL_CONFIG_KEYS")
    inner = of_deepspeed("runtime.config", "_REMOVED_ZERO_CONFIG_KEYS")
    paths = [*tops, *(f"zero_optimization.{name}" for name in inner)]
    assert len(paths) > 10
    assert not [path for path in paths if path not in KEYS or KEYS[path].outcome != REFUSED]


WRONG = [
    {"zero_optimization": {"stage": 4}},
    {"zero_optimization": {"stage": "two"}},
    {"zero_optimization": {"stag": 1}},
    {"fp16": {"enabled": "maybe"}},
    {"fp16": {"loss_scale": -1}},
    {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
    {"communication_data_type": "fp8"},
    {"gradient_allreduce_op": "max"},
    {"amp": {"enabled": True}},
    {"torch_autocast": {"enabled": True, "dtype": "fp9"}},
]


@pytest.mark.parametrize("values", [full(values, id=str(values)) for values in WRONG])
def test_what_deepspeed_refuses_is_refused_here_by_name(values: dict[str, Any]) -> None:
    config = of_deepspeed("runtime.config", "DeepSpeedConfig")
    with pytest.raises((ValueError, AssertionError, of_deepspeed("runtime.config", "DeepSpeedConfigError"))):
        config({"train_batch_size": 1, **values})
    with pytest.raises(MeshboltError) as error:
        translate(values)
    assert next(iter(values)) in str(error.value)
