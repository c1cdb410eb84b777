"""State of a run outside of its model, in host memory or in a file on a disk, and the updates that are made there.

May import: `errors`, `units`, `compat`.

Of files: `buffers.py` has memory that a disk reads and writes without the page cache; `scratch.py` makes the file, `faces.py` is
the seam between the engine and the operating system, where tests put faults; `requests.py` has transfers on their way and the
threads that make them, `uring.py` makes them by io_uring, `files.py` is a file with both, `counters.py` what it has done so far;
`stream.py` runs an update over chunks while the next is read and the last is written, and `reports.py` has what came of it;
`parameters.py` has the file of shards, and reads them ahead. Read `files.py` first.

Of updates: `host.py` has an optimizer whose steps are taken here, `planning.py` what its state needs, `layout.py` what lies
where, `tiers.py` the places it can lie in, `entries.py` one parameter, `book.py` what the optimizer shows of it,
`columns.py` what it shows of a file for a while; `job.py` is what is updated together, `transfers.py` brings gradients and
takes parameters back, `to_file.py` writes them to the file of shards,
`passing.py` goes through the chunks, `update.py` updates one of them by one of `rules.py`, in the thread of `line.py`;
`watching.py` knows whether others have changed parameters, `pages.py` asks for huge pages, `traffic.py` has what all of it has
moved. Read `host.py` first.
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
