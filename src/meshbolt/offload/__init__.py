"""State of a run in a file on a disk, and the way of its chunks through memory and back.

May import: `errors`, `units`. `buffers.py` has memory that a disk reads and writes without the page cache; `scratch.py` makes
the file, `faces.py` is the seam between the engine and the operating system, where tests put faults; `requests.py` has
transfers on their way and the threads that make them, `files.py` a file with both, `counters.py` what it has done so far;
`stream.py` runs an update over chunks while the next is read and the last is written, and `reports.py` has what came of it.
Read `files.py` first.
"""

from meshbolt.offload.buffers import ALIGNMENT_BYTES, aligned_bytes, aligned_empty
from meshbolt.offload.counters import Traffic
from meshbolt.offload.faces import SystemCalls, SystemFace
from meshbolt.offload.files import StateFile
from meshbolt.offload.reports import Span, StreamReport
from meshbolt.offload.requests import Request
from meshbolt.offload.scratch import Disk, disk_of
from meshbolt.offload.stream import Chunk, ChunkStream

__all__ = [
    "ALIGNMENT_BYTES",
    "Chunk",
    "ChunkStream",
    "Disk",
    "Request",
    "Span",
    "StateFile",
    "StreamReport",
    "SystemCalls",
    "SystemFace",
    "Traffic",
    "aligned_bytes",
    "aligned_empty",
    "disk_of",
]
