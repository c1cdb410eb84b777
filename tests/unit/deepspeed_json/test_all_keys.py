"""All keys with right and wrong values: every key has its line, and what is wrong is an error of meshbolt's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshbolt.deepspeed_json import Receipt, translate
from meshbolt.deepspeed_json.key import IGNORED, REFUSED, Key
from meshbolt.deepspeed_json.table import KEYS
from meshbolt.errors import ConfigError, UnsupportedError

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
WRONG: list[Any] = [None, True, -1, 0, 1.5, 1e300, "x", "auto", [], [1], {}, {"x": 1}, {"enabled": "x"}, 10**30]
LEAVES = [key for key in KEYS.values() if not key.values.is_block]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
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
        path = path.replace("bfloat16.", "bf16.", 1)
        assert any(path == key or path.startswith(f"{key}.") for key in keys), f"{path} has no line"
    for row in receipt:
        assert row.outcome != REFUSED
        assert row.why or row.outcome != IGNORED, f"{row.key} is ignored without a reason"


def tried(config: dict[str, Any]) -> None:
    """Translate; whatever is wrong must be an error that says so."""
    try:
        made = translate(config)
    except (ConfigError, UnsupportedError):
        return
    assert_complete(made.receipt, config)


@pytest.mark.parametrize("key", LEAVES, ids=lambda key: key.path)
def test_each_key_takes_right_values_and_refuses_others(key: Key) -> None:
    for value in (*CANDIDATES, *WRONG):
        tried(config := nested(key.path, value))
        if value != "auto" and not key.values.accepts(value):
            with pytest.raises(ConfigError, match=f"needs {key.values.words[:4]}"):
                translate(config)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(LEAVES), st.sampled_from([*CANDIDATES, *WRONG])), min_size=2, max_size=8))
def test_any_keys_together_have_their_lines_or_an_error(chosen: list[tuple[Key, Any]]) -> None:
    config: dict[str, Any] = {}
    for key, value in chosen:
        config = merged(config, nested(key.path, value))
    tried(config)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(list(KEYS)), json_values)
def test_any_json_at_any_key_has_its_line_or_an_error(path: str, value: Any) -> None:
    tried(nested(path, value))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_keys_that_do_not_exist_are_refused(config: dict[str, Any]) -> None:
    tried(config)
    if any(name not in KEYS and name != "bfloat16" for name in config):
        with pytest.raises(ConfigError):
            translate(config)


@settings(max_examples=100, deadline=None, derandomize=True)
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
