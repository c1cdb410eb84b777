"""Whether the versions of what is installed fit together; nothing is imported for it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from meshbolt.cli.doctor.rows import Row, Status

_AREA = "versions"
# GHSA-w37p-236h-pfx3: uploads of a thief, which ran as soon as they were imported.
ROGUE = dict.fromkeys(("lightning", "pytorch-lightning"), ("2.6.2", "2.6.3"))
_SAFE = "lightning>=2.6.4,!=2.6.2,!=2.6.3"
# What is often beside torch and built for one version of it: another one breaks the import of all that imports it.
_BUILT_FOR_TORCH = ("torchvision", "torchaudio")
_COMPANIONS = (
    *_BUILT_FOR_TORCH,
    "lightning",
    "pytorch-lightning",
    "torchmetrics",
    "transformers",
    "torchao",
    "deepspeed",
)
_IMPORTED_AS = {"pytorch-lightning": "pytorch_lightning", "lightning": "lightning.pytorch"}


def version_of(name: str) -> str | None:
    """Return the version of a package that is installed, as its files say; None where it is not.

    Args:
        name: as `pip` knows it.
    """
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_rogue(name: str) -> bool:
    """Return whether a package is installed in a release that must not be imported."""
    return version_of(name) in ROGUE.get(name, ())


def packages_to_import() -> list[str]:
    """Return the modules whose import is to be tried: what meshbolt stands on as far as it is installed, then meshbolt."""
    wanted = [each.name for each in _requirements() if _is_base(each)] or ["lightning"]
    wanted = ["torch", *(name for name in wanted if name != "torch")]  # the others import it
    if any(map(is_rogue, ROGUE)):
        return [name for name in wanted if name != "lightning" and version_of(name)]
    return [*(_IMPORTED_AS.get(name, name) for name in wanted if version_of(name)), "meshbolt"]


def version_rows() -> list[Row]:
    """Return what is installed, beside what meshbolt asks for and what packages ask of each other."""
    rows = [*_rogue_rows()]
    try:
        rows.append(_python_row())
        needs = _requirements()
    except ImportError as error:  # the package that compares versions is gone, too
        return [*rows, _row("requirements", "yellow", f"cannot be compared: {error}", "pip install packaging")]
    if not needs:
        value = "meshbolt is not installed, but found on the path: what it asks for is not known"
        return [*rows, _row("requirements", "yellow", value, "pip install -e . in its source")]
    rows += [_base_row(each) for each in needs if _is_base(each)]
    rows += _extra_rows([each for each in needs if not _is_base(each)])
    return rows + [row for name in _COMPANIONS for row in _companion_rows(name)]


def _rogue_rows() -> Iterator[Row]:
    for name, versions in ROGUE.items():
        version = version_of(name)
        if version in versions:
            yield _row(
                f"{name} (malicious)",
                "red",
                f"{version} is a malicious upload (GHSA-w37p-236h-pfx3), which ran when it was imported; it is not imported "
                "here. Take every password and key that this machine could read for stolen, and change them",
                f"pip uninstall -y lightning pytorch-lightning && pip install '{_SAFE}'",
            )


def _python_row() -> Row:
    found = platform.python_version()
    asked = importlib.metadata.metadata("meshbolt")["Requires-Python"] if version_of("meshbolt") else None
    if asked is not None and not _parse(f"python{asked}").specifier.contains(found, prereleases=True):
        return _row("python", "red", f"{found}, meshbolt needs {asked}", "conda create -n meshbolt python=3.12")
    return _row("python", "green", f"{found} ({sys.executable})")


def _base_row(need: Any) -> Row:
    version, asked = version_of(need.name), f"{need.name}{need.specifier}"
    if version is None:
        return _row(need.name, "red", "is not installed", f"pip install '{asked}'")
    if is_rogue(need.name):
        return _row(need.name, "red", f"{version}, see above", f"pip install '{asked}'")
    if not need.specifier.contains(version, prereleases=True):
        return _row(need.name, "red", f"{version}, meshbolt needs {need.specifier}", f"pip install '{asked}'")
    missing = [name for extra in need.extras for name in _missing_of_extra(need.name, extra)]
    if missing:
        value = f"{version} without {', '.join(missing)}"
        return _row(need.name, "red", value, f"pip install '{need.name}[{','.join(sorted(need.extras))}]'")
    return _row(need.name, "green", version)


def _missing_of_extra(name: str, extra: str) -> list[str]:
    lines = importlib.metadata.requires(name) or []
    needs = [each for each in map(_parse, lines) if each.marker and each.marker.evaluate({"extra": extra})]
    others = [each for each in needs if not each.marker.evaluate({"extra": ""})]
    return [each.name for each in others if version_of(each.name) is None]


def _extra_rows(needs: Sequence[Any]) -> Iterator[Row]:
    """Yield a row for each package of an extra that is installed in a version that does not fit."""
    extras: dict[tuple[str, str], list[str]] = {}
    for need in needs:
        version = version_of(need.name)
        if version is not None and not need.specifier.contains(version, prereleases=True):
            extras.setdefault((need.name, str(need.specifier)), []).extend(_extras_of_meshbolt(need))
    for (name, asked), names in extras.items():
        value = f"{version_of(name)}, meshbolt[{','.join(sorted(names))}] needs {asked}"
        yield _row(name, "yellow", value, f"pip install '{name}{asked}'")


def _companion_rows(name: str) -> Iterator[Row]:
    """Yield rows for what an installed package asks of torch and the like, and does not find."""
    version = version_of(name)
    if version is None:
        return
    ours = {need.name for need in _requirements() if _is_base(need)}
    for need in map(_parse, importlib.metadata.requires(name) or []):
        if need.name not in ours or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        found = version_of(need.name)
        if found is not None and not need.specifier.contains(found, prereleases=True):
            yield _row(
                f"{name} with {need.name}",
                "red" if name in _BUILT_FOR_TORCH else "yellow",
                f"{version} asks for {need.name}{need.specifier}, {found} is installed",
                f"pip install '{need.name}=={found.partition('+')[0]}' --upgrade {name}",
            )


def _requirements() -> list[Any]:
    try:
        lines: Sequence[str] = importlib.metadata.requires("meshbolt") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [_parse(line) for line in lines]


def _parse(line: str) -> Any:
    from packaging.requirements import Requirement

    return Requirement(line)


def _is_base(need: Any) -> bool:
    return need.marker is None or bool(need.marker.evaluate({"extra": ""}))


def _extras_of_meshbolt(need: Any) -> list[str]:
    extras = importlib.metadata.metadata("meshbolt").get_all("Provides-Extra") or []
    return [extra for extra in extras if need.marker.evaluate({"extra": extra})]


def _row(name: str, status: Status, value: str, mend: str = "") -> Row:
    return Row(area=_AREA, name=name, status=status, value=value, mend=mend)
