"""The wheel that ships: pure Python, small, typed, and nothing but the package."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Some 450 modules of two to three kilobytes each, deflated; data or generated files that slip in would be far over it.
MAX_WHEEL_BYTES = 1_250_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def dist_info(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def test_the_wheel_is_pure_python_for_any_platform(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        compiled = [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".dylib", ".pyc"))]
    assert not compiled


def test_the_wheel_holds_code_alone(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_wheel_holds_the_package_and_its_type_marker_and_nothing_else(wheel: Path, dist_info: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {"meshbolt", dist_info}
    assert "meshbolt/py.typed" in names
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "meshbolt").rglob("*.py")}
    assert sources <= set(names)


def test_the_wheel_carries_the_licence_and_shuns_the_malicious_lightning_releases(wheel: Path, dist_info: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = message_from_bytes(archive.read(f"{dist_info}/METADATA"))
        assert f"{dist_info}/licenses/LICENSE" in archive.namelist()
    lightning = next(each for each in metadata.get_all("Requires-Dist", []) if each.startswith("lightning"))
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning
