"""A number by which a changed tensor is recognised without a copy of what it was."""

from __future__ import annotations

import functools

import torch

_SEED = 0x6D657368
# On a CPU a block and its weights fit into a cache; a GPU is to be called few times.
_BLOCK, _LARGE_BLOCK = 1 << 16, 1 << 22
_STEP = 0x5851F42D4C957F2D  # odd, so that nothing is lost when it is multiplied with


@torch.no_grad()
def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Return a number, as a tensor, that is another one as good as certainly where any bit of a tensor is.

    Args:
        tensor: plain, on any device; of any shape, which does not count.
    """
    flat = tensor.detach().contiguous().view(-1)
    size, start = flat.element_size(), flat.storage_offset()
    is_even = flat.numel() * size % 4 == 0 and start * size % 4 == 0
    words = flat.view(torch.int32 if is_even else torch.uint8)
    weights = _weights(words.device, _BLOCK if words.device.type == "cpu" else _LARGE_BLOCK)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for block in words.split(len(weights)):
        # Sums of integers go round where they are too large, so that their order does not count.
        total = total * _STEP + (block * weights[: len(block)]).sum()
    return total


@functools.lru_cache(maxsize=2)
def _weights(device: torch.device, count: int) -> torch.Tensor:
    # Drawn, not counted up: of counted ones, changes that mirror each other would take each other away.
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(-(2**62), 2**62, (count,), generator=generator, dtype=torch.int64)
    return (2 * drawn + 1).to(device)
