from __future__ import annotations

import re

import pytest

from meshbolt.monitoring.peaks import DEVICES, find_peak

KNOWN = {
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H20": 148.0,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "NVIDIA B300 SXM6 AC": 2250.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 503.8,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI325X": 1307.4,
}
UNKNOWN = (
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA H300",
    "NVIDIA L40X",
    "Some GPU",
    "",
)


@pytest.mark.parametrize(("name", "teraflops"), KNOWN.items())
def test_a_device_is_known_by_the_name_of_its_driver(name: str, teraflops: float) -> None:
    peak = find_peak(name, "bfloat16")
    assert peak is not None
    assert peak.flops_per_second == pytest.approx(teraflops * 1e12)
    assert name in peak.source
    assert "dense" in peak.source


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_similar_name_is_not_guessed(name: str) -> None:
    assert find_peak(name, "bfloat16") is None


def test_a_dtype_that_a_device_cannot_multiply_has_no_peak() -> None:
    assert find_peak("Tesla T4", "bfloat16") is None
    assert find_peak("NVIDIA H100 80GB HBM3", "float8") is None


@pytest.mark.parametrize("name", KNOWN)
def test_one_row_alone_is_about_a_name(name: str) -> None:
    assert len([each for each in DEVICES if re.fullmatch(each.names, name)]) == 1


def test_every_row_says_where_it_is_from_and_rises_with_fewer_bits() -> None:
    for device in DEVICES:
        assert device.source
        assert set(device.teraflops) <= {"float64", "float32", "tfloat32", "float16", "bfloat16"}
        ordered = [device.teraflops[d] for d in ("float64", "float32", "tfloat32", "float16") if d in device.teraflops]
        assert ordered == sorted(ordered), device.names
