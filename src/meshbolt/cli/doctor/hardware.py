"""What torch finds on this machine: backends, the driver and its GPUs; and whether what meshbolt stands on can be imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshbolt.cli.doctor.probing import Probe
from meshbolt.cli.doctor.rows import Row, Status
from meshbolt.units import format_bytes

# Of the builds that torch's own index has, by the CUDA they need.
_BUILDS = ((11, 8), (12, 6), (12, 8), (12, 9), (13, 0))
_INDEX = "https://download.pytorch.org/whl"
_SLOW_SECONDS = 30.0


def import_rows(probe: Probe) -> list[Row]:
    """Return what can be imported and what cannot.

    Args:
        probe: what was tried.
    """
    rows, first = [], {error: name for name, error in reversed(probe.failures.items())}
    for name, error in probe.failures.items():
        is_first = first[error] == name
        value, mend = (f"fails: {error}", _mend_import(name)) if is_first else (f"fails as {first[error]} does", "")
        rows.append(Row(area="imports", name=name, status="red", value=value, mend=mend))
    seconds = sum(probe.seconds.values())
    if probe.seconds:
        is_slow = seconds > _SLOW_SECONDS
        mend = "python -X importtime -c 'import meshbolt' 2>&1 | sort -t'|' -k2 -n | tail" if is_slow else ""
        value = f"{len(probe.seconds)} packages in {seconds:.1f} s{', each rank pays for it' if is_slow else ''}"
        status: Status = "yellow" if is_slow else "green"
        rows.append(
            Row(area="imports", name="imports", status=status, value=value, mend=mend, measured={"seconds": seconds})
        )
    return [*rows, *shadow_rows(probe, Path.cwd())]


def shadow_rows(probe: Probe, folder: Path) -> list[Row]:
    """Return files that a script started in a folder would import in the place of a package.

    Args:
        probe: what packages there are.
        folder: where scripts are.
    """
    tops = {name.partition(".")[0]: Path(file) for name, file in probe.files.items() if name != "meshbolt"}
    rows = []
    for name, file in tops.items():
        own = [each for each in (folder / f"{name}.py", folder / name / "__init__.py") if each.exists()]
        if own and folder not in file.parents:
            value = f"a script in this folder imports {own[0].relative_to(folder)} in the place of the package"
            mend = f"mv {own[0].relative_to(folder).parts[0]} my_{own[0].relative_to(folder).parts[0]}"
            rows.append(Row(area="imports", name=name, status="yellow", value=value, mend=mend))
    return rows


def _mend_import(name: str) -> str:
    package = {"lightning.pytorch": "lightning", "torch (what it finds)": "torch"}.get(name, name)
    return (
        f"pip install --force-reinstall --no-deps {package}   # then `python -c 'import {package}'` for the whole error"
    )


def backend_rows(probe: Probe) -> list[Row]:
    """Return which backends torch can connect ranks with.

    Args:
        probe: what torch said.
    """
    facts = probe.torch
    if not facts:
        return []  # that it cannot be imported is said already
    if not facts["distributed"]:
        value = f"torch {facts['version']} was built without it: there are no ranks"
        mend = "pip install --force-reinstall torch"
        return [Row(area="backends", name="torch.distributed", status="red", value=value, mend=mend)]
    has = facts["backends"]
    rows = [_backend_row("gloo", has["gloo"], is_needed=True, without="CPU ranks and control messages need it")]
    needs_nccl = bool(facts["gpus"])
    version = f" {facts.get('nccl_version')}" if facts.get("nccl_version") else ""
    rows.append(_backend_row("nccl", has["nccl"], is_needed=needs_nccl, without="GPU ranks need it", detail=version))
    rows.append(_backend_row("mpi", has["mpi"], is_needed=False, without=""))
    return rows


def _backend_row(name: str, is_there: bool, *, is_needed: bool, without: str, detail: str = "") -> Row:
    if is_there:
        return Row(area="backends", name=name, status="green", value=f"there{detail}")
    if is_needed:
        value, mend = f"torch was built without it: {without}", "pip install --force-reinstall torch"
        return Row(area="backends", name=name, status="red", value=value, mend=mend)
    return Row(area="backends", name=name, status="green", value="not built in; nothing here needs it")


def gpu_rows(probe: Probe, *, has_device: bool | None = None) -> list[Row]:
    """Return what is known of the GPUs, their driver, and the build of torch.

    Args:
        probe: what torch and the driver said.
        has_device: whether the system has one of NVIDIA's; None looks.
    """
    facts = probe.torch
    if not facts:
        return []
    has_device = Path("/dev/nvidia0").exists() if has_device is None else has_device
    rows = list(_driver_rows(facts, probe.driver, has_device=has_device))
    for number, gpu in enumerate(facts["gpus"]):
        rows.append(_gpu_row(number, gpu, facts.get("architectures", [])))
    return [*rows, *_peer_rows(facts), *_pinned_rows(facts)]


def _driver_rows(facts: Mapping[str, Any], driver: Mapping[str, Any], *, has_device: bool) -> Iterator[Row]:
    build, runs = facts["cuda"], driver.get("cuda")
    if build is None:
        if facts["hip"]:
            yield _row("torch's build", "green", f"for ROCm {facts['hip']}")
        elif has_device:
            value = f"torch {facts['version']} is for CPUs, and this machine has an NVIDIA GPU"
            yield _row("torch's build", "red", value, f"pip install --force-reinstall torch --index-url {_index(runs)}")
        else:
            yield _row("GPU", "green", "none here, and torch is built for CPUs")
        return
    if facts["gpus"]:
        yield _row("driver", "green", f"{driver.get('driver', '?')} runs CUDA {runs}, torch is built for {build}")
        return
    if not has_device and not runs:
        yield _row("GPU", "green", f"none here; torch is built for CUDA {build}")
        return
    error = facts.get("cuda_error", "no device is visible to this process")
    if runs and _number(build)[0] > _number(runs)[0]:
        value = f"the driver runs CUDA {runs} at most, torch is built for {build}"
        yield _row(
            "driver",
            "red",
            value,
            f"pip install --force-reinstall torch --index-url {_index(runs)}   # or a new driver",
        )
        return
    yield _row(
        "driver", "red", f"torch finds no GPU: {error}", "nvidia-smi; echo CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
    )


def _index(runs: str | None) -> str:
    """Return the index of the newest builds that a driver can run."""
    fitting = [build for build in _BUILDS if runs is None or build <= _number(runs)]
    return f"{_INDEX}/cu{''.join(map(str, fitting[-1] if fitting else _BUILDS[0]))}"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _gpu_row(number: int, gpu: Mapping[str, Any], architectures: Sequence[str]) -> Row:
    free, total = gpu["free_bytes"], gpu["total_bytes"]
    value = f"{gpu['name']}, {format_bytes(free)} of {format_bytes(total)} free"
    measured = {"free_bytes": float(free), "total_bytes": float(total)}
    name, mine = f"GPU {number}", int(gpu["capability"])
    built = [int(each.split("_")[1]) for each in architectures if each.split("_")[1].isdigit()]
    # Code for one generation runs on its later members; code to be translated ("compute") on all later ones.
    if (
        built
        and not any(each <= mine and each // 10 == mine // 10 for each in built)
        and not _translates(architectures, mine)
    ):
        value = f"{value}; torch has no code for it (sm_{mine}), only for {', '.join(architectures)}"
        return _row(name, "red", value, "pip install --upgrade torch", **measured)
    if free < total / 2:
        return _row(name, "yellow", f"{value}: others are on it", "nvidia-smi", **measured)
    return _row(name, "green", value, "", **measured)


def _translates(architectures: Sequence[str], capability: int) -> bool:
    known = (each.split("_") for each in architectures)
    return any(kind == "compute" and number.isdigit() and int(number) <= capability for kind, number in known)


def _peer_rows(facts: Mapping[str, Any]) -> Iterator[Row]:
    count, apart = len(facts["gpus"]), facts.get("apart", [])
    if count < 2:
        return
    if not apart:
        yield _row("peers", "green", f"each of the {count} GPUs reaches the memory of the others")
        return
    pairs = ", ".join(f"{a}→{b}" for a, b in apart[:6]) + (", ..." if len(apart) > 6 else "")
    value = f"{len(apart)} of {count * (count - 1)} ways go through host memory, which is slower: {pairs}"
    yield _row("peers", "yellow", value, "nvidia-smi topo -m")


def _pinned_rows(facts: Mapping[str, Any]) -> Iterator[Row]:
    if "pinned_error" in facts:
        value = f"256 MiB cannot be pinned: {facts['pinned_error']}"
        yield _row("pinned memory", "red", value, "ulimit -l unlimited   # and free host memory: offload can do without, "
                   "Offload('cpu', pin_memory=False)")  # fmt: skip
    elif "pinned_bytes" in facts:
        rate = facts["pinned_bytes"] / max(facts["pinned_seconds"], 1e-6)
        value = f"{format_bytes(facts['pinned_bytes'])} in {facts['pinned_seconds']:.2f} s"
        yield _row("pinned memory", "green", value, bytes_per_second=rate)


def _row(name: str, status: Status, value: str, mend: str = "", **measured: float) -> Row:
    return Row(area="GPUs", name=name, status=status, value=value, mend=mend, measured=measured)
