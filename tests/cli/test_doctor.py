"""`meshbolt doctor` as a user calls it: on this machine, and where packages are broken."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from tests.cli.support import meshbolt
from tests.rows import full

LIMIT_SECONDS = 20


def test_this_machine_is_looked_at_in_time(tmp_path: Path) -> None:
    begin = time.monotonic()
    result = meshbolt("doctor", "--json", cwd=tmp_path, door="script")
    seconds = time.monotonic() - begin
    assert result.stderr == ""
    content = json.loads(result.stdout)
    rows = {(row["area"], row["name"]): row for row in content["rows"]}
    assert result.returncode == (1 if content["red"] else 0)
    assert rows["versions", "torch"]["status"] == "green"
    assert rows["imports", "imports"]["status"] == "green"
    assert rows["backends", "gloo"]["value"] == "there"
    assert rows["ranks", "gloo, 2 ranks"]["measured"]["bytes_per_second"] > 0
    assert rows["disk", "write speed"]["measured"]["bytes_per_second"] > 0
    assert list(tmp_path.iterdir()) == []
    assert seconds < LIMIT_SECONDS


@pytest.mark.parametrize(
    ("package", "code", "said"),
    [
        ("torch", "raise OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("torch", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        full("lightning", "raise ImportError('from a broken upgrade')", "from a broken upgrade"),
    ],
)
def test_a_broken_package_is_a_red_row_and_no_traceback(
    package: str, code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / f"{package}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(broken))
    result = meshbolt("doctor", "--ranks=0", cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    line = re.search(rf"^red +imports +{package}\S* .*", result.stdout, re.MULTILINE)
    assert line is not None, result.stdout
    assert said in line[0]
    assert f"pip install --force-reinstall --no-deps {package}" in result.stdout


def test_other_commands_still_say_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lightning.py").write_text("raise ImportError('from a broken upgrade')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = meshbolt("--version", cwd=tmp_path)
    assert result.returncode != 0
    assert "from a broken upgrade" in result.stderr
