from __future__ import annotations

from pathlib import Path

import pytest

from meshbolt.cli.keys import check_keys, nearest, top_level_keys, trainer_keys
from meshbolt.config.load import load
from meshbolt.errors import ConfigError


def test_the_keys_are_those_that_fit_and_the_trainer_take() -> None:
    assert {"trainer", "model", "data", "ckpt_path", "seed_everything", "meta"} <= top_level_keys()
    assert not {"self", "datamodule", "train_dataloaders"} & top_level_keys()
    assert {"devices", "strategy", "max_steps"} <= trainer_keys()


@pytest.mark.parametrize(
    ("written", "override", "said"),
    [
        ("trainr: {devices: 3}", None, r"trainr \(.*f\.yaml\) is not a key of `meshbolt fit`: did you mean 'trainer'"),
        ("{}", ("trainr.devices", "3"), r"trainr \(command line\) .*'trainer'"),
        ("{}", ("trainer.max_step", "3"), r"trainer\.max_step \(command line\) .*did you mean 'max_steps'"),
        ("trainer: {qqq: 3}", None, r"qqq .* is not a flag of the Trainer\. `meshbolt fit --help`"),
        ("trainer: {qqq: {}}", None, r"trainer\.qqq \(.*f\.yaml\)"),
        ("trainer: 3", None, "trainer=3 has no flags"),
    ],
)
def test_other_keys_are_refused_with_where_they_stand_and_the_nearest(
    tmp_path: Path, written: str, override: tuple[str, str] | None, said: str
) -> None:
    (tmp_path / "f.yaml").write_text(written)

    with pytest.raises(ConfigError, match=said):
        check_keys(load([tmp_path / "f.yaml"], overrides=[override] if override else []))


def test_a_configuration_with_all_its_parts_passes(tmp_path: Path) -> None:
    text = "seed_everything: 1\ntrainer: {devices: 2, callbacks: []}\nmodel: {dim: 3}\ndata: {}\nckpt_path: null\nmeta: auto\n"
    (tmp_path / "f.yaml").write_text(text)

    check_keys(load([tmp_path / "f.yaml"], overrides=[("trainer.callbacks+", "{class_path: a.B}")]))


def test_a_name_like_no_other_is_not_guessed_at() -> None:
    assert nearest("qqq", ["devices"]).startswith(". `meshbolt fit --help`")
