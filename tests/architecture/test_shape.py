"""The bounds that keep the code readable: long files, long functions and cycles are where reading stops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import style_stats

PACKAGE = Path(__file__).parents[2] / "src" / "meshbolt"

# (column of tools/style_stats.py, lowest value allowed, highest value allowed)
BOUNDS = [
    ("file_max", 0, 500),
    ("fn_p95", 0, 40),
    ("fn_max", 0, 100),
    ("nest95", 0, 2),
    ("pubdoc%", 100, 100),
    ("ann%", 98, 100),
    ("depth", 0, 2),
    ("cyc", 0, 0),
    ("lazycyc", 0, 0),
]
MAX_PARAMETERS = 10
# The public contract, one keyword for each setting, the constructor that both strategies hand them on to, and DeepSpeed's call.
MANY_PARAMETERS_ALLOWED = (" MeshStrategy.__init__", " MeshCore.__init__", " PipelineModule.__init__", " initialize")


@pytest.fixture(scope="module")
def modules() -> dict[str, style_stats.Module]:
    return style_stats.read_package(PACKAGE, excluded=set())


def functions_in(modules: dict[str, style_stats.Module]) -> Iterator[style_stats.Function]:
    return (function for module in modules.values() for function in module.functions)


@pytest.mark.parametrize(("column", "lowest", "highest"), BOUNDS, ids=[column for column, _, _ in BOUNDS])
def test_the_package_keeps_its_shape(
    modules: dict[str, style_stats.Module], column: str, lowest: int, highest: int, capsys: pytest.CaptureFixture[str]
) -> None:
    row, cycles = style_stats.measure(PACKAGE, modules)
    style_stats.print_worst(modules, cycles, count=5)
    value = row[column]
    assert lowest <= value <= highest, f"{column} is {value}, allowed {lowest} to {highest}\n{capsys.readouterr().out}"


def test_no_function_takes_more_parameters_than_a_reader_can_hold(modules: dict[str, style_stats.Module]) -> None:
    too_many = [
        f"{function.where}: {function.parameters}"
        for function in functions_in(modules)
        if function.parameters > MAX_PARAMETERS and not function.where.endswith(MANY_PARAMETERS_ALLOWED)
    ]
    assert not too_many, f"more than {MAX_PARAMETERS} parameters:\n" + "\n".join(too_many)


def test_every_public_function_says_what_it_does(modules: dict[str, style_stats.Module]) -> None:
    silent = [function.where for function in functions_in(modules) if function.public and not function.documented]
    assert not silent, "public without a docstring:\n" + "\n".join(silent)
