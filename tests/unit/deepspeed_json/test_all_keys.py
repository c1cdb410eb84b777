"""All keys with right and wrong values: every key has its line, and what is wrong is an error of meshbolt's."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshbolt.deepspeed_json import Options, Receipt, translate
from meshbolt.deepspeed_json.effective import optimizer_values, scheduler_values, trainer_values
from meshbolt.deepspeed_json.key import IGNORED, REFUSED, Key
from meshbolt.deepspeed_json.table import KEYS
from meshbolt.errors import ConfigError, UnsupportedError
from meshbolt.strategies import MeshStrategy
from meshbolt.strategies.from_deepspeed import precision_plugin

CANDIDATES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        16,
        1.0,
        0.5,
        5e8,
        "",
        "auto",
        "fp32",
        "bf16",
        "mean",
        "cpu",
        "none",
        "nvme",
        "/local/x",
    ),
    *("AdamW", "WarmupLR", "bfloat16", "torch", [], ["Block"], {}, {"enabled": False}, {"enabled": True}, {"lr": 0.1}),
]
WRONG: list[Any] = [
    *(None, True, -1, 0, 1.5, 1e300, 10**30, -(10**30), 10**400, float("nan"), float("inf"), -0.0),
    *("x", "AUTO", "true", "\ud800", [], [1], [None], {}, {"x": 1}, {"": 1}, {"enabled": "x"}, {"a.b": {}}, [[[]]]),
]
ON: dict[str, dict[str, Any]] = {
    "fp16": {"fp16": {"enabled": True}},
    "bf16": {"bf16": {"enabled": True}},
    "torch_autocast": {"torch_autocast": {"enabled": True}},
    "zero_optimization.offload_optimizer": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}
    },
    "zero_optimization.offload_param": {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "nvme", "nvme_path": "/x"},
        }
    },
    "zero_optimization": {"zero_optimization": {"stage": 3}},
    "pipeline": {"pipeline": {"stages": 2}},
    "tensor_parallel": {"tensor_parallel": {"autotp_size": 2}},
    "optimizer": {"optimizer": {"type": "AdamW"}},
    "scheduler": {"scheduler": {"type": "WarmupLR"}},
    "train_batch_size": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
}
"""What makes the keys of a block count."""
LEAVES = [key for key in KEYS.values() if not key.values.is_block]
BLOCKS = sorted({key.path.partition(".")[0] for key in LEAVES})


def keys_of(block: str) -> list[Key]:
    return [key for key in LEAVES if key.path.partition(".")[0] == block]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WRONG[:12]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def merged(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(left)
    for key, value in right.items():
        old = both.get(key)
        both[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def paths(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in values.items():
        path = f"{prefix}{name}"
        found += paths(value, f"{path}.") if isinstance(value, dict) and value else [path]
    return found


def assert_complete(receipt: Receipt, config: Mapping[str, Any]) -> None:
    """Every key of a file has a line, or lies in one that has; and a line of an ignored key has a reason."""
    keys = {row.key for row in receipt if row.given}
    for path in paths(config):
        path = path.replace("bfloat16.", "bf16.", 1).replace("parallel.tensor_parallel", "parallel.tp")
        assert any(path == key or path.startswith(f"{key}.") for key in keys), f"{path} has no line"
    for row in receipt:
        assert row.outcome != REFUSED
        assert row.why or row.outcome != IGNORED, f"{row.key} is ignored without a reason"


def tried(config: dict[str, Any], options: Options | None = None) -> bool:
    """Translate, and make a strategy and the optimizer; whatever is wrong must be an error that says so."""
    try:
        made = translate(config, options)
        MeshStrategy(**made.settings, precision_plugin=precision_plugin(made.precision))
    except (ConfigError, UnsupportedError):
        return False
    assert_complete(made.receipt, config)
    json.loads(made.receipt.to_json(), parse_constant=pytest.fail)
    for values in (trainer_values, optimizer_values, scheduler_values):
        assert all(value.origin for value in values(made))
    return True


@pytest.mark.parametrize("block", BLOCKS)
def test_each_key_takes_right_values_and_refuses_others(block: str) -> None:
    for key in keys_of(block):
        takes_right_values(key)


def takes_right_values(key: Key) -> None:
    around = next((on for block, on in ON.items() if f"{key.path}.".startswith(f"{block}.")), {})
    for value in (*CANDIDATES, *WRONG):
        tried(config := nested(key.path, value))
        tried(merged(around, config))
        is_json = value == value and value not in (float("inf"),)
        if is_json and value != "auto" and not key.values.accepts(value):
            with pytest.raises(ConfigError, match=f"needs {key.values.words[:4]}"):
                translate(config)


def test_every_key_may_be_left_to_others_and_says_so() -> None:
    for key in KEYS.values():
        config = merged(
            (ON.get(key.path.partition(".")[0], {}) if key.path.endswith(".params") else {}), nested(key.path, "auto")
        )
        if key.path.endswith(".type") and key.path.count(".") == 1 and not key.path.startswith("checkpoint"):
            with pytest.raises(ConfigError, match="Name a type, or leave the block out"):
                translate(config)
            continue
        row = translate(config).receipt.of(key.path)
        assert row.value == "auto"
        assert "auto" in row.why


def test_all_keys_may_be_left_to_others_at_once() -> None:
    config: dict[str, Any] = {}
    for key in LEAVES:
        if key.path.partition(".")[0] not in ("optimizer", "scheduler"):
            config = merged(config, nested(key.path, "auto"))
    assert tried(config)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_value_that_the_caller_fills_in_is_checked_as_if_the_file_had_it(block: str) -> None:
    for key, value in itertools.product(keys_of(block), (None, True, -1, 1, "fp32", {"x": 1}, 10**30)):
        config = nested(key.path, "auto")
        if tried(config, Options(auto={key.path: value})) and not key.path.endswith("type"):
            assert f"{value!r}" in translate(config, Options(auto={key.path: value})).receipt.of(key.path).why


OLD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}),
    ({"zero_optimization": False}, {"zero_optimization": {"stage": 0}}),
    ({"bfloat16": {"enabled": True}}, {"bf16": {"enabled": True}}),
    (
        {"zero_optimization": {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": False}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}},
    ),
    (
        {"zero_optimization": {"stage": 3, "cpu_offload": True, "cpu_offload_param": True}},
        {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "cpu"},
            }
        },
    ),
    ({"tensor_parallel": {"tensor_parallel": {"tp_size": 2}}}, {"tensor_parallel": {"tp": {"tp_size": 2}}}),
]


@pytest.mark.parametrize(("old", "new"), OLD)
def test_old_forms_come_to_what_the_new_ones_do(old: dict[str, Any], new: dict[str, Any]) -> None:
    mine, theirs = translate(old), translate(new)
    assert (mine.settings, mine.precision) == (theirs.settings, theirs.precision)
    assert_complete(mine.receipt, new if "cpu_offload" not in str(old) else old)


@pytest.mark.parametrize(
    "both",
    [
        {"bf16": {"enabled": True}, "bfloat16": {"enabled": True}},
        {"tensor_parallel": {"tp": {}, "tensor_parallel": {}}},
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        {"fp16": {"enabled": True}, "torch_autocast": {"enabled": True}},
        {"zero_optimization": {"stage": 4}},
        {"optimizer": {"type": "NoSuchOptimizer"}},
        {"scheduler": {"type": "NoSuchSchedule"}},
        {"train_batch_size": 7, "train_micro_batch_size_per_gpu": 2},
        {
            "zero_optimization": {
                "stage": 3,
                "cpu_offload": True,
                "offload_optimizer": {"device": "nvme", "nvme_path": "/x"},
            }
        },
    ],
)
def test_what_contradicts_itself_is_refused(both: dict[str, Any]) -> None:
    assert not tried(both)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(LEAVES), st.sampled_from([*CANDIDATES, *WRONG])), min_size=2, max_size=8))
def test_any_keys_together_have_their_lines_or_an_error(chosen: list[tuple[Key, Any]]) -> None:
    config: dict[str, Any] = {}
    for key, value in chosen:
        config = merged(config, nested(key.path, value))
    tried(config)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(KEYS)), json_values)
def test_any_json_at_any_key_has_its_line_or_an_error(path: str, value: Any) -> None:
    tried(nested(path, value))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_keys_that_do_not_exist_are_refused(config: dict[str, Any]) -> None:
    tried(config)
    if any(name not in KEYS and name != "bfloat16" for name in config):
        with pytest.raises(ConfigError):
            translate(config)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["AdamW", "Adam", "SGD", "Adagrad"]),
    st.dictionaries(st.sampled_from(["lr", "betas", "eps", "torch_adam"]), json_values),
)
def test_any_params_of_an_optimizer_make_it_or_an_error(kind: str, params: dict[str, Any]) -> None:
    tried({"optimizer": {"type": kind, "params": params}})
    tried(
        {
            "scheduler": {
                "type": "OneCycle",
                "params": {"cycle_min_lr": params.get("lr"), "cycle_max_lr": params.get("eps")},
            }
        }
    )


def test_every_key_that_is_ignored_or_refused_has_a_reason() -> None:
    assert not [key.path for key in KEYS.values() if key.outcome in (IGNORED, REFUSED) and not key.why]
