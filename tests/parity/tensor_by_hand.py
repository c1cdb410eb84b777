"""The demo GPT with each layer's parts computed one after the other, as tensor-parallel ranks compute them: for 16 bits.

In 16 bits it matters that every rank rounds its part of a sum before the parts are added, so that one process which multiplies
whole matrices is not what ranks are equal to. This module has the same parameters, and adds up parts where ranks do.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshbolt.demos import ByteGPT


class SmallGPT(pl.LightningModule):
    """The demo GPT in tiny, with an optimizer whose rounding does not depend on where a shard ends."""

    forward = ByteGPT.forward
    _loss = ByteGPT._loss

    def __init__(self) -> None:
        super().__init__()
        made = ByteGPT(dim=32, num_layers=2, num_heads=4, max_length=16)
        for name, child in made.named_children():
            setattr(self, name, child)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1 / 32, momentum=0.875)


class SmallGPTByHand(SmallGPT):
    """The same, each layer in `parts` parts."""

    parts = 2

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.attention.forward = _Attention(block.attention, self.parts)
            block.forward = _Block(block, self.parts)
        self.head.forward = _Columns(self.head, self.parts)


def batches(number: int) -> list[tuple[Tensor, Tensor]]:
    """Return tokens and those that follow them, both (4, 16)."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 256, (4, 17), generator=generator) for _ in range(number)]
    return [(tokens[:, :-1], tokens[:, 1:]) for tokens in drawn]


class _Attention:
    def __init__(self, layer: nn.Module, parts: int) -> None:
        self.layer, self.parts = layer, parts

    def __call__(self, x: Tensor) -> Tensor:
        layer, (batch, length, dim) = self.layer, x.shape
        heads, width = layer.num_heads // self.parts, dim // layer.num_heads
        added: Tensor | None = None
        for part in range(self.parts):
            weight, bias = (_of_heads(tensor, part, self.parts) for tensor in (layer.qkv.weight, layer.qkv.bias))
            qkv = F.linear(x, weight, bias).view(batch, length, 3, heads, width)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            out = F.linear(
                mixed.transpose(1, 2).reshape(batch, length, -1), layer.out.weight.chunk(self.parts, 1)[part]
            )
            added = out if added is None else added + out
        return added + layer.out.bias.to(added.dtype)


def _of_heads(tensor: Tensor, part: int, parts: int) -> Tensor:
    return torch.cat([section.chunk(parts)[part] for section in tensor.chunk(3)])


class _Block:
    def __init__(self, block: nn.Module, parts: int) -> None:
        self.block, self.parts = block, parts

    def __call__(self, x: Tensor) -> Tensor:
        block = self.block
        x = x + block.attention(block.norm1(x))
        read, added = block.norm2(x), None
        for part in range(self.parts):
            weight, bias = (tensor.chunk(self.parts)[part] for tensor in (block.widen.weight, block.widen.bias))
            out = F.linear(F.gelu(F.linear(read, weight, bias)), block.narrow.weight.chunk(self.parts, 1)[part])
            added = out if added is None else added + out
        return x + (added + block.narrow.bias.to(added.dtype))


class _Columns:
    def __init__(self, layer: nn.Module, parts: int) -> None:
        self.layer, self.parts = layer, parts

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, weight) for weight in self.layer.weight.chunk(self.parts)], dim=-1)
