"""What offloading moves, and what of its time nothing hides: names."""

from __future__ import annotations

from meshbolt.monitoring.metric import Metric

_WAYS = {
    "to_host": ("from the GPU to host memory", "gradients, with their way through one run on the GPU"),
    "to_device": ("from host memory to the GPU", "updated parameters"),
    "read": ("from this rank's files", "what updates took from there"),
    "written": ("to this rank's files", "what updates put there"),
}


def _of_way(kind: str, way: str) -> tuple[Metric, Metric]:
    direction, what = _WAYS[way]
    of = "updates" if kind == "state" else "parameters that lie elsewhere"
    name = f"offload/{kind}_{way}"
    return (
        Metric(
            f"{name}_bytes",
            "bytes",
            f"What {of} moved {direction} in a step of an optimizer.",
            f"bytes of {what} / steps" if kind == "state" else "bytes of shards / steps",
        ),
        Metric(
            f"{name}_bytes_per_second",
            "bytes/s",
            f"How fast {of} moved {direction}, while something was on its way.",
            "bytes that arrived / time in which at least one transfer was under way",
        ),
    )


METRICS = (
    *(metric for kind in ("state", "parameters") for way in _WAYS for metric in _of_way(kind, way)),
    Metric(
        "offload/updated_bytes",
        "bytes",
        "State that was updated in a step, wherever it lies, with the copy of the parameters where there is one.",
        "bytes of the state's columns that updates went through / steps",
    ),
    Metric(
        "offload/updated_bytes_per_second",
        "bytes/s",
        "How fast the host's threads update state, without what they wait for.",
        "bytes of the state's columns / time in which kernels of updates ran",
    ),
    Metric(
        "offload/busy_seconds",
        "seconds",
        "How long the threads of updates worked in a step, with their waiting for gradients and files: what there is to hide.",
        "time of updates / steps",
    ),
    Metric(
        "offload/not_hidden_seconds",
        "seconds",
        "How long the run waited for updates in a step; without the last copy back to a GPU, which waits for that by itself.",
        "step_wait_seconds + forward_wait_seconds + other_wait_seconds",
    ),
    Metric(
        "offload/hidden_fraction",
        "fraction",
        "The part of the updates' time that other work hid: 1 is all of it.",
        "1 - not_hidden_seconds / busy_seconds, at least 0",
    ),
    Metric(
        "offload/step_wait_seconds",
        "seconds",
        "How long the optimizer's step waited for its updates.",
        "time in the step's waiting / steps",
    ),
    Metric(
        "offload/forward_wait_seconds",
        "seconds",
        "How long layers waited for their parameters before they ran forwards.",
        "time in the waiting of all units / steps",
    ),
    Metric(
        "offload/other_wait_seconds",
        "seconds",
        "How long others waited for updates: checkpoints, norms, averages of weights.",
        "time in their waiting / steps",
    ),
    Metric(
        "offload/read_wait_seconds",
        "seconds",
        "How long updates waited for their files to be read; a part of busy_seconds.",
        "time in the waiting for reads / steps",
    ),
    Metric(
        "offload/room_wait_seconds",
        "seconds",
        "How long updates waited for room: for a buffer that was still being written to a file; a part of busy_seconds.",
        "time in the waiting for writes / steps",
    ),
    Metric(
        "offload/gather_wait_seconds",
        "seconds",
        "How long gathers waited for parameters to be read from their file.",
        "time in the waiting of all gathers / steps",
    ),
)
