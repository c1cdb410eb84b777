"""torch's `DeviceMesh` for a `MeshShape`."""

from __future__ import annotations

import math
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
    return _group_of(mesh, (MeshAxis.DP_REPLICATE.value, MeshAxis.DP_SHARD.value), timeout=timeout)


def same_samples_group(mesh: DeviceMesh, *, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return the group of the ranks that see the same samples as this one: they share its layers, or are in its pipeline.

    Args:
        mesh: of all axes, at least one of these.
        timeout: as for `build_mesh`.
    """
    names = mesh.mesh_dim_names or ()
    axes = tuple(axis.value for axis in (MeshAxis.PP, MeshAxis.TP) if axis.value in names)
    return _group_of(mesh, axes, timeout=timeout)


def stage_group(mesh: DeviceMesh, *, timeout: timedelta | None = None) -> dist.ProcessGroup:
    """Return the group of the ranks that hold parts of the same parameters as this one: along all axes but the pipeline's.

    Args:
        mesh: of all axes.
        timeout: as for `build_mesh`.
    """
    names = mesh.mesh_dim_names or ()
    return _group_of(mesh, tuple(name for name in names if name != MeshAxis.PP.value), timeout=timeout)


def _group_of(mesh: DeviceMesh, axes: tuple[str, ...], *, timeout: timedelta | None) -> dist.ProcessGroup:
    world = dist.group.WORLD
    if world is None:
        raise AssertionError("A mesh needs an initialised process group.")
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=True))
    if math.prod(sizes[axis] for axis in axes) == world.size():
        return world
    group = mesh.get_group(axes[0]) if len(axes) == 1 else flattened_group(mesh, axes)
    if timeout is not None and group is not world:
        set_group_timeout(group, timeout)
    return group
