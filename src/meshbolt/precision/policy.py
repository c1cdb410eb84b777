"""What each precision flag of Lightning means for shards, gathers, reductions and arithmetic.

A sharded model has four dtypes where a model on one device has one: the dtype shards are *stored* in (what the
optimizer updates), the one parameters are *gathered* in, the one gradients are *reduced* in, and the one *autocast*
computes in. `precision_policy` looks a flag up in one table, and `PrecisionPolicy` turns the row into FSDP2's
`MixedPrecisionPolicy`.

| flag | stored | gathered | reduced | autocast | loss scaled |
|---|---|---|---|---|---|
| `32-true` | as the module made it | as stored | float32 if stored in 16 bits, else as stored | no | no |
| `64-true` | float64 | as stored | as stored | no | no |
| `bf16-mixed` | float32 | bfloat16 | float32 | bfloat16 | no |
| `16-mixed` | float32 | float16 | float32 | float16 | yes |
| `bf16-true` | bfloat16 | as stored | float32 | no | no |
| `16-true` | float16 | as stored | float32 | no | no |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from meshbolt.errors import ConfigError, did_you_mean

_SIXTEEN_BIT = (torch.float16, torch.bfloat16)

_REDUCE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """The dtypes of one precision flag, and the FSDP2 policies that follow from them."""

    flag: str
    """The flag as Lightning writes it, for messages."""

    storage_dtype: torch.dtype | None = None
    """What shards, gradients and optimizer state are stored in; None: what the module made its parameters in."""

    param_dtype: torch.dtype | None = None
    """What parameters are gathered in; None: as stored."""

    reduce_dtype: torch.dtype | None = None
    """What gradients are reduced, and between reductions accumulated, in; None: see `unit_policy`."""

    output_dtype: torch.dtype | None = None
    """What the outermost module's floating-point outputs are cast to; None: nothing is cast."""

    autocast_dtype: torch.dtype | None = None
    """What autocast computes in; None: autocast is off."""

    scales_loss: bool = False
    """Whether the loss has to be scaled, because small gradients vanish in the dtype they are computed in."""

    def unit_policy(self, *, stored: torch.dtype = torch.float32) -> MixedPrecisionPolicy:
        """Return FSDP2's policy for a unit that is not the outermost module.

        Under autocast a unit's inputs keep their dtype, as on one device, and every operation casts for itself: a float
        input such as a diffusion time step would lose digits if the unit rounded it. Without autocast nothing else
        would bring inputs and gathered parameters to one dtype, so the unit casts its inputs.

        Args:
            stored: dtype of the unit's shards. Where `reduce_dtype` and `param_dtype` leave it open, 16-bit shards are
                reduced in float32 and all others in their own dtype.
        """
        return MixedPrecisionPolicy(
            param_dtype=self.param_dtype,
            reduce_dtype=self._reduce_dtype_of(stored),
            cast_forward_inputs=self.autocast_dtype is None,
        )

    def root_policy(self, *, stored: torch.dtype = torch.float32) -> MixedPrecisionPolicy:
        """Return FSDP2's policy for the outermost module: a unit's policy that also casts what leaves the model.

        Args:
            stored: dtype of the shards that the outermost module itself owns.
        """
        return replace(self.unit_policy(stored=stored), output_dtype=self.output_dtype)

    def _reduce_dtype_of(self, stored: torch.dtype) -> torch.dtype | None:
        if self.reduce_dtype is not None:
            return self.reduce_dtype
        return torch.float32 if (self.param_dtype or stored) in _SIXTEEN_BIT else None


_POLICIES: dict[str, PrecisionPolicy] = {
    policy.flag: policy
    for policy in (
        PrecisionPolicy(flag="32-true"),
        PrecisionPolicy(flag="64-true", storage_dtype=torch.float64),
        PrecisionPolicy(
            flag="bf16-mixed",
            storage_dtype=torch.float32,
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            output_dtype=torch.float32,
            autocast_dtype=torch.bfloat16,
        ),
        PrecisionPolicy(
            flag="16-mixed",
            storage_dtype=torch.float32,
            param_dtype=torch.float16,
            reduce_dtype=torch.float32,
            output_dtype=torch.float32,
            autocast_dtype=torch.float16,
            scales_loss=True,
        ),
        PrecisionPolicy(flag="bf16-true", storage_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        PrecisionPolicy(flag="16-true", storage_dtype=torch.float16, reduce_dtype=torch.float32),
    )
}


def precision_policy(
    flag: str, *, autocast: bool = True, reduce_dtype: str = "auto", allow_no_master: bool = False
) -> PrecisionPolicy:
    """Return what a precision flag of Lightning means, with the user's changes to it.

    Args:
        flag: one of "32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true".
        autocast: whether a `*-mixed` flag runs the forward under autocast, as Lightning does on one device; False
            computes everything in the 16-bit dtype instead, as DeepSpeed does. The other flags never use autocast.
        reduce_dtype: name of the dtype gradients are reduced in; "auto" is float32 for 16-bit parameters and the
            parameter's own dtype for all others.
        allow_no_master: accept "16-true", which trains float16 weights without a float32 copy of them.

    Raises:
        ConfigError: the flag or the dtype is unknown, or the flag is "16-true" without `allow_no_master`.
    """
    if flag not in _POLICIES:
        raise ConfigError(f"precision={flag!r} is not a precision of meshbolt{did_you_mean(flag, _POLICIES)}")
    if flag == "16-true" and not allow_no_master:
        raise ConfigError(
            "precision='16-true' keeps weights and optimizer state in float16 without a float32 master copy: updates "
            "smaller than a thousandth of a weight are lost, and gradients below 6e-8 become zero. Use '16-mixed' "
            "(float32 shards and a scaled loss) or 'bf16-true'; to train without a master copy all the same, pass "
            "plugins=meshbolt.plugins.HalfPrecision('16-true', allow_no_master=True) instead of the flag."
        )
    policy = _POLICIES[flag]
    if not autocast:
        policy = replace(policy, autocast_dtype=None)
    return policy if reduce_dtype == "auto" else replace(policy, reduce_dtype=_reduce_dtype(reduce_dtype))


def _reduce_dtype(name: str) -> torch.dtype:
    if name not in _REDUCE_DTYPES:
        known = did_you_mean(name, ["auto", *_REDUCE_DTYPES])
        raise ConfigError(f"reduce_dtype={name!r} is not a dtype that gradients can be reduced in{known}")
    return _REDUCE_DTYPES[name]
