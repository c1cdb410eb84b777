"""Lightning's finetuning callbacks, which ask by its values whether an optimizer has a parameter already."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch.optim import Optimizer

from meshbolt.pipeline import is_foreign

_PLAIN = "_meshbolt_plain"


def let_finetuning_know_parameters() -> None:
    """Let finetuning callbacks know parameters by what they are, where ranks have the values of some only; once is enough.

    Ranks that compared values would come to different parameter groups.
    """
    plain = BaseFinetuning.filter_on_optimizer
    if hasattr(plain, _PLAIN):
        return

    @functools.wraps(plain)
    def filtered(optimizer: Optimizer, params: Iterable[torch.Tensor]) -> list[Any]:
        asked = list(params)
        known = [each for group in optimizer.param_groups for each in group["params"]]
        if not any(map(is_foreign, [*asked, *known])):
            return plain(optimizer, asked)
        ids = set(map(id, known))
        return [each for each in asked if id(each) not in ids]

    setattr(filtered, _PLAIN, plain)
    BaseFinetuning.filter_on_optimizer = staticmethod(filtered)  # type: ignore[method-assign]
