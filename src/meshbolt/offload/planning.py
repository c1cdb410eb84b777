"""What an optimizer's state needs outside of the model, known before anything is made.

layout = layout_of(optimizer, units={"layers.0": [...], "layers.1": [...]})
needs = needs_of(layout, device=torch.device("cuda"), in_file=False)
# As much on the device as fits: a fraction counts bytes of all that could leave.
fraction = max(0.0, 1.0 - free_bytes / layout.bytes_of(stays=False))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from meshbolt.compat import local_tensor
from meshbolt.errors import UnsupportedError
from meshbolt.offload.entries import MASTER
from meshbolt.offload.layout import CHUNK_BYTES, Layout, Slot, which_stay
from meshbolt.offload.parameters import ParameterFile
from meshbolt.offload.passing import AHEAD
from meshbolt.offload.rules import Rule, Settings, rule_of, settings_of
from meshbolt.offload.stream import BUFFERS

Wanted = tuple[str, nn.Parameter, Settings]
"""A parameter's unit, the parameter, and the settings of its group."""


@dataclass(frozen=True)
class Needs:
    """What one rank needs for the state of one optimizer, and for the way of chunks.

    Attributes:
        host_bytes: of host memory, locked where the model is on a GPU.
        device_bytes: of the model's device, beside the model.
        file_bytes: of the disk.
    """

    host_bytes: int
    device_bytes: int
    file_bytes: int


def layout_of(
    optimizer: Optimizer,
    *,
    units: Mapping[str, Sequence[nn.Parameter]],
    fraction: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    full_precision: bool = True,
    parameters: ParameterFile | None = None,
) -> Layout:
    """Return how `OffloadedOptimizer` would lay the state out; takes no memory.

    Args:
        optimizer: as for `OffloadedOptimizer`, like all that follows.
        units: those of its parameters that need a gradient count.
        fraction: of the bytes leaves the device.
        chunk_bytes: the most that is updated at once.
        full_precision: 16-bit parameters are updated in float32.
        parameters: the file in which shards lie; None: they lie in memory.

    Raises:
        UnsupportedError: a setting of the optimizer, or a parameter, does not go with this.
    """
    groups = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    settings = [settings_of(optimizer, group) for group in optimizer.param_groups]
    wanted = [
        (unit, p, settings[groups[p]])
        for unit, parameters in units.items()
        for p in parameters
        if p in groups and p.requires_grad
    ]
    devices = {local_tensor(p).device.type for _, p, _ in wanted}
    places = Places(
        fraction=fraction, full_precision=full_precision, hosts_others=len(devices) > 1, parameters=parameters
    )
    slots = slots_of(wanted, rule=rule_of(optimizer), places=places)
    return Layout(slots, chunk_bytes=chunk_bytes, in_pages=parameters is not None)


def needs_of(layout: Layout, *, device: torch.device, in_file: bool) -> Needs:
    """Return what a layout needs.

    Args:
        layout: of one optimizer.
        device: the model's.
        in_file: what leaves the device lies in a file, and not in host memory.
    """
    columns = [chunk.column_bytes for chunk in layout.chunks if not chunk.stays]
    stage_bytes = max(columns, default=0) if device.type != "cpu" else 0
    state_bytes = BUFFERS * layout.largest_chunk_bytes if in_file else layout.bytes_of(stays=False)
    stays_bytes = layout.bytes_of(stays=True)
    return Needs(
        host_bytes=state_bytes + (1 + AHEAD) * stage_bytes + (stays_bytes if device.type == "cpu" else 0),
        device_bytes=(stays_bytes if device.type != "cpu" else 0) + 2 * stage_bytes,
        file_bytes=layout.file_bytes if in_file else 0,
    )


@dataclass(frozen=True, kw_only=True)
class Places:
    """What decides where the state of a parameter lies.

    Attributes:
        fraction: of the bytes leaves the device.
        full_precision: 16-bit parameters are updated in float32.
        hosts_others: some parameters lie on the host and others on a GPU; the state of these stays there.
        parameters: the file in which shards lie; None: they lie in memory.
    """

    fraction: float = 1.0
    full_precision: bool = True
    hosts_others: bool = False
    parameters: ParameterFile | None = None

    def must_stay(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter lies on a GPU where others lie on the host."""
        return self.hosts_others and local_tensor(parameter).device.type != "cpu"

    def is_in_file(self, parameter: nn.Parameter) -> bool:
        """Return whether a parameter lies in the file of shards."""
        return self.parameters is not None and self.parameters.place_of(local_tensor(parameter)) is not None


def slots_of(wanted: Sequence[Wanted], *, rule: Rule, places: Places) -> list[Slot]:
    """Return what parameters need, some of them on their own device.

    Args:
        wanted: units, parameters, and the settings of their groups; in the order of the forward pass.
        rule: the optimizer's.
        places: what decides where it lies.

    Raises:
        UnsupportedError: a parameter is not of floating-point numbers.
    """
    leaving = [_slot(*each, rule=rule, stays=False, places=places) for each in wanted]
    budget = round((1.0 - places.fraction) * sum(slot.num_bytes for slot in leaving))
    stay = which_stay([slot.num_bytes for slot in leaving], budget=budget)
    return [
        _slot(*each, rule=rule, stays=True, places=places) if stays or places.must_stay(each[1]) else slot
        for each, slot, stays in zip(wanted, leaving, stay, strict=True)
    ]


def _slot(unit: str, parameter: nn.Parameter, settings: Settings, *, rule: Rule, stays: bool, places: Places) -> Slot:
    local = local_tensor(parameter)
    if not local.dtype.is_floating_point:
        raise UnsupportedError(
            f"A parameter of shape {tuple(parameter.shape)} of unit {unit!r} is {local.dtype}, and its optimizer state was "
            "to lie outside of the model, which it can for floating-point parameters only. Train without offload."
        )
    dtype = torch.float32 if places.full_precision and local.dtype.itemsize < torch.float32.itemsize else local.dtype
    columns = tuple(rule.columns(settings))
    is_near = stays or (local.device.type == "cpu" and not places.is_in_file(parameter))
    is_in_place = dtype == local.dtype and is_near
    return Slot(
        unit=unit,
        numel=local.numel(),
        dtype=dtype,
        columns=columns if is_in_place else (MASTER, *columns),
        stays=stays,
    )
