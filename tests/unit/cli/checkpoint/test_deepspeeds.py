"""`meshbolt checkpoint ...` on directories that DeepSpeed has saved, without an import first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.deepspeed_fixtures import trained, write_rows, write_shards
from tests.unit.checkpoint.formats_support import assert_equal

from meshbolt.checkpoint import is_checkpoint
from meshbolt.checkpoint.formats import ExportOptions, export_checkpoint, import_checkpoint
from meshbolt.cli.checkpoint.main import run
from meshbolt.cli.commands import DONE
from meshbolt.errors import CheckpointError, UnsupportedError

SHAPES = [{"net.weight": (5, 3), "net.bias": (5,)}, {"net.head": (7,)}]
Captured = pytest.CaptureFixture[str]


class Custom:
    """A class of the user's."""


def test_export_writes_master_weights_of_shards_and_says_what_was_read(tmp_path: Path, capsys: Captured) -> None:
    expected = trained(SHAPES, world=2)
    write_shards(tmp_path / "ds", expected)
    out = tmp_path / "w.safetensors"
    assert run(["checkpoint", "export", str(tmp_path / "ds"), str(out), "--to", "safetensors"]) == DONE
    said = capsys.readouterr().out
    assert "safetensors, 3 tensors" in said
    assert "note: Tag 'global_step10': ZeRO stage 3, written by 2 data-parallel ranks" in said
    assert_equal(load_file(out), expected.masters)
    # Of one tag, and with the names of the module inside.
    save = tmp_path / "ds" / "global_step10"
    assert run(["checkpoint", "export", str(save), str(tmp_path / "hf"), "--to", "hf"]) == DONE
    short = {name.removeprefix("net."): value for name, value in expected.masters.items()}
    assert_equal(load_file(tmp_path / "hf" / "model.safetensors"), short)


@pytest.mark.parametrize("to", ["lightning", "dcp", "safetensors"])
def test_an_export_is_what_an_import_and_its_export_are(to: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "ds", trained(SHAPES, world=2, client={"epoch": 3}))
    import_checkpoint(tmp_path / "ds", tmp_path / "made.ckpt")
    direct = export_checkpoint(tmp_path / "ds", tmp_path / "direct", to=to)
    export_checkpoint(tmp_path / "made.ckpt", tmp_path / "between", to=to)
    import_checkpoint(tmp_path / "direct", tmp_path / "a.ckpt")
    import_checkpoint(tmp_path / "between", tmp_path / "b.ckpt")
    assert_equal(_everything(tmp_path / "a.ckpt"), _everything(tmp_path / "b.ckpt"))
    assert direct.num_tensors == (3 if to == "safetensors" else 12)
    assert not is_checkpoint(tmp_path / "direct")


def _everything(path: Path) -> dict[str, torch.Tensor]:
    out = path.with_suffix(".safetensors")
    export_checkpoint(path, out, to="safetensors", options=ExportOptions(everything=True))
    return load_file(out)


def test_consolidate_writes_the_file_of_lightning(tmp_path: Path) -> None:
    expected = trained(SHAPES, world=2)
    write_rows(tmp_path / "ds", expected)
    assert run(["checkpoint", "consolidate", str(tmp_path / "ds"), str(tmp_path / "whole.ckpt")]) == DONE
    whole = torch.load(tmp_path / "whole.ckpt")
    assert_equal(whole["state_dict"], expected.masters)
    assert_equal(
        whole["optimizer_states"][0]["state"][1],
        {
            "step": torch.tensor(float(expected.step)),
            **{key: values["net.bias"] for key, values in expected.moments.items()},
        },
    )


def test_verify_says_that_there_are_no_checksums_and_what_looks_at_the_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "ds", trained(SHAPES, world=2))
    with pytest.raises(UnsupportedError, match=r"have no checksums .*checkpoint inspect .*checkpoint import"):
        run(["checkpoint", "verify", str(tmp_path / "ds")])


def test_a_class_is_no_damage_in_a_list_and_inspect_and_export_take_it_where_it_is_trusted(
    tmp_path: Path, capsys: Captured
) -> None:
    place = str(tmp_path / "ds")
    write_rows(tmp_path / "ds", trained(SHAPES, world=2, client={"mine": Custom()}))
    assert run(["checkpoint", "ls", place, "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)[0]
    assert (found["fault"], found["not_allowed"]) == (None, [f"{Custom.__module__}.Custom"])
    assert found["num_bytes"] > 0
    run(["checkpoint", "ls", place])
    said = " ".join(capsys.readouterr().out.split())
    assert "not read: classes" in said
    assert "damaged" not in said
    with pytest.raises(CheckpointError, match="--weights-only false"):
        run(["checkpoint", "inspect", place])
    assert run(["checkpoint", "inspect", place, "--weights-only", "false", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["objects"] == {"mine": "Custom"}
    to = [str(tmp_path / "w"), "--to", "safetensors"]
    with pytest.raises(CheckpointError, match="--weights-only false"):
        run(["checkpoint", "export", place, *to])
    assert run(["checkpoint", "export", place, *to, "--weights-only", "false"]) == DONE
