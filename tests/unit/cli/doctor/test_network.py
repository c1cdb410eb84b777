"""How ranks would find each other, from the variables and the names that there are."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

import pytest

from meshbolt.cli.doctor.network import network_rows
from meshbolt.cli.doctor.rows import Row


def resolve_to(*addresses: str) -> object:
    return lambda name: addresses


def unknown(name: str) -> Sequence[str]:
    raise socket.gaierror(-2, "Name or service not known")


def rows_of(environment: Mapping[str, str], resolve: object = resolve_to("127.0.0.1")) -> dict[str, Row]:
    return {row.name: row for row in network_rows(environment, resolve=resolve, interfaces=["lo", "eth0"])}  # type: ignore[arg-type]


def test_a_machine_whose_name_is_known_and_its_own_is_green() -> None:
    rows = rows_of({})
    assert {row.status for row in rows.values()} == {"green"}
    assert rows["launcher"].value == "none: a Trainer starts its ranks by itself"


def test_a_name_that_nobody_knows_is_red_with_the_line_for_the_hosts_file() -> None:
    row = rows_of({}, unknown)["machine's name"]
    assert row.status == "red"
    assert socket.gethostname() in row.mend
    assert "/etc/hosts" in row.mend


def test_a_name_with_the_address_of_another_machine_is_red() -> None:
    row = rows_of({}, resolve_to("192.0.2.1"))["machine's name"]
    assert (row.status, "no address of this machine" in row.value) == ("red", True)


@pytest.mark.parametrize("variable", ["GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"])
def test_an_interface_that_is_not_there_is_red_with_one_that_is(variable: str) -> None:
    row = rows_of({variable: "ib7"})[variable]
    assert (row.status, row.mend) == ("red", f"export {variable}=eth0")


@pytest.mark.parametrize("text", ["eth", "eth0,lo", "=eth0", "^docker"])
def test_nccl_takes_beginnings_of_names_and_exceptions(text: str) -> None:
    assert rows_of({"NCCL_SOCKET_IFNAME": text})["NCCL_SOCKET_IFNAME"].status == "green"


def test_a_part_of_what_a_launcher_sets_is_red() -> None:
    row = rows_of({"RANK": "0", "WORLD_SIZE": "2"})["launcher"]
    assert row.status == "red"
    assert "no MASTER_ADDR, MASTER_PORT" in row.value
    assert "unset RANK" in row.mend


WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_a_whole_set_is_green() -> None:
    rows = rows_of(WHOLE)
    assert {row.status for row in rows.values()} == {"green"}
    assert rows["MASTER_ADDR"].value == "node0 is 127.0.0.1, port 29500"


@pytest.mark.parametrize(
    ("change", "name"),
    [({"RANK": "2"}, "launcher"), ({"RANK": "x"}, "launcher"), ({"MASTER_PORT": "http"}, "MASTER_PORT")],
)
def test_a_wrong_value_is_red(change: dict[str, str], name: str) -> None:
    assert rows_of({**WHOLE, **change})[name].status == "red"


def test_a_meeting_point_that_nobody_knows_is_red() -> None:
    row = rows_of(WHOLE, unknown)["MASTER_ADDR"]
    assert (row.status, "node0 cannot be looked up" in row.value) == ("red", True)


def test_a_shell_inside_of_a_slurm_job_is_no_task_of_it() -> None:
    assert rows_of({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})["SLURM"].status == "yellow"
    assert rows_of({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"})["SLURM"].status == "green"


def test_a_switch_that_slows_a_run_down_is_yellow_with_the_command_that_clears_it() -> None:
    row = rows_of({"CUDA_LAUNCH_BLOCKING": "1"})["CUDA_LAUNCH_BLOCKING"]
    assert (row.status, row.mend) == ("yellow", "unset CUDA_LAUNCH_BLOCKING")
    assert "CUDA_LAUNCH_BLOCKING" not in rows_of({"CUDA_LAUNCH_BLOCKING": "0"})
