"""Hugging Face: the same files as `safetensors.py` writes, named as the model inside the LightningModule has them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from meshbolt.checkpoint.formats import safetensors
from meshbolt.checkpoint.formats.options import ExportOptions, OnBytes, Readable
from meshbolt.checkpoint.formats.weights import exported_names
from meshbolt.errors import ConfigError

OPTIONS = (safetensors.OPTIONS | {"config"}) - {"everything"}

_CONFIG = "config.json"
_BESIDE = (_CONFIG, "generation_config.json", "*token*.json", "*token*.model", "vocab.*", "merges.txt", "*.jinja")


class HuggingFaceWriter(safetensors.SafetensorsWriter):
    """Writes a directory that `from_pretrained` takes, given the model's configuration."""

    def __init__(self, reader: Readable, options: ExportOptions) -> None:
        """Plan the shards, and find the files to copy.

        Args:
            reader: the checkpoint; stays open until it is written.
            options: what is exported. Where `strip_prefix` is not given and all weights belong to one attribute of the
                LightningModule, its name is left out.

        Raises:
            ConfigError: there is nothing to export, or no configuration at its path.
            UnsupportedError: a tensor has a dtype that the format does not have.
        """
        prefix = options.strip_prefix
        if prefix is None:
            prefix = common_attribute(list(exported_names(reader, options)))
        super().__init__(reader, dataclasses.replace(options, strip_prefix=prefix or None))
        self._beside = _files_beside(options.config)
        if options.strip_prefix is None and prefix:
            self.notes += (f"Names are without {prefix!r}, which all weights begin with.",)
        if options.config is None:
            self.notes += (f"from_pretrained needs a {_CONFIG} too: copy it there, or give --config.",)

    def write(self, out: Path, *, on_bytes: OnBytes) -> None:
        """Write a directory."""
        super().write(out, on_bytes=on_bytes)
        for name, file in self._beside.items():
            shutil.copyfile(file, out / name)


def common_attribute(names: list[str]) -> str:
    """Return what all names begin with, up to the first dot and with it; empty where they do not."""
    beginnings = {name.partition(".")[0] + "." for name in names}
    return next(iter(beginnings)) if len(beginnings) == 1 and all("." in name for name in names) else ""


def _files_beside(config: str | None) -> dict[str, Path]:
    if config is None:
        return {}
    path = Path(config)
    found = {_CONFIG: path} if path.is_file() else {}
    if path.is_dir():
        found = {file.name: file for pattern in _BESIDE for file in sorted(path.glob(pattern)) if file.is_file()}
    if _CONFIG not in found:
        raise ConfigError(f"config={config!r} is no file, and no directory with a {_CONFIG}. Give the path of either.")
    return found
