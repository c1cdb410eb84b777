"""The most that a device can compute, by its name: dense matrix products, with sums in 32 bits, as its maker publishes them.

Figures with "sparsity" are twice those here, and apply to no training. Where a maker gives two figures for 16 bits, for sums in
16 and in 32 bits, the latter counts, which is what torch uses. A device that is not here is unknown: no figure is guessed from a
similar name, and a part of a device (MIG) has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_HOPPER = "NVIDIA H100 Tensor Core GPU datasheet"
_ADA = "NVIDIA Ada GPU architecture whitepaper, V2.1, appendix A"
_BLACKWELL_RTX = "NVIDIA RTX Blackwell GPU architecture whitepaper, V1.1, appendix"
_AMPERE_RTX = "NVIDIA Ampere GA102 GPU architecture whitepaper, V2.1, appendix A"


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a kind of device can compute.

    Attributes:
        names: a regular expression for all of the name that its driver gives.
        teraflops: per second, by dtype: "float64", "float32", "tfloat32" (float32 multiplied in 19 bits), "float16",
            "bfloat16".
        source: where these stand.
    """

    names: str
    teraflops: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Peak:
    """The most that a device can compute in a dtype.

    Attributes:
        flops_per_second: of dense matrix products.
        source: where that is from, in words.
    """

    flops_per_second: float
    source: str


def _halves(teraflops: float) -> dict[str, float]:
    return {"float16": teraflops, "bfloat16": teraflops}


