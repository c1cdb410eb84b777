from __future__ import annotations

from pathlib import Path

import pytest

from meshbolt.errors import ConfigError
from meshbolt.launch.variables import find_file, forwarded, read_variables

HERE = {
    "NCCL_DEBUG": "INFO",
    "PYTHONPATH": "/x",
    "HOME": "/root",
    "TORCHELASTIC_RUN_ID": "1",
    "MESHBOLT_DEBUG": "1",
    "A": "b",
}


def test_variables_go_along_by_the_beginning_of_their_names() -> None:
    assert forwarded(HERE, asked=(), file=None) == {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/x", "MESHBOLT_DEBUG": "1"}


def test_a_file_overrides_what_is_set_here_and_a_flag_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / ".meshbolt_env").write_text("# of the cluster\nNCCL_DEBUG=WARN\nexport B='c d'\nA=file\n\n")
    file = find_file(tmp_path / "nowhere", tmp_path)

    found = forwarded(HERE, asked=["A", "C=1=2"], file=file)

    assert (found["NCCL_DEBUG"], found["B"], found["A"], found["C"]) == ("WARN", "c d", "b", "1=2")


def test_the_file_of_deepspeed_s_launcher_is_read_where_there_is_no_own_one(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1\n")
    assert find_file(tmp_path / "nowhere", tmp_path) == tmp_path / ".deepspeed_env"

    (tmp_path / ".meshbolt_env").write_text("A=2\n")
    assert find_file(tmp_path) == tmp_path / ".meshbolt_env"


@pytest.mark.parametrize(
    ("text", "words"), [("A=1\nB", "env, line 2: 'B' is not NAME=VALUE"), ("1A=2", "env, line 1: '1A' is no name")]
)
def test_a_wrong_line_is_named_by_its_number(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_variables(text, origin="env")


def test_a_variable_that_is_not_set_cannot_go_along() -> None:
    with pytest.raises(ConfigError, match="--env NOPE: the variable is not set here"):
        forwarded(HERE, asked=["NOPE"], file=None)
