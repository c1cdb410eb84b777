"""The dtypes that a module under `fully_shard` really sees, for each precision flag."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from meshbolt.precision.policy import PrecisionPolicy, precision_policy
from meshbolt.testing import run_ranks

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Witness(nn.Module):
    """Notes the dtypes it sees, and has the gradient x for its only weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen |= {"input": x.dtype, "weight": self.weight.dtype}
        y = self.weight * x.to(self.weight.dtype)
        self.seen["output"] = y.dtype
        return y


def sharded(policy: PrecisionPolicy) -> tuple[nn.Sequential, Witness]:
    unit = Witness().to(policy.storage_dtype or FP32)
    root = nn.Sequential(unit)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    stored = unit.weight.dtype
    fully_shard(unit, mesh=mesh, mp_policy=policy.unit_policy(stored=stored))
    fully_shard(root, mesh=mesh, mp_policy=policy.root_policy(stored=stored))
    return root, unit


def dtypes_seen(flag: str, autocast: bool) -> dict[str, torch.dtype]:
    policy = precision_policy(flag, autocast=autocast, allow_no_master=True)
    root, unit = sharded(policy)
    result = root(torch.ones(2, dtype=policy.storage_dtype))
    result.sum().backward()
    assert unit.weight.grad is not None or dist.get_rank() > 0
    return unit.seen | {"result": result.dtype, "shard": unit.weight.dtype, "gradient": unit.weight.grad.dtype}


@pytest.mark.parametrize(
    ("flag", "autocast", "unit_input", "gathered", "result", "shard"),
    [
        ("32-true", True, FP32, FP32, FP32, FP32),
        ("64-true", True, FP64, FP64, FP64, FP64),
        ("bf16-true", True, BF16, BF16, BF16, BF16),
        ("16-true", True, FP16, FP16, FP16, FP16),
        ("bf16-mixed", True, FP32, BF16, FP32, FP32),
        ("16-mixed", True, FP32, FP16, FP32, FP32),
        # The outermost module casts what enters it as well: nothing else would.
        ("bf16-mixed", False, BF16, BF16, FP32, FP32),
        ("16-mixed", False, FP16, FP16, FP32, FP32),
    ],
)
def test_a_unit_sees_the_dtypes_of_its_flag(
    flag: str,
    autocast: bool,
    unit_input: torch.dtype,
    gathered: torch.dtype,
    result: torch.dtype,
    shard: torch.dtype,
) -> None:
    expected = {"input": unit_input, "weight": gathered, "output": gathered}
    expected |= {"result": result, "shard": shard, "gradient": shard}
    assert run_ranks(dtypes_seen, 2, flag, autocast) == [expected] * 2


def mean_gradient(reduce_dtype: str) -> float:
    """Return the mean over two ranks of the gradients 256 and 1, whose sum 257 bfloat16 rounds to 256."""
    root, unit = sharded(precision_policy("bf16-mixed", reduce_dtype=reduce_dtype))
    root(torch.tensor([256.0 if dist.get_rank() == 0 else 1.0])).sum().backward()
    return unit.weight.grad.full_tensor().item()


def test_gradients_of_mixed_precision_are_summed_in_float32_unless_asked_otherwise() -> None:
    assert run_ranks(mean_gradient, 2, "auto") == [128.5, 128.5]
    assert run_ranks(mean_gradient, 2, "bfloat16") == [128.0, 128.0]
