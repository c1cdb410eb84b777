"""Versions that fit together: read from the files of packages that a test puts onto the path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meshbolt.cli.doctor import packages
from meshbolt.cli.doctor.rows import Row

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Let this process find the files of a package that hides another version of it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def put(name: str, version: str, *requires: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (folder / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {each}" for each in requires)]) + "\n")

    return put


def row_of(name: str) -> Row:
    (row,) = (row for row in packages.version_rows() if row.name == name)
    return row


def test_the_versions_of_this_environment_fit_together() -> None:
    rows = packages.version_rows()
    assert {row.status for row in rows if row.name in ("python", "torch", "lightning", "torchmetrics")} == {"green"}


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_malicious_release_is_red_and_not_imported(install: Install, name: str, version: str) -> None:
    install(name, version)
    row = row_of(f"{name} (malicious)")
    assert (row.status, packages.is_rogue(name)) == ("red", True)
    assert "GHSA-w37p-236h-pfx3" in row.value
    assert "pip uninstall -y lightning pytorch-lightning" in row.mend
    modules = packages.packages_to_import()
    assert not [each for each in modules if "lightning" in each or each == "meshbolt"]
    assert "torch" in modules


def test_a_version_below_the_bound_is_red_with_the_command_that_installs_another(install: Install) -> None:
    install("torch", "2.9.0")
    row = row_of("torch")
    assert (row.status, row.mend) == ("red", "pip install 'torch>=2.11'")
    assert row.value == "2.9.0, meshbolt needs >=2.11"


def test_a_local_or_later_version_is_green(install: Install) -> None:
    install("torch", "2.14.0.dev20261101+cu130")
    assert row_of("torch").status == "green"


def test_a_package_that_is_built_for_another_torch_is_red(install: Install) -> None:
    install("torchvision", "0.20.0", "torch==2.5.0", "numpy")
    row = row_of("torchvision with torch")
    assert row.status == "red"
    assert "asks for torch==2.5.0" in row.value
    assert row.mend.endswith("--upgrade torchvision")


def test_a_package_that_only_dislikes_a_version_is_yellow(install: Install) -> None:
    install("deepspeed", "0.1", "torch<2")
    assert row_of("deepspeed with torch").status == "yellow"


def test_an_extra_that_a_requirement_needs_is_missed(install: Install) -> None:
    install("jsonargparse", "4.50.0", "nowhere-to-be-found; extra == 'signatures'")
    row = row_of("jsonargparse")
    assert (row.status, row.value) == ("red", "4.50.0 without nowhere-to-be-found")
    assert row.mend == "pip install 'jsonargparse[signatures]'"


def test_a_package_of_an_extra_in_another_version_is_yellow(install: Install) -> None:
    install("transformers", "4.40.0")
    row = row_of("transformers")
    assert row.status == "yellow"
    assert "hf" in row.value
