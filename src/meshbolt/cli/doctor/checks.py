"""All that `meshbolt doctor` looks at, in its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meshbolt.cli.doctor.disk import disk_rows
from meshbolt.cli.doctor.hardware import backend_rows, gpu_rows, import_rows
from meshbolt.cli.doctor.limits import limit_rows, memory_rows, shared_memory_row
from meshbolt.cli.doctor.network import network_rows
from meshbolt.cli.doctor.packages import packages_to_import, version_rows
from meshbolt.cli.doctor.probing import Probe, ask
from meshbolt.cli.doctor.ranks import rank_rows
from meshbolt.cli.doctor.rows import Check, Row


def all_checks(*, path: str | None, ranks: int) -> list[Check]:
    """Return them; those that need torch do without where it cannot be imported.

    Args:
        path: the folder whose disk is measured; None: this one.
        ranks: how many processes exchange; fewer than two measure nothing.
    """
    answers: list[Probe] = []

    def probe() -> Probe:
        """Ask once, when the first check needs it."""
        if not answers:
            answers.append(ask(packages_to_import()))
        return answers[0]

    def with_torch(find: Callable[[], Sequence[Row]]) -> Callable[[], Sequence[Row]]:
        return lambda: find() if probe().torch else []

    return [
        Check("versions", "versions of packages", version_rows),
        Check("imports", "importing them", lambda: import_rows(probe()), is_long=True),
        Check("backends", "backends of torch.distributed", lambda: backend_rows(probe())),
        Check("GPUs", "GPUs and their driver", lambda: gpu_rows(probe())),
        Check("limits", "shared memory", lambda: [shared_memory_row()]),
        Check("limits", "limits of this process", limit_rows),
        Check("limits", "host memory", memory_rows),
        Check("network", "names and interfaces", network_rows),
        Check("disk", "the disk", with_torch(lambda: disk_rows(path)), is_long=True),
        Check("ranks", f"{ranks} ranks", with_torch(lambda: rank_rows(probe(), ranks)), is_long=True),
    ]
