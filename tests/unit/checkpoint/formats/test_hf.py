"""The layout that Hugging Face's `from_pretrained` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.checkpoint.formats_support import saved, weights

from meshbolt.checkpoint.formats import ExportOptions, export_checkpoint
from meshbolt.errors import ConfigError


def test_the_attribute_that_all_weights_belong_to_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    done = export_checkpoint(saved(tmp_path / "run.ckpt"), tmp_path / "hf", to="hf")
    assert load_file(tmp_path / "hf/model.safetensors").keys() == {name.removeprefix("net.") for name in weights()}
    assert done.notes == (
        "Names are without 'net.', which all weights begin with.",
        "from_pretrained needs a config.json too: copy it there, or give --config.",
    )


def test_names_stay_where_weights_have_no_attribute_in_common_or_an_empty_prefix_is_given(tmp_path: Path) -> None:
    saved(tmp_path / "two.ckpt", {"state_dict": {"net.w": torch.ones(2), "head.w": torch.ones(2)}})
    export_checkpoint(tmp_path / "two.ckpt", tmp_path / "two", to="hf")
    assert load_file(tmp_path / "two/model.safetensors").keys() == {"net.w", "head.w"}
    options = ExportOptions(strip_prefix="")
    export_checkpoint(saved(tmp_path / "run.ckpt"), tmp_path / "hf", to="hf", options=options)
    assert load_file(tmp_path / "hf/model.safetensors").keys() == weights().keys()


def test_the_configuration_is_copied_from_a_file_or_with_the_tokenizer_from_a_directory(tmp_path: Path) -> None:
    path, model = saved(tmp_path / "run.ckpt"), tmp_path / "pretrained"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.bin"):
        (model / name).write_text(name)
    export_checkpoint(path, tmp_path / "all", to="hf", options=ExportOptions(config=str(model)))
    assert sorted(file.name for file in (tmp_path / "all").iterdir()) == [
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    (tmp_path / "other.json").write_text("other")
    done = export_checkpoint(
        path, tmp_path / "one", to="hf", options=ExportOptions(config=str(tmp_path / "other.json"))
    )
    assert (tmp_path / "one/config.json").read_text() == "other"
    assert not any("config.json" in note for note in done.notes)
    with pytest.raises(ConfigError, match=r"is no file, and no directory with a config\.json"):
        export_checkpoint(path, tmp_path / "none", to="hf", options=ExportOptions(config=str(tmp_path)))


def test_transformers_loads_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hf` has it")
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # its bars would start a thread
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=6)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "pretrained")
    state = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    saved(tmp_path / "run.ckpt", {"state_dict": state})
    options = ExportOptions(config=str(tmp_path / "pretrained"), max_shard_bytes=1000)
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "hf", to="hf", options=options)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
