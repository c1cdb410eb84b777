"""What is damaged, incomplete or not read is refused with its name, what is there, and what to do."""

from __future__ import annotations

import argparse
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.deepspeed_fixtures import (
    deepspeeds_classes,
    trained,
    write,
    write_pipeline,
    write_plain,
    write_rows,
    write_shards,
    write_universal,
)

from meshbolt.checkpoint.deepspeed import open_deepspeed
from meshbolt.checkpoint.formats import import_checkpoint
from meshbolt.checkpoint.reader import CheckpointReader
from meshbolt.errors import CheckpointError, UnsupportedError

SHAPES = [{"a.weight": (5, 3), "a.bias": (5,)}, {"b.weight": (7,)}]
TAG = "global_step10"


class Custom:
    """A class of the user's."""


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Read a file, change its content, and write it again."""
    with deepspeeds_classes():
        content = torch.load(path, weights_only=False)
    change(content)
    write(path, content)


def test_a_class_of_the_users_is_refused_by_name_and_built_where_it_is_trusted(tmp_path: Path) -> None:
    write_rows(tmp_path, trained(SHAPES, client={"mine": Custom()}))
    with pytest.raises(CheckpointError, match=r"classes \S*test_bad_input\.Custom, and .*weights_only=False") as raised:
        open_deepspeed(tmp_path)
    assert "deepspeed.runtime" not in str(raised.value), "these are known"
    assert "mp_rank_00_model_states.pt" in str(raised.value)
    assert type(open_deepspeed(tmp_path, weights_only=False).client_state["mine"]).__name__ == "Custom"


def test_a_class_in_a_file_of_torchs_old_kind_is_refused_by_name(tmp_path: Path) -> None:
    write_rows(tmp_path, trained(SHAPES, client={"mine": Custom()}), old=True)
    with pytest.raises(CheckpointError, match=r"classes \S*test_bad_input\.Custom"):
        open_deepspeed(tmp_path)


def test_a_class_of_a_package_that_is_not_here_is_named(tmp_path: Path) -> None:
    place = write_rows(tmp_path, trained(SHAPES, client={"mine": Custom()}))
    path = place / "mp_rank_00_model_states.pt"
    content = path.read_bytes()
    name = Custom.__module__.encode()
    path.write_bytes(content.replace(name, b"x" * len(name)))
    with pytest.raises(CheckpointError, match="holds objects of a package that is not here"):
        open_deepspeed(tmp_path, weights_only=False)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("keep", "why"),
    [(0, "is empty: it was not written to its end"), (700, r"\(700 bytes\) is cut off: .* end is missing. Copy it")],
)
def test_a_file_that_was_not_written_to_its_end_is_named(stage: int, keep: int, why: str, tmp_path: Path) -> None:
    place = (write_shards if stage == 3 else write_rows)(tmp_path, trained(SHAPES))
    path = place / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"zero_pp_rank_1_mp_rank_00_optim_states\.pt {why}"):
        open_deepspeed(tmp_path)


@pytest.mark.parametrize(
    ("missing", "why"),
    [
        (
            "zero_pp_rank_2_mp_rank_00_optim_states.pt",
            r"3 data-parallel ranks, and has .* of 2: those of ranks \[2\] are missing",
        ),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", r"files of data-parallel ranks \[1\] are missing"),
        ("mp_rank_00_model_states.pt", "has no mp_rank_"),
    ],
)
def test_a_file_that_is_missing_is_named(missing: str, why: str, tmp_path: Path) -> None:
    place = write_rows(tmp_path, trained(SHAPES, world=3))
    (place / missing).unlink()
    with pytest.raises(CheckpointError, match=why):
        open_deepspeed(tmp_path)


def test_a_models_file_of_stage_3_that_is_missing_is_named(tmp_path: Path) -> None:
    place = write_shards(tmp_path, trained(SHAPES, world=3))
    (place / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    why = r"3 data-parallel ranks have saved it, and there are model files of 2 in slot 0: those of ranks \[2\] are missing"
    with pytest.raises(CheckpointError, match=why):
        open_deepspeed(tmp_path)


def test_models_files_of_stage_3_that_are_missing_but_one_are_named_before_parts_of_a_frozen_weight(
    tmp_path: Path,
) -> None:
    place = write_shards(tmp_path, trained(SHAPES, world=2, frozen={"frozen.weight": torch.randn(5, 7)}))
    (place / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"there are model files of 1 in slot 0: those of ranks \[1\] are missing"
    ):
        open_deepspeed(tmp_path)


@pytest.mark.parametrize(
    ("begins", "why"),
    [
        (bytes(4), "is damaged: it begins with the bytes 00 00 00 00"),
        (b"\x80\x02\x00\x00", "cannot be read"),  # as a pickle does
    ],
)
def test_a_damaged_file_is_said_to_be_so_and_nobody_is_told_to_trust_it(
    begins: bytes, why: str, tmp_path: Path
) -> None:
    place = write_rows(tmp_path, trained(SHAPES))
    path = place / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(begins + bytes(path.stat().st_size - 4))
    with pytest.raises(CheckpointError, match=rf"zero_pp_rank_1_mp_rank_00_optim_states\.pt .*{why}") as raised:
        open_deepspeed(tmp_path)
    assert "weights_only" not in str(raised.value)


def test_the_arguments_of_a_script_and_a_defaultdict_are_plain_data(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=0.1, betas=(0.9, 0.95))
    write_rows(tmp_path / "ds", trained(SHAPES, client={"args": arguments, "seen": defaultdict(list, {"a": [1]})}))
    client = open_deepspeed(tmp_path / "ds").client_state
    assert client == {"args": arguments, "seen": {"a": [1]}}
    import_checkpoint(tmp_path / "ds", tmp_path / "made.ckpt")
    with CheckpointReader(tmp_path / "made.ckpt") as reader:
        assert reader.objects()["client_state"] == client


def test_a_class_in_the_arguments_of_a_script_is_refused_by_name(tmp_path: Path) -> None:
    write_rows(tmp_path, trained(SHAPES, client={"args": argparse.Namespace(mine=Custom())}))
    with pytest.raises(CheckpointError, match=r"classes \S*test_bad_input\.Custom, and .*--weights-only false"):
        open_deepspeed(tmp_path)


def test_files_left_over_from_more_ranks_are_named(tmp_path: Path) -> None:
    place = write_rows(tmp_path, trained(SHAPES, world=2))
    shutil.copy(
        place / "zero_pp_rank_1_mp_rank_00_optim_states.pt", place / "zero_pp_rank_2_mp_rank_00_optim_states.pt"
    )
    with pytest.raises(CheckpointError, match=r"those of ranks \[2\] are left over from another save"):
        open_deepspeed(tmp_path)


def test_files_of_different_saves_are_not_mixed(tmp_path: Path) -> None:
    place = write_shards(tmp_path, trained(SHAPES))
    changed(place / "zero_pp_rank_1_mp_rank_00_model_states.pt", lambda content: content.update(global_steps=11))
    with pytest.raises(
        CheckpointError, match=r"different saves: zero_pp_rank_0\S* after 10 steps, zero_pp_rank_1\S* after 11"
    ):
        open_deepspeed(tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_files_of_different_steps_are_not_mixed(stage: int, tmp_path: Path) -> None:
    writer = write_shards if stage == 3 else write_rows
    place = writer(tmp_path, trained(SHAPES))
    later = writer(tmp_path / "later", trained(SHAPES, step=4))
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(later / name, place / name)
    with pytest.raises(CheckpointError, match=r"different numbers of steps: 'step' of 'a\.weight' is \[3\.0, 4\.0\]"):
        open_deepspeed(tmp_path)


def test_optimizer_files_of_different_stages_are_not_mixed(tmp_path: Path) -> None:
    place = write_rows(tmp_path, trained(SHAPES), stage=1)
    other = write_rows(tmp_path / "other", trained(SHAPES), stage=2)
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(other / name, place / name)
    with pytest.raises(CheckpointError, match=r"different stages of ZeRO, \[1, 2\]"):
        open_deepspeed(tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_optimizer_files_of_another_model_are_refused(stage: int, tmp_path: Path) -> None:
    writer = write_shards if stage == 3 else write_rows
    place = writer(tmp_path, trained(SHAPES))
    other = writer(tmp_path / "other", trained([{"a": (3,)}, {"b": (4,)}]))
    for path in other.glob("*_optim_states.pt"):
        shutil.copy(path, place / path.name)
    why = {
        2: r"2 groups of \[1, 1\] parameters, and the model's file has groups of \[2, 1\]",
        3: "have .* master weights by rank",
    }
    with pytest.raises(CheckpointError, match=why[stage]):
        open_deepspeed(tmp_path)


def test_a_part_of_another_length_is_refused(tmp_path: Path) -> None:
    place = write_rows(tmp_path, trained(SHAPES))

    def shorten(content: dict[str, Any]) -> None:
        masters = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        masters[0] = masters[0][:-3]

    changed(place / "zero_pp_rank_0_mp_rank_00_optim_states.pt", shorten)
    with pytest.raises(CheckpointError, match=r"have \[17\] master weights .* make 20"):
        open_deepspeed(tmp_path)


def test_without_optimizer_files_the_weights_of_stage_2_are_those_of_the_model(tmp_path: Path) -> None:
    expected = trained(SHAPES)
    place = write_rows(tmp_path, expected)
    for path in place.glob("*_optim_states.pt"):
        path.unlink()
    opened = open_deepspeed(tmp_path)
    assert opened.optimizer is None
    assert "without master weights" in opened.notes[0]
    assert torch.equal(opened.weights["a.weight"], expected.masters["a.weight"].bfloat16())


def test_without_optimizer_files_stage_3_has_no_weights(tmp_path: Path) -> None:
    place = write_shards(tmp_path, trained(SHAPES))
    for path in place.glob("*_optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="with ZeRO-3 all weights are in these"):
        open_deepspeed(tmp_path)


def test_a_latest_that_names_no_save_is_refused_with_those_that_are_there(tmp_path: Path) -> None:
    write_rows(tmp_path, trained(SHAPES), tag="global_step10")
    (tmp_path / "latest").write_text("global_step20\n")
    with pytest.raises(
        CheckpointError, match=r"'global_step20', which its file 'latest' names \(did you mean 'global_step10'"
    ):
        open_deepspeed(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'other' \(known: global_step10\)"):
        open_deepspeed(tmp_path, "other")


def test_of_several_saves_without_a_latest_none_is_guessed(tmp_path: Path) -> None:
    for tag in ("one", "two"):
        write_rows(tmp_path, trained(SHAPES), tag=tag)
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"several checkpoints: one, two\. Name one of them as the tag"):
        open_deepspeed(tmp_path)
    assert open_deepspeed(tmp_path, "one").tag == "one"


def test_what_is_no_checkpoint_of_deepspeeds_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint of DeepSpeed's"):
        open_deepspeed(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_deepspeed(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file, and DeepSpeed's checkpoint is a directory"):
        open_deepspeed(tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("layer_1_expert_0_mp_rank_00_model_states.pt", "experts of a mixture"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts of a mixture"),
        ("mp_rank_01_model_states.pt", "slices of tensor parallelism.*ds_to_universal"),
        ("offloaded_tensors", "swap files, which are not read"),
    ],
)
def test_what_is_not_read_is_refused_with_a_way_out(file: str, why: str, tmp_path: Path) -> None:
    place = write_rows(tmp_path, trained(SHAPES))
    shutil.copy(place / "mp_rank_00_model_states.pt", place / file)
    with pytest.raises(UnsupportedError, match=why):
        open_deepspeed(tmp_path)


def test_slices_of_a_layer_are_refused(tmp_path: Path) -> None:
    place = write_pipeline(
        tmp_path, [trained([{"0.weight": (3, 3)}]), trained([{"1.weight": (2, 3)}])], {0: "0.", 1: "1."}
    )
    (place / "layer_00-model_states.pt").rename(place / "layer_00-model_00-model_states.pt")
    shutil.copy(place / "layer_00-model_00-model_states.pt", place / "layer_00-model_01-model_states.pt")
    with pytest.raises(UnsupportedError, match="layer 0 in several files"):
        open_deepspeed(tmp_path)


def test_a_conversion_that_was_not_finished_is_refused(tmp_path: Path) -> None:
    place = write_universal(tmp_path, trained(SHAPES), stage=2)
    (place / "zero" / "a.bias" / "fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.bias/fp32\.pt is missing: the conversion was not finished"):
        open_deepspeed(tmp_path)


def test_a_universal_save_of_tensor_parallel_ranks_is_read_if_what_is_not_trained_is_whole(tmp_path: Path) -> None:
    expected = trained(SHAPES, frozen={"old": torch.randn(4)})
    place = write_universal(tmp_path, expected, stage=2)
    second = place / "mp_rank_01_model_states.pt"
    shutil.copy(place / "mp_rank_00_model_states.pt", second)
    changed(second, lambda content: content["module"].update({"a.weight": torch.zeros(2, 3)}))
    opened = open_deepspeed(tmp_path)
    assert torch.equal(opened.weights["a.weight"], expected.masters["a.weight"])
    changed(second, lambda content: content["module"].update(old=torch.zeros(2)))
    with pytest.raises(UnsupportedError, match="different values of 'old', which is not trained"):
        open_deepspeed(tmp_path)


def test_what_deepspeeds_converter_mixes_up_is_refused(tmp_path: Path) -> None:
    place = write_universal(tmp_path, trained(SHAPES), stage=2)
    path = place / "mp_rank_00_model_states.pt"
    changed(path, lambda content: content["ds_config"].update(zero_optimization={"round_robin_gradients": True}))
    with pytest.raises(CheckpointError, match="cuts out at wrong places"):
        open_deepspeed(tmp_path)


def test_an_optimizer_that_keeps_its_state_in_another_form_is_left_out_and_named(tmp_path: Path) -> None:
    place = write_rows(tmp_path, trained(SHAPES))
    for path in place.glob("*_optim_states.pt"):
        changed(
            path,
            lambda content: content["optimizer_state_dict"]["base_optimizer_state"]["state"][0].update(
                qmap=torch.ones(256)
            ),
        )
    opened = open_deepspeed(tmp_path)
    assert opened.optimizer is None
    assert opened.notes == ("Its optimizer keeps qmap in a form that is not known: its state is left out.",)


def test_master_weights_that_are_not_the_models_are_left_out(tmp_path: Path) -> None:
    place = write_plain(tmp_path, trained(SHAPES), kind="flat")

    def spoil(content: dict[str, Any]) -> None:
        content["optimizer"]["fp32_groups_flat"][0] += 1

    changed(place / "mp_rank_00_model_states.pt", spoil)
    opened = open_deepspeed(tmp_path)
    assert opened.optimizer is None
    assert "cannot be found out" in opened.notes[0]


def test_a_file_without_an_entry_says_so(tmp_path: Path) -> None:
    place = write_rows(tmp_path, trained(SHAPES))
    changed(place / "mp_rank_00_model_states.pt", lambda content: content.pop("module"))
    with pytest.raises(CheckpointError, match="has no entry 'module'"):
        open_deepspeed(tmp_path)
    changed(place / "mp_rank_00_model_states.pt", lambda content: content.update(module={}))
    path = place / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    changed(path, lambda content: content["optimizer_state_dict"].pop("base_optimizer_state"))
    with pytest.raises(CheckpointError, match=r"something in it is not as DeepSpeed writes it .*base_optimizer_state"):
        open_deepspeed(tmp_path)
