"""Reading a file: what is no JSON is refused where it stands."""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rows import full

from meshbolt.deepspeed_json.read import _parse, read
from meshbolt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n  "fp16": {"enabled": true,,}\n}', "line 2, column 28"),
        ('{ // one\n  "fp16": {,} }', "line 2, column 12"),
        ('{"a": 1 "b": 2}', "line 1, column 9"),
        ('{"a": True}', "JSON writes true, false and null"),
        ("{'a': 1}", "need double quotes"),
        ('{"a": hello}', "line 1, column 7.*need double quotes"),
        ('{"a": 1 /* never ends', "line 1, column 9"),
        ('{"a": 1}}', "line 1, column 9"),
        ("", "The file is empty"),
        ('{"fp16": {}, "fp16": {}}', "gives 'fp16' twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "gives 'stage' twice"),
        ('{"gradient_clipping": NaN}', "the number NaN"),
        ('{"vocabulary_size": 1e999}', "the number 1e999"),
        ('{"vocabulary_size": %s}' % ("1" * 5000), "not valid JSON"),
        ("[1]", "holds list at its top"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_what_is_no_json_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    (file := tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        read(file)
    assert str(file) in str(error.value)


LOOSE = [
    ('{"a": 1,}', {"a": 1}),
    ('{"a": [1, 2,],}', {"a": [1, 2]}),
    ('{ // of the run\n "a": 5e8, # more\n /* and\n more */ "b": "x # y // z"}', {"a": 5e8, "b": "x # y // z"}),
    ('{"a": true\n "b": {"c": "d"}\n "e": [1\n 2]}', {"a": True, "b": {"c": "d"}, "e": [1, 2]}),
    ('{"a": "\\\\" // x\n "b": null}', {"a": "\\", "b": None}),
    ('{"a"\n: 1\n, "b": 2\n}', {"a": 1, "b": 2}),
]


@pytest.mark.parametrize(("text", "values"), LOOSE)
def test_comments_and_commas_are_taken_as_deepspeed_takes_them(
    tmp_path: Path, text: str, values: dict[str, Any]
) -> None:
    (file := tmp_path / "ds.json").write_text(text)
    assert read(file)[0] == values


@pytest.mark.skipif(
    importlib.util.find_spec("hjson") is None, reason="hjson, which reads DeepSpeed's files, is not installed"
)
@pytest.mark.parametrize("text", [full(text) for text, _ in LOOSE])
def test_what_is_taken_says_the_same_to_deepspeed(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "ds.json").write_text(text)
    assert read(file)[0] == importlib.import_module("hjson").loads(text)


PIECES = ["{", "}", "[", "]", ",", ":", '"a"', '"b"', "1", "true", "\n", " ", "// x\n", "# y\n", "/* z */", "'", "x"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_text_is_read_or_refused_and_strict_json_means_what_it_says(pieces: list[str]) -> None:
    text = "{" + "".join(pieces) + "}"
    try:
        values = _parse(text, "F")
    except ConfigError:
        values = None
    try:
        expected = json.loads(text)
    except ValueError:
        return
    if text.count('"a"') <= 1 and text.count('"b"') <= 1:
        assert values == expected


def test_a_byte_order_mark_is_passed_over_and_other_encodings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"fp16": {}}', encoding="utf-8-sig")
    assert read(file)[0] == {"fp16": {}}
    for encoding in ("utf-16", "latin-1"):
        file.write_text('{"dump_state": "é"}', encoding=encoding)
        with pytest.raises(ConfigError, match=r"ds\.json' cannot be read: .*codec"):
            read(str(file))


def test_base64_is_read_as_deepspeeds_launcher_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = base64.urlsafe_b64encode(b'{"zero_optimization": {"stage": 2}}').decode()
    assert read(text) == ({"zero_optimization": {"stage": 2}}, "the DeepSpeed configuration in base64")
    with pytest.raises(ConfigError, match="in base64 is not valid JSON at line 1, column 2"):
        read(base64.urlsafe_b64encode(b"{zero}").decode())
    monkeypatch.chdir(tmp_path)
    (tmp_path / text).write_text('{"fp16": {}}')
    assert read(text)[0] == {"fp16": {}}, "a file of that name comes first"


@pytest.mark.parametrize(
    "config", [3, None, "ds_config", "abcd", ".", "", {"a": object()}, {"a": float("nan")}, "no/such/file.json"]
)
def test_what_is_no_file_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError):
        read(config)


def test_a_dictionary_is_copied() -> None:
    given: dict[str, Any] = {"fp16": {"enabled": True}}
    values, _ = read(given)
    values["fp16"]["enabled"] = False
    assert given["fp16"]["enabled"] is True
