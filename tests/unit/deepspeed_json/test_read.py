"""Reading a file: what is no JSON is refused where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshbolt.deepspeed_json.read import read
from meshbolt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "fp16": {"enabled": true,}\n}', "line 2, column 28"),
        ('{"a": 1}}', "line 1, column 9"),
        ("", "The file is empty"),
        ('{\n// stage\n"zero_optimization": {}}', "JSON has no comments"),
        ('{"fp16": {}, "fp16": {}}', "gives 'fp16' twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "gives 'stage' twice"),
        ('{"gradient_clipping": NaN}', "the number NaN"),
        ("[1]", "holds list at its top"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    (file := tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        read(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("config", [3, None, "", {"a": object()}, {"a": float("nan")}, "no/such/file.json"])
def test_what_is_no_file_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError):
        read(config)


def test_a_dictionary_is_copied() -> None:
    given: dict[str, Any] = {"fp16": {"enabled": True}}
    values, _ = read(given)
    values["fp16"]["enabled"] = False
    assert given["fp16"]["enabled"] is True
