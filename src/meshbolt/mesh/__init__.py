"""The mesh of ranks: named axes, their sizes, and who stands where.

May import: `errors` and `compat`. `axes.py` is pure arithmetic and needs no process group; `build.py` makes torch's
`DeviceMesh` of it. To add an axis, add a member to `MeshAxis` and a size to `MeshShape`. Read `axes.py` first.
"""

from meshbolt.mesh.axes import MeshAxis, MeshShape, shape_for
from meshbolt.mesh.build import build_mesh, data_parallel_group, same_samples_group, stage_group

__all__ = [
    "MeshAxis",
    "MeshShape",
    "build_mesh",
    "data_parallel_group",
    "same_samples_group",
    "shape_for",
    "stage_group",
]
