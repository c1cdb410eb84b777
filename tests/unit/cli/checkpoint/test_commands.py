"""`meshbolt checkpoint ...`: exit codes, text for people and JSON for programs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.deepspeed_fixtures import trained, write_rows, write_shards
from tests.unit.checkpoint.formats_support import assert_equal, contents, saved, trainer_tree, weights

from meshbolt.cli.checkpoint.main import COMMANDS, run
from meshbolt.cli.commands import BAD_USAGE, DONE, NO
from meshbolt.errors import CheckpointError, ConfigError

Captured = pytest.CaptureFixture[str]


class Call:
    """Runs a command in a directory with a checkpoint `run.ckpt`."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured

    def __call__(self, *arguments: str) -> tuple[int, str]:
        code = run(["checkpoint", *arguments])
        return code, self._captured.readouterr().out

    def json(self, *arguments: str) -> tuple[int, object]:
        code, said = self(*arguments, "--json")
        return code, json.loads(said)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> Call:
    saved(tmp_path / "run.ckpt")
    monkeypatch.chdir(tmp_path)
    return Call(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_with_an_example(name: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(COMMANDS[name].module).run([name, "--help"])
    assert ended.value.code == 0
    assert f"example: meshbolt checkpoint {name} " in " ".join(capsys.readouterr().out.split())


def test_no_command_and_an_unknown_one_are_bad_usage(capsys: Captured) -> None:
    assert run(["checkpoint"]) == BAD_USAGE
    assert run(["checkpoint", "exprt"]) == BAD_USAGE
    said = capsys.readouterr().err
    assert "usage: meshbolt checkpoint COMMAND" in said
    assert "meshbolt checkpoint: 'exprt' is not a command (did you mean 'export'?" in said
    assert run(["checkpoint", "--help"]) == DONE
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)


def test_missing_arguments_are_bad_usage(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["checkpoint", "export", "run.ckpt"])
    assert ended.value.code == BAD_USAGE


def test_ls_lists_what_is_there_and_what_is_damaged(call: Call, tmp_path: Path) -> None:
    (tmp_path / "logs/version_0").mkdir(parents=True)
    saved(tmp_path / "logs/version_0/bad.ckpt")
    (tmp_path / "logs/version_0/bad.ckpt/__0_0.distcp").unlink()
    saved(tmp_path / ".kept.ckpt.previous")
    code, said = call("ls")
    assert code == DONE
    assert {line.split()[0] for line in said.splitlines()[2:]} == {"logs/version_0/bad.ckpt", "kept.ckpt", "run.ckpt"}
    code, listed = call.json("ls")
    assert code == DONE
    by_path = {Path(entry["path"]).name: entry for entry in listed}
    assert by_path.keys() == {"run.ckpt", "bad.ckpt", "kept.ckpt"}
    assert (by_path["run.ckpt"]["step"], by_path["run.ckpt"]["epoch"], by_path["run.ckpt"]["ranks"]) == (3, 1, 1)
    assert by_path["run.ckpt"]["fault"] is None
    assert "is missing" in by_path["bad.ckpt"]["fault"]


def test_ls_of_nothing_answers_no(call: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert call("ls", "empty") == (NO, "no checkpoint below empty\n")
    with pytest.raises(CheckpointError, match="'nowhere' is no directory"):
        call("ls", "nowhere")


def test_inspect_shows_entries_and_on_demand_every_tensor(call: Call) -> None:
    code, said = call("inspect", "run.ckpt")
    assert code == DONE
    assert "state_dict        7" in said
    assert "net.half" not in said
    _, said = call("inspect", "run.ckpt", "--tensors")
    assert "state_dict.net.half" in said
    _, found = call.json("inspect", "run.ckpt", "--tensors")
    assert found["tensors"]["state_dict.net.b"] == {"dtype": "float32", "shape": [3, 4], "bytes": 48}
    assert found["objects"]["global_step"] == 3
    assert found["entries"]["meshbolt"] == {"tensors": 1, "bytes": 40}


def test_inspect_of_objects_of_classes_runs_none_of_them(call: Call, tmp_path: Path) -> None:
    saved(tmp_path / "classes.ckpt", trainer_tree(hyper_parameters={"call": Call}))
    _, found = call.json("inspect", "classes.ckpt")
    assert "objects of the classes" in found["objects"]["not read"]


def test_verify_answers_yes_and_no(call: Call, tmp_path: Path) -> None:
    code, said = call("verify", "run.ckpt")
    assert code == DONE
    assert "run.ckpt is whole" in said
    shard = tmp_path / "run.ckpt/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    code, said = call("verify", "run.ckpt")
    assert code == NO
    assert "run.ckpt is not whole:\n  __0_0.distcp is damaged" in said
    code, found = call.json("verify", "run.ckpt")
    assert (code, found["whole"], len(found["faults"])) == (NO, False, 1)
    assert call("verify", "nowhere")[0] == NO


def test_export_takes_its_options_from_flags(call: Call, tmp_path: Path) -> None:
    code, said = call("export", "run.ckpt", "w", "--to", "safetensors", "--dtype", "float16", "--strip-prefix", "net.")
    assert code == DONE
    assert said.startswith("exported run.ckpt to w: safetensors, 7 tensors, ")
    assert load_file(tmp_path / "w/model.safetensors")["a"].dtype == torch.float16
    code, found = call.json("export", "run.ckpt", "w", "--to", "safetensors", "--max-shard-size", "100", "--force")
    assert (code, found["format"], found["num_tensors"]) == (DONE, "safetensors", 7)
    assert (tmp_path / "w/model.safetensors.index.json").exists()
    call("export", "run.ckpt", "all.safetensors", "--to", "safetensors", "--everything")
    assert_equal(load_file(tmp_path / "all.safetensors"), contents(tmp_path / "run.ckpt")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run.ckpt", "out", "--to", "pickle"), "'pickle' is not a format"),
        (("run.ckpt", "run.ckpt", "--to", "hf"), "lie in each other"),
        (("run.ckpt", "out", "--to", "hf", "--max-shard-size", "3GX"), "--max-shard-size: '3GX' is no size"),
        (("run.ckpt", "out", "--to", "dcp", "--weights", "model"), "has no use for weights='model'"),
    ],
)
def test_export_refuses_what_cannot_be(call: Call, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call("export", *arguments)


def test_consolidate_writes_lightnings_file_and_import_reads_it_back(call: Call, tmp_path: Path) -> None:
    code, said = call("consolidate", "run.ckpt", "whole.ckpt")
    assert code == DONE
    assert said.startswith("consolidated run.ckpt to whole.ckpt: lightning, ")
    assert_equal(torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"], weights())
    code, said = call("import", "whole.ckpt", "again.ckpt", "--prefix", "model.")
    assert code == DONE
    assert "imported whole.ckpt to again.ckpt: lightning" in said
    assert "note: Optimizer 0 keeps its state by number" in said
    assert "state_dict.model.net.a" in contents(tmp_path / "again.ckpt")[0]


def test_classes_are_built_where_that_is_said(call: Call, tmp_path: Path) -> None:
    saved(tmp_path / "classes.ckpt", trainer_tree(hyper_parameters={"call": Call}))
    with pytest.raises(CheckpointError, match="objects of the classes"):
        call("consolidate", "classes.ckpt", "whole.ckpt")
    assert call("consolidate", "classes.ckpt", "whole.ckpt", "--weights-only", "false")[0] == DONE
    with pytest.raises(CheckpointError, match="objects of the classes"):
        call("import", "whole.ckpt", "again.ckpt")
    assert call("import", "whole.ckpt", "again.ckpt", "--weights-only", "false")[0] == DONE


def test_import_takes_a_directory_of_deepspeeds_and_the_tag(call: Call, tmp_path: Path) -> None:
    write_rows(tmp_path / "ds", trained([{"one": (2, 3)}]), tag="one")
    write_shards(tmp_path / "ds", trained([{"two": (4,)}], world=3), tag="two")
    code, said = call("import", "--from", "deepspeed", "ds", "latest.ckpt", "--prefix", "net.")
    assert code == DONE
    assert "note: Tag 'two': ZeRO stage 3, written by 3 data-parallel ranks of DeepSpeed 0.19.8" in " ".join(
        said.split()
    )
    assert "state_dict.net.two" in contents(tmp_path / "latest.ckpt")[0]
    code, done = call.json("import", "ds", "one.ckpt", "--tag", "one")
    assert (code, done["format"]) == (DONE, "deepspeed")
    assert "state_dict.one" in contents(tmp_path / "one.ckpt")[0]
    with pytest.raises(CheckpointError, match=r"no checkpoint 'three' \(known: one, two\)"):
        call("import", "ds", "three.ckpt", "--tag", "three")


def test_ls_and_inspect_know_the_directories_of_deepspeed(call: Call, tmp_path: Path) -> None:
    place = write_rows(tmp_path / "ds", trained([{"net.a": (2, 3)}], client={"mine": 1}), stage=1)
    broken = write_rows(tmp_path / "broken", trained([{"net.a": (2, 3)}]))
    (broken / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    code, listed = call.json("ls")
    assert code == DONE
    by_path = {entry["path"]: entry for entry in listed}
    assert by_path.keys() == {"run.ckpt", "ds/global_step10", "broken/global_step10"}
    found = by_path["ds/global_step10"]
    assert (found["by"], found["step"], found["zero"], found["ranks"]) == ("deepspeed", 10, 1, 2)
    assert "is empty" in by_path["broken/global_step10"]["fault"]
    code, said = call("inspect", "ds", "--tensors")
    assert code == DONE
    assert "DeepSpeed 0.19.8" in said
    assert "meshbolt checkpoint import" in said
    assert "net.a" in said
    code, content = call.json("inspect", str(place), "--tensors")
    assert code == DONE
    assert content["tensors"] == {"net.a": {"dtype": "float32", "shape": [2, 3], "bytes": 24}}
    assert content["entries"]["optimizer"] == {"tensors": 3, "bytes": 52}
    assert content["objects"] == {"mine": "int"}
