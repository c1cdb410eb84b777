"""All forms in which a file or a command line may ask for tensor parallelism come to the same setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from meshbolt import TensorParallel
from meshbolt.cli.planned import explain_plan
from meshbolt.cli.train import MeshCLI
from meshbolt.config.load import load

# Lightning calls what jsonargparse 4.49 renamed.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FORMS: dict[str, tuple[str, TensorParallel]] = {
    "a number": ("2", TensorParallel(2)),
    "ranks of a machine": ("node", TensorParallel("node")),
    "fields": ("{size: 2, sequence_parallel: false}", TensorParallel(2, sequence_parallel=False)),
    "a class": (
        "{class_path: meshbolt.TensorParallel, init_args: {size: 2, loss_parallel: true}}",
        TensorParallel(2, loss_parallel=True),
    ),
    "a mapping": (
        '{size: 2, plan: {"blocks.*.widen": colwise, "blocks.*.narrow": rowwise}}',
        TensorParallel(2, plan={"blocks.*.widen": "colwise", "blocks.*.narrow": "rowwise"}),
    ),
    "a name": ("{size: 2, plan: byte_gpt}", TensorParallel(2, plan="byte_gpt")),
}
FILE = """
seed_everything: false
trainer:
  strategy:
    class_path: meshbolt.MeshStrategy
    init_args:
      zero: 2
      tensor_parallel: %s
  accelerator: cpu
  devices: 4
  logger: false
  enable_checkpointing: false
model:
  class_path: meshbolt.demos.ByteGPT
data:
  class_path: meshbolt.demos.PydocText
"""


@pytest.fixture(autouse=True)
def without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning warns where both its `args` and the command line are given.
    monkeypatch.setattr("sys.argv", ["meshbolt"])


def built(cli: type[LightningCLI], path: Path, mode: str, *arguments: str) -> Any:
    args = ["--config", str(path), *arguments]
    return cli(run=False, args=args, parser_kwargs={"parser_mode": mode}).trainer.strategy.settings.tensor_parallel


@pytest.mark.parametrize(("cli", "mode"), [(LightningCLI, "yaml"), (LightningCLI, "omegaconf"), (MeshCLI, "omegaconf")])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_in_every_mode(form: str, cli: type[LightningCLI], mode: str, tmp_path: Path) -> None:
    text, expected = FORMS[form]
    path = tmp_path / "run.yaml"
    path.write_text(FILE % text)
    assert built(cli, path, mode) == expected
    rows = {row.key: row.value for row in explain_plan(load([path]))}
    assert rows["tensor_parallel.plan"] == expected.plan
    assert rows["mesh.tp"] == (4 if expected.size == "node" else 2)


def test_the_command_line_says_more_of_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE % "{size: 2, loss_parallel: true}")
    more = "--trainer.strategy.tensor_parallel.size=4"
    assert built(MeshCLI, path, "omegaconf", more) == TensorParallel(4, loss_parallel=True)
    assert built(MeshCLI, path, "omegaconf", "--trainer.strategy.tensor_parallel=4") == TensorParallel(4)
    assert built(MeshCLI, path, "omegaconf", "--trainer.strategy=tensor_parallel") == TensorParallel("node")
