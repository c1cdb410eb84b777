"""torch's `DeviceMesh` for a `MeshShape`."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshbolt.compat import flattened_group, set_group_timeout
from meshbolt.errors import TopologyError
from meshbolt.mesh.axes import MeshAxis, MeshShape


def build_mesh(shape: MeshShape, *, device_type: str, timeout: timedelta | None = None) -> DeviceMesh:
    """Build the mesh with all its axes; to be called once per run, since every call makes new process groups.

    Args:
        shape: sizes of the axes.
        device_type: "cpu" or "cuda".
        timeout: how long a collective along an axis waits for its peers; None for torch's default.

    Raises:
        TopologyError: the process group has another number of ranks than the shape.
    """
    if dist.get_world_size() != shape.world_size:
        raise TopologyError(
            f"The mesh {shape} needs {shape.world_size} ranks, but the process group has {dist.get_world_size()}. "
            "Start as many ranks as the axes multiply to."
        )
    names = tuple(shape.sizes())
    mesh = init_device_mesh(device_type, tuple(shape.sizes().values()), mesh_dim_names=names)
    if timeout is not None:
        # torch takes it only together with options of one backend. An axis may be the default group, whose timeout was
        # set by whoever made it.
        for group in {mesh.get_group(name) for name in names} - {dist.group.WORLD}:
            set_group_timeout(group, timeout)
    return mesh


def data_parallel_group(mesh: DeviceMesh, *, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return the group of the ranks that see different samples with this rank's share of the layers; makes one where needed.

    Args:
        mesh: of all axes.
        timeout: as for `build_mesh`.
    """
    axes = (MeshAxis.DP_REPLICATE.value, MeshAxis.DP_SHARD.value)
    if mesh.ndim == len(axes):
        group = dist.group.WORLD
        if group is None:
            raise AssertionError("A mesh needs an initialised process group.")
        return group
    group = flattened_group(mesh, axes)
    if timeout is not None:
        set_group_timeout(group, timeout)
    return group
