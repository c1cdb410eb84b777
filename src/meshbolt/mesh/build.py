"""torch's `DeviceMesh` for a `MeshShape`."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshbolt.errors import TopologyError
from meshbolt.mesh.axes import MeshAxis, MeshShape


def build_mesh(shape: MeshShape, *, device_type: str) -> DeviceMesh:
    """Build the mesh with all its axes; to be called once per run, since every call makes new process groups.

    Args:
        shape: sizes of the axes.
        device_type: "cpu" or "cuda".

    Raises:
        TopologyError: the process group has another number of ranks than the shape.
    """
    if dist.get_world_size() != shape.world_size:
        raise TopologyError(
            f"The mesh {shape} needs {shape.world_size} ranks, but the process group has {dist.get_world_size()}. "
            "Start as many ranks as the axes multiply to."
        )
    names = tuple(axis.value for axis in MeshAxis)
    return init_device_mesh(device_type, shape.sizes(), mesh_dim_names=names)