DEVICES: tuple[Device, ...] = (
    Device(
        names=r"NVIDIA H100 (80|96)GB HBM3",
        teraflops={"float64": 67.0, "float32": 67.0, "tfloat32": 494.7, **_halves(989.4)},
        source=f"{_HOPPER}, SXM",
    ),
    Device(
        names=r"NVIDIA H100 (PCIe|80GB HBM2e)",
        teraflops={"float64": 51.2, "float32": 51.2, "tfloat32": 378.0, **_halves(756.0)},
        source="NVIDIA H100 Tensor Core GPU architecture whitepaper, V1.04, table 1",
    ),
    Device(
        names=r"NVIDIA H100 NVL",
        teraflops={"float64": 60.0, "float32": 60.0, "tfloat32": 417.5, **_halves(835.5)},
        source=f"{_HOPPER}, NVL",
    ),
    Device(
        names=r"NVIDIA H800( 80GB HBM3)?",
        teraflops={"float64": 1.0, "float32": 67.0, "tfloat32": 494.7, **_halves(989.4)},
        source="NVIDIA H800 datasheet, SXM",
    ),
    Device(
        names=r"NVIDIA H20(-.*| .*)?",
        teraflops={"float64": 1.0, "float32": 44.0, "tfloat32": 74.0, **_halves(148.0)},
        source="NVIDIA H20 datasheet",
    ),
    Device(
        names=r"NVIDIA H200",
        teraflops={"float64": 67.0, "float32": 67.0, "tfloat32": 494.7, **_halves(989.4)},
        source="NVIDIA H200 Tensor Core GPU datasheet, SXM",
    ),
    Device(
        names=r"NVIDIA H200 NVL",
        teraflops={"float64": 60.0, "float32": 60.0, "tfloat32": 417.5, **_halves(835.5)},
        source="NVIDIA H200 Tensor Core GPU datasheet, NVL",
    ),
    Device(
        names=r"NVIDIA GH200 .*",
        teraflops={"float64": 67.0, "float32": 67.0, "tfloat32": 494.7, **_halves(989.4)},
        source="NVIDIA GH200 Grace Hopper superchip datasheet",
    ),
    Device(
        names=r"NVIDIA B200.*",
        teraflops={"float64": 37.0, "float32": 75.0, "tfloat32": 1100.0, **_halves(2250.0)},
        source="NVIDIA Blackwell datasheet, one GPU of HGX B200",
    ),
    Device(
        names=r"NVIDIA GB200.*",
        teraflops={"float64": 40.0, "float32": 80.0, "tfloat32": 1250.0, **_halves(2500.0)},
        source="NVIDIA Blackwell datasheet, one GPU of GB200 NVL72",
    ),
    Device(
        names=r"NVIDIA B300.*",
        teraflops={"float64": 1.25, "float32": 75.0, "tfloat32": 1125.0, **_halves(2250.0)},
        source="NVIDIA Blackwell Ultra datasheet, one GPU of HGX B300",
    ),
    Device(
        names=r"NVIDIA GB300.*",
        teraflops={"float64": 1.3, "float32": 80.0, "tfloat32": 1250.0, **_halves(2500.0)},
        source="NVIDIA Blackwell Ultra datasheet, one GPU of GB300 NVL72",
    ),
    Device(
        names=r"(NVIDIA )?A100[- ].*",
        teraflops={"float64": 19.5, "float32": 19.5, "tfloat32": 156.0, **_halves(312.0)},
        source="NVIDIA A100 Tensor Core GPU datasheet",
    ),
    Device(
        names=r"NVIDIA A800[- ].*",
        teraflops={"float64": 9.7, "float32": 19.5, "tfloat32": 156.0, **_halves(312.0)},
        source="NVIDIA A800 datasheet",
    ),
    Device(
        names=r"NVIDIA A30",
        teraflops={"float64": 10.3, "float32": 10.3, "tfloat32": 82.0, **_halves(165.0)},
        source="NVIDIA A30 Tensor Core GPU datasheet",
    ),
    Device(
        names=r"NVIDIA A10",
        teraflops={"float32": 31.2, "tfloat32": 62.5, **_halves(125.0)},
        source="NVIDIA A10 Tensor Core GPU datasheet",
    ),
    Device(
        names=r"NVIDIA A10G",
        teraflops={"float32": 35.0, "tfloat32": 35.0, **_halves(70.0)},
        source="NVIDIA A10G datasheet",
    ),
    Device(
        names=r"NVIDIA A40",
        teraflops={"float32": 37.4, "tfloat32": 74.8, **_halves(149.7)},
        source="NVIDIA A40 datasheet",
    ),
    Device(
        names=r"NVIDIA RTX A6000",
        teraflops={"float32": 38.7, "tfloat32": 77.4, **_halves(154.8)},
        source=_AMPERE_RTX,
    ),
    Device(
        names=r"NVIDIA L40S",
        teraflops={"float32": 91.6, "tfloat32": 183.0, **_halves(362.05)},
        source="NVIDIA L40S datasheet",
    ),
    Device(
        names=r"NVIDIA L40",
        teraflops={"float32": 90.5, "tfloat32": 90.5, **_halves(181.05)},
        source="NVIDIA L40 datasheet",
    ),
    Device(
        names=r"NVIDIA L20",
        teraflops={"float32": 59.8, "tfloat32": 59.8, **_halves(119.5)},
        source="NVIDIA L20 datasheet",
    ),
    Device(
        names=r"NVIDIA L4",
        teraflops={"float32": 30.3, "tfloat32": 60.0, **_halves(121.0)},
        source="NVIDIA L4 Tensor Core GPU datasheet",
    ),
    Device(
        names=r"NVIDIA RTX 6000 Ada Generation",
        teraflops={"float32": 91.1, "tfloat32": 182.1, **_halves(364.2)},
        source="NVIDIA RTX 6000 Ada generation datasheet",
    ),
    Device(
        names=r"NVIDIA RTX PRO 6000 Blackwell (Workstation|Server) Edition",
        teraflops={"float32": 126.0, "tfloat32": 251.9, **_halves(503.8)},
        source="NVIDIA RTX Blackwell PRO GPU architecture whitepaper, V1.0",
    ),
    Device(
        names=r"NVIDIA GeForce RTX 3090",
        teraflops={"float32": 35.6, "tfloat32": 35.6, **_halves(71.0)},
        source=_AMPERE_RTX,
    ),
    Device(
        names=r"NVIDIA GeForce RTX 4090",
        teraflops={"float32": 82.6, "tfloat32": 82.6, **_halves(165.2)},
        source=_ADA,
    ),
    Device(
        names=r"NVIDIA GeForce RTX 5090",
        teraflops={"float32": 104.8, "tfloat32": 104.8, **_halves(209.5)},
        source=_BLACKWELL_RTX,
    ),
    Device(
        names=r"Tesla V100-SXM[23].*",
        teraflops={"float64": 7.8, "float32": 15.7, "float16": 125.0},
        source="NVIDIA V100 Tensor Core GPU datasheet, SXM2",
    ),
    Device(
        names=r"Tesla V100-PCIE.*",
        teraflops={"float64": 7.0, "float32": 14.0, "float16": 112.0},
        source="NVIDIA V100 Tensor Core GPU datasheet, PCIe",
    ),
    Device(
        names=r"Tesla T4",
        teraflops={"float32": 8.1, "float16": 65.0},
        source="NVIDIA T4 Tensor Core GPU datasheet",
    ),
    Device(
        names=r"AMD Instinct MI250X",
        teraflops={"float64": 47.9, "float32": 47.9, **_halves(191.5)},
        source="AMD Instinct MI250X data sheet, one of its two dies, each of which is a device",
    ),
    Device(
        names=r"AMD Instinct MI300X( .*)?",
        teraflops={"float64": 163.4, "float32": 163.4, "tfloat32": 653.7, **_halves(1307.4)},
        source="AMD Instinct MI300X data sheet",
    ),
    Device(
        names=r"AMD Instinct MI325X( .*)?",
        teraflops={"float64": 163.4, "float32": 163.4, "tfloat32": 653.7, **_halves(1307.4)},
        source="AMD Instinct MI325X data sheet",
    ),
    Device(
        names=r"AMD Instinct MI350X( .*)?",
        teraflops={"float64": 72.1, "float32": 144.2, **_halves(2306.9)},
        source="AMD Instinct MI350X data sheet",
    ),
    Device(
        names=r"AMD Instinct MI355X( .*)?",
        teraflops={"float64": 78.6, "float32": 157.3, **_halves(2516.6)},
        source="AMD Instinct MI355X data sheet",
    ),
)


def find_peak(name: str, dtype: str) -> Peak | None:
    """Return what a device can compute in a dtype; None where that is not known.

    Args:
        name: as `torch.cuda.get_device_name` gives it.
        dtype: "float64", "float32", "tfloat32", "float16" or "bfloat16".

    Example:
        >>> find_peak("NVIDIA H200", "bfloat16").flops_per_second
        989400000000000.0
        >>> find_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16") is None
        True
    """
    device = next((each for each in DEVICES if re.fullmatch(each.names, name) and "MIG " not in name), None)
    teraflops = None if device is None else device.teraflops.get(dtype)
    if device is None or teraflops is None:
        return None
    return Peak(teraflops * 1e12, f"{name}, {dtype}, dense: {device.source}")
