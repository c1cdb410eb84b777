"""The modules of the parity matrix: small, of uneven shapes, one for each thing that sharding could get wrong.

The second digit of the widths (7, 10, 13) divides no number of ranks, so that shards differ in size on 2, 3 and 4 ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

IN, WIDTH, HIDDEN = 7, 10, 13
VOCABULARY, LENGTH = 11, 6
Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Iterator[nn.Parameter] | list[dict[str, object]]], torch.optim.Optimizer]


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Plain(nn.Module):
    """A list of blocks between two layers of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(IN, WIDTH)
        self.blocks = nn.ModuleList(self.block() for _ in range(3))
        self.out = nn.Linear(WIDTH, 1)

    def block(self) -> nn.Module:
        return Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)

    def loss(self, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y)


class SmallShapes(Plain):
    """Parameters without dimensions, and with fewer rows than there are ranks, in a block and at the root."""

    class Block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.9))
            self.row = nn.Parameter(torch.randn(1, WIDTH) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain + self.row

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.1))
        self.one, self.two = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(2))
        self.row = nn.Parameter(torch.randn(1, 5))

    def block(self) -> nn.Module:
        return SmallShapes.Block()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.one + self.two.sum() * self.row.mean()


class Tied(Plain):
    """One weight in two layers of the root, and one in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight
        self.blocks[2].up.weight = self.blocks[0].up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.second(torch.tanh(self.first(x))))


class Frozen(Plain):
    """A frozen layer, a frozen block, and a block that is frozen in part."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.into, self.blocks[0], self.blocks[1].up):
            part.requires_grad_(False)


class Unused(Plain):
    """A layer, a block, and a parameter of a used block that no batch uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)
        self.spare_scale = nn.Parameter(torch.tensor(2.0))
        self.blocks[1].spare = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in self.blocks[:2]:
            x = block(x)
        return self.out(x)


class Shared(Plain):
    """A block and a layer that are called twice in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        return self.out(torch.tanh(x)) - self.out(x)


class Sometimes(Plain):
    """A block that not every batch uses, and blocks whose order changes."""

    is_short = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in (self.blocks[2], self.blocks[0]) if self.is_short else self.blocks:
            x = block(x)
        return self.out(x)


class Normalised(Plain):
    """BatchNorm at the root and in blocks; its statistics belong to the rank.

    What a normalisation takes away again (a bias before it, the scale of what is normalised twice) has a gradient of zero, and
    AdamW makes steps of full length out of its rounding. They would show in the statistics, so there is nothing of the kind here.
    """

    class Block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(IN, WIDTH, bias=False)
        self.norm = nn.BatchNorm1d(WIDTH)

    def block(self) -> nn.Module:
        return Normalised.Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.into(x))
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Dropped(Plain):
    """Dropout, from the random state of the rank."""

    class Block(Block):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.3, self.training)

    def block(self) -> nn.Module:
        return Dropped.Block()


class MixedDtypes(Plain):
    """A float64 layer in a float32 block, and a block that is float64 as a whole."""

    class Block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(WIDTH, 2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            wide = self.wide(x.to(self.wide.weight.dtype))
            return super().forward(x) + wide.mean(-1, keepdim=True).to(x.dtype) / 4

    class WideBlock(Block):
        def __init__(self) -> None:
            super().__init__()
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(self.up.weight.dtype)).to(x.dtype)

    def __init__(self) -> None:
        super().__init__()
        self.wide_blocks = nn.ModuleList(MixedDtypes.WideBlock() for _ in range(2))

    def block(self) -> nn.Module:
        return MixedDtypes.Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        for block in (*self.blocks, *self.wide_blocks):
            x = block(x)
        return self.out(x)


class Attention(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = Block()

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return self.feed(self.norm2(x))


class Gpt(nn.Module):
    """A transformer over tokens, its head tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, batch: Batch) -> Tensor:
        tokens, following = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())


class Task(pl.LightningModule):
    """An ordinary LightningModule around a network, with a parameter of its own."""

    def __init__(self, network: Callable[[], nn.Module], optimizer: MakeOptimizer, *, late: bool = False) -> None:
        super().__init__()
        self.make_network, self.make_optimizer, self.late = network, optimizer, late
        self.bias = nn.Parameter(torch.full((3,), 0.1))
        if not late:
            self.network = network()

    def configure_model(self) -> None:
        if self.late and not hasattr(self, "network"):
            self.network = self.make_network()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        loss = self.network.loss(batch)
        # A parameter of the LightningModule itself, used outside of every forward.
        return {"loss": loss + (self.bias**2).sum().to(loss.dtype)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


class GroupedTask(Task):
    """Two groups of parameters, with settings of their own: powers of two, whose products no dtype rounds."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        vectors = [p for p in self.parameters() if p.dim() < 2]
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        return self.make_optimizer([{"params": vectors, "lr": 1 / 64}, {"params": matrices, "weight_decay": 1 / 8}])


class ScheduledTask(Task):
    """A schedule that changes the learning rate with every step."""

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = self.make_optimizer(self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SometimesTask(Task):
    """Leaves a block out of every third batch, the first of a window of three."""

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self.network.is_short = batch_idx % 3 == 0
        return super().training_step(batch, batch_idx)


class ApartTask(Task):
    """Weights that differ from rank to rank until rank 0's are given to all."""

    def __init__(self, network: Callable[[], nn.Module], optimizer: MakeOptimizer) -> None:
        super().__init__(network, optimizer)
        if dist.get_rank() > 0:
            with torch.no_grad():
                for parameter in self.parameters():
                    parameter.add_(dist.get_rank())


def numbers(generator: torch.Generator) -> Batch:
    """Return a batch of a regression."""
    x = torch.randn(4, IN, generator=generator)
    return x, torch.sin(x.sum(1, keepdim=True))


def tokens(generator: torch.Generator) -> Batch:
    """Return a batch of token sequences, each with its continuation."""
    drawn = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
