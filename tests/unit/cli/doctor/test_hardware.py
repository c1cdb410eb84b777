"""What is said of backends, drivers and GPUs, from what torch may answer on machines of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meshbolt.cli.doctor.hardware import backend_rows, gpu_rows, import_rows, shadow_rows
from meshbolt.cli.doctor.probing import Probe, ask, read
from meshbolt.cli.doctor.ranks import rank_rows
from meshbolt.cli.doctor.rows import Row

BACKENDS = {"gloo": True, "nccl": True, "mpi": False}
GPU = {"name": "NVIDIA H100", "capability": "90", "free_bytes": 70 * 2**30, "total_bytes": 80 * 2**30}
TWO_GPUS: dict[str, Any] = {
    "version": "2.13.0",
    "cuda": "12.8",
    "hip": None,
    "distributed": True,
    "backends": BACKENDS,
    "gpus": [GPU, GPU],
    "apart": [],
    "architectures": ["sm_80", "sm_90"],
    "nccl_version": "2.27.3",
    "pinned_bytes": 2**28,
    "pinned_seconds": 0.1,
}
DRIVER = {"driver": "570.1", "cuda": "12.8"}


def probe_of(driver: dict[str, str] | None = None, **changes: Any) -> Probe:
    return Probe(torch={**TWO_GPUS, **changes}, driver=DRIVER if driver is None else driver)


def rows_of(probe: Probe, *, has_device: bool = True) -> dict[str, Row]:
    return {row.name: row for row in [*backend_rows(probe), *gpu_rows(probe, has_device=has_device)]}


def test_two_gpus_that_reach_each_other_are_green() -> None:
    rows = rows_of(probe_of())
    assert {row.status for row in rows.values()} == {"green"}
    assert rows["driver"].value == "570.1 runs CUDA 12.8, torch is built for 12.8"
    assert rows["GPU 1"].measured["total_bytes"] == 80 * 2**30


def test_gpus_that_do_not_reach_each_other_are_named() -> None:
    row = rows_of(probe_of(apart=[[0, 1]]))["peers"]
    assert (row.status, row.mend) == ("yellow", "nvidia-smi topo -m")
    assert "0→1" in row.value


def test_a_build_for_cpus_beside_a_gpu_is_red_with_the_builds_that_the_driver_runs() -> None:
    probe = probe_of(version="2.13.0+cpu", cuda=None, gpus=[], backends={**BACKENDS, "nccl": False})
    row = rows_of(probe)["torch's build"]
    assert row.status == "red"
    assert row.mend.endswith("/whl/cu128")


def test_a_driver_that_is_too_old_for_the_build_is_red() -> None:
    probe = probe_of({"driver": "550.1", "cuda": "12.4"}, cuda="13.0", gpus=[], cuda_error="driver too old")
    row = rows_of(probe)["driver"]
    assert row.status == "red"
    assert "/whl/cu118 " in row.mend


def test_a_gpu_that_torch_cannot_reach_is_red() -> None:
    row = rows_of(probe_of(gpus=[], cuda_error="no CUDA-capable device"))["driver"]
    assert (row.status, "no CUDA-capable device" in row.value) == ("red", True)


def test_a_machine_without_gpus_is_green() -> None:
    probe = probe_of({}, gpus=[], cuda_error="Found no NVIDIA driver")
    rows = rows_of(probe, has_device=False)
    assert {row.status for row in rows.values()} == {"green"}


def test_gpus_without_nccl_are_red() -> None:
    assert rows_of(probe_of(backends={**BACKENDS, "nccl": False}))["nccl"].status == "red"


@pytest.mark.parametrize(
    ("capability", "architectures", "status"),
    [
        ("90", ["sm_90"], "green"),
        ("89", ["sm_80"], "green"),
        ("120", ["sm_80", "sm_90"], "red"),
        ("120", ["sm_90", "compute_90"], "green"),
        ("61", ["sm_70"], "red"),
    ],
)
def test_a_gpu_is_red_where_torch_has_no_code_for_it(capability: str, architectures: list[str], status: str) -> None:
    probe = probe_of(gpus=[{**GPU, "capability": capability}], architectures=architectures)
    assert rows_of(probe)["GPU 0"].status == status


def test_memory_that_cannot_be_pinned_is_red() -> None:
    probe = Probe(torch={**{k: v for k, v in TWO_GPUS.items() if "pinned" not in k}, "pinned_error": "out of memory"})
    assert rows_of(probe)["pinned memory"].status == "red"


def test_a_torch_without_distributed_is_red_and_no_ranks_are_started() -> None:
    probe = Probe(torch={"version": "2.13", "cuda": None, "hip": None, "distributed": False, "gpus": []})
    assert rows_of(probe, has_device=False)["torch.distributed"].status == "red"
    assert rank_rows(probe, 2) == []


def test_a_module_that_fails_crashes_or_hangs_is_red_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_here.py").write_text("raise OSError('libfoo.so.1: cannot open')")
    (tmp_path / "crashes_here.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "hangs_here.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = ask(["json", "fails_here", "crashes_here", "never_reached"])
    assert list(probe.seconds) == ["json"]
    assert probe.failures["fails_here"] == "OSError: libfoo.so.1: cannot open"
    assert "SIGSEGV" in probe.failures["crashes_here"]
    assert "did not end within 0.5 s" in ask(["hangs_here"], limit_seconds=0.5).failures["hangs_here"]
    rows = {row.name: row for row in import_rows(probe)}
    assert rows["crashes_here"].status == "red"
    assert "pip install --force-reinstall" in rows["crashes_here"].mend


def test_an_answer_that_is_cut_off_blames_what_was_under_way() -> None:
    probe = read(['{"what": "begin", "name": "torch"}', '{"what": "impor'], "was ended by SIGKILL")
    assert probe.failures == {"torch": "the process was ended by SIGKILL"}


def test_a_file_that_hides_a_package_is_named(tmp_path: Path) -> None:
    probe = Probe(
        files={"torch": "/site/torch/__init__.py", "lightning.pytorch": "/site/lightning/pytorch/__init__.py"}
    )
    assert shadow_rows(probe, tmp_path) == []
    (tmp_path / "lightning.py").touch()
    (row,) = shadow_rows(probe, tmp_path)
    assert (row.name, row.status, row.mend) == ("lightning", "yellow", "mv lightning.py my_lightning.py")
