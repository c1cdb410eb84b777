"""Where DeepSpeed puts its files: finding the directory of one save, and which files of which ranks it has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meshbolt.errors import CheckpointError, UnsupportedError, did_you_mean

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<data>\d+)_)?mp_rank_(?P<slot>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(?P<data>\d+)_mp_rank_(?P<slot>\d+)_?optim_states\.pt")
_LAYER = re.compile(r"layer_(?P<layer>\d+)(?:-(?P<part>[\w-]+?))?-model_states\.pt")
_EXPERTS = re.compile(
    r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim_states\.pt"
)
_UNIVERSAL = "zero"
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files of one save.

    Attributes:
        directory: that they are in.
        tag: its name.
        models: files of weights and counters, by their slot (the stage of a pipeline) and data-parallel rank; the latter is 0
            where there is one for all.
        optimizers: files of optimizer state, likewise.
        layers: the file of each layer of a pipeline, by its number.
        universal: the directory with one directory a parameter, where it was made universal.
    """

    directory: Path
    tag: str
    models: Mapping[tuple[int, int], Path]
    optimizers: Mapping[tuple[int, int], Path]
    layers: Mapping[int, Path] = field(default_factory=dict)
    universal: Path | None = None

    @property
    def slots(self) -> list[int]:
        """Numbers of the slots: one, or the stages of a pipeline."""
        return sorted({slot for slot, _ in self.models})

    def models_of(self, slot: int) -> list[Path]:
        """Return the files of one slot by data-parallel rank.

        Raises:
            CheckpointError: one is missing.
        """
        return self._ranks(self.models, slot)

    def optimizers_of(self, slot: int) -> list[Path]:
        """Return the files of one slot by data-parallel rank; none where there are none.

        Raises:
            CheckpointError: one between others is missing.
        """
        return self._ranks(self.optimizers, slot)

    def _ranks(self, files: Mapping[tuple[int, int], Path], slot: int) -> list[Path]:
        found = {rank: path for (number, rank), path in files.items() if number == slot}
        if absent := sorted(set(range(max(found, default=-1) + 1)) - found.keys()):
            known = found[max(found)].name
            raise CheckpointError(
                f"the files of data-parallel ranks {absent} are missing, such as the one between those up to {known}"
            )
        return [found[rank] for rank in sorted(found)]


def is_deepspeed(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a directory as DeepSpeed saves it: of one save, or of several with their `latest`."""
    directory = Path(path)
    return is_deepspeed_save(directory) or (directory.is_dir() and bool(_tags(directory)))


def is_deepspeed_save(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a directory of one save of DeepSpeed's: one with a tag as its name."""
    directory = Path(path)
    return directory.is_dir() and _is_tag(directory)


def find_layout(path: str | os.PathLike[str], *, tag: str | None = None) -> Layout:
    """Return the files of one save.

    Args:
        path: of the directory that DeepSpeed was told to save to, or of one save in it.
        tag: which of the saves; None: the one that `latest` names.

    Raises:
        CheckpointError: there is none, or it is not known which one is meant.
        UnsupportedError: it has experts of a mixture, slices of tensor parallelism, or state that is in NVMe files only.
    """
    root = Path(path)
    directory = _save_in(root, tag)
    names = sorted(entry.name for entry in directory.iterdir())
    if any(map(_EXPERTS.fullmatch, names)):
        raise UnsupportedError(
            f"{directory} has the experts of a mixture in files of their own, which are not read. Save the model's whole state "
            "dict with DeepSpeed, and import that."
        )
    if "offloaded_tensors" in names:
        raise UnsupportedError(
            f"{directory} has the optimizer's state and the master weights in offloaded_tensors, as copies of DeepSpeed's swap "
            'files, which are not read. Load it with DeepSpeed once more with offload_optimizer on "cpu" or "none", and save.'
        )
    layers = dict(_layers(directory, names))
    universal = directory / _UNIVERSAL
    layout = Layout(
        directory=directory,
        tag=directory.name,
        models={_slot_of(match): directory / match[0] for match in map(_MODEL.fullmatch, names) if match},
        optimizers={_slot_of(match): directory / match[0] for match in map(_OPTIMIZER.fullmatch, names) if match},
        layers=layers,
        universal=universal if universal.is_dir() else None,
    )
    if not layout.models:
        raise CheckpointError(
            f"{directory} has no mp_rank_..._model_states.pt, without which its parameters are not known. It has: "
            f"{_some(names)}. Copy the whole directory that DeepSpeed has written."
        )
    return layout


def _slot_of(match: re.Match[str]) -> tuple[int, int]:
    return int(match["slot"]), int(match["data"] or 0)


def _layers(directory: Path, names: list[str]) -> Iterator[tuple[int, Path]]:
    seen: dict[int, str] = {}
    for match in filter(None, map(_LAYER.fullmatch, names)):
        number = int(match["layer"])
        if number in seen:
            raise UnsupportedError(
                f"{directory} has layer {number} in several files ({seen[number]}, {match[0]}): slices of tensor parallelism, "
                "which do not say how they belong together. Make it universal with DeepSpeed's ds_to_universal.py, and "
                "import that."
            )
        seen[number] = match[0]
        yield number, directory / match[0]


def _save_in(root: Path, tag: str | None) -> Path:
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise CheckpointError(
            f"{root} {what}, and DeepSpeed's checkpoint is a directory. Give the one that it was saved to"
        )
    tags = _tags(root)
    if tag is not None:
        return _named(root, tag, tags=tags)
    for name in (LATEST, LATEST_UNIVERSAL):
        if (root / name).is_file():
            found = (root / name).read_text(errors="replace").strip()
            return _named(root, found, tags=tags, by=f"which its file {name!r} names")
    if _is_tag(root):
        return root
    if len(tags) == 1:
        return root / tags[0]
    if not tags:
        raise CheckpointError(
            f"{root} holds no checkpoint of DeepSpeed's: no file {LATEST!r}, and no directory with ..._model_states.pt. It has: "
            f"{_some(sorted(entry.name for entry in root.iterdir()))}. Give the directory that it was saved to"
        )
    raise CheckpointError(
        f"{root} has no file {LATEST!r}, and several checkpoints: {_some(tags)}. Name one of them as the tag"
    )


def _named(root: Path, tag: str, *, tags: list[str], by: str = "") -> Path:
    if tag in tags:
        return root / tag
    if (root.name == tag) and _is_tag(root):
        return root
    known = did_you_mean(tag, tags) if tags else ", nor any other"
    raise CheckpointError(
        f"{root} has no checkpoint {tag!r}{by and ', ' + by}{known}. Give the tag of one that is there"
    )


def _tags(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and _is_tag(entry))


def _is_tag(directory: Path) -> bool:
    try:
        names = [entry.name for entry in directory.iterdir()]
    except PermissionError:
        return False
    return any(pattern.fullmatch(name) for name in names for pattern in (_MODEL, _OPTIMIZER, _LAYER))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
