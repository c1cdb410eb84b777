"""`meshbolt checkpoint` as a user calls it, in a process of its own."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from tests.cli.support import meshbolt
from tests.unit.checkpoint.formats_support import assert_equal, saved, weights


def test_a_checkpoint_is_exported_and_what_cannot_be_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    saved(tmp_path / "run.ckpt")
    done = meshbolt(
        "checkpoint", "export", "run.ckpt", "w.safetensors", "--to", "safetensors", cwd=tmp_path, on_warning="error"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("exported run.ckpt to w.safetensors: safetensors, 7 tensors, ")
    assert_equal(load_file(tmp_path / "w.safetensors"), weights())
    wrong = meshbolt("checkpoint", "export", "run.ckpt", "w.safetensors", "--to", "hf", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("meshbolt checkpoint: ConfigError: ")
    assert len(wrong.stderr.splitlines()) == 1
    missing = meshbolt("checkpoint", "inspect", "nowhere", cwd=tmp_path)
    assert missing.returncode == 1
    assert "nowhere' cannot be read: there is nothing at this path" in missing.stderr
