"""The model that every contender trains: a small byte-level GPT in plain PyTorch, from a fixed seed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm attention and MLP; x is (batch, time, width)."""

    def __init__(self, width: int, heads: int, *, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values."""
        if hasattr(self, "qkv"):
            return self.qkv(x).split(x.shape[-1], dim=-1)
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        # Written so that it also works with some of the heads, as tensor parallelism by hand asks for.
        q, k, v = (part.view(batch, time, -1, self.head_width).transpose(1, 2) for part in self.parts(self.norm1(x)))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, time, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out; tokens are (batch, time), logits (batch, time, vocabulary)."""

    def __init__(
        self,
        *,
        layers: int = 6,
        width: int = 256,
        heads: int = 4,
        vocabulary: int = 256,
        time: int = 128,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(time, width)
        self.blocks = nn.ModuleList(Block(width, heads, fused=fused) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(**sizes: Any) -> GPT:
    """Return the model with the same weights on every rank and in every process."""
    torch.manual_seed(0)
    return GPT(**sizes)


def batch(index: int, rank: int, *, samples: int, time: int = 128) -> tuple[Tensor, Tensor]:
    """Return the tokens of one rank's batch and the tokens that follow them, both (samples, time)."""
    generator = torch.Generator().manual_seed(1000 * index + rank)
    tokens = torch.randint(0, 256, (samples, time + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def loss_of(model: nn.Module, tokens: Tensor, following: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token."""
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), following.flatten())
