"""What meshbolt offers is what its `__all__` lists say, and nothing by accident. Ruff (RUF022) holds their order."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import meshbolt

# Modules that users import from. Others may keep an `__all__` too; what it lists must exist.
FACES = ("meshbolt", "meshbolt.callbacks", "meshbolt.fabric", "meshbolt.plugins", "meshbolt.testing")
MODULES = ["meshbolt"] + [
    found.name for found in pkgutil.walk_packages(meshbolt.__path__, "meshbolt.") if not found.name.endswith("__main__")
]


def public_names(module: ModuleType) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }


@pytest.mark.parametrize("name", MODULES)
def test_an_export_list_has_no_repeats_and_every_name_in_it_exists(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported))
    missing = [each for each in exported if not hasattr(module, each)]
    assert not missing, f"{name}.__all__ lists names that do not exist: {missing}"


@pytest.mark.parametrize("name", FACES)
def test_a_face_exports_every_public_name_it_has_and_no_other(name: str) -> None:
    module = importlib.import_module(name)
    assert public_names(module) <= set(module.__all__), "import it under a leading underscore, or list it in __all__"


@pytest.mark.parametrize("name", FACES)
def test_star_import_of_a_face_works(name: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"from {name} import *", namespace)
    assert set(importlib.import_module(name).__all__) <= set(namespace)
