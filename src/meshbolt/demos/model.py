"""A GPT over bytes, as plain as it gets: standard torch modules, blocks in a `ModuleList`, one loss, one optimizer."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

VOCABULARY = 256


class Attention(nn.Module):
    """Causal self-attention with queries, keys and values from one projection."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        """Make the projections.

        Args:
            dim: width of the residual stream.
            num_heads: divides `dim`.
        """
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.normal_(self.out.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each position to itself and those before it.

        Args:
            x: (batch, length, dim).
        """
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return joined


class Block(nn.Module):
    """One layer of the transformer: attention, then a two-layer perceptron, each on a normalised residual stream."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        """Make the layer.

        Args:
            dim: width of the residual stream.
            num_heads: divides `dim`.
        """
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        nn.init.normal_(self.narrow.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and perceptron to the residual stream.

        Args:
            x: (batch, length, dim).
        """
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.narrow(F.gelu(self.widen(self.norm2(x))))
        return out


class ByteGPT(pl.LightningModule):
    """A language model over the 256 byte values; the default has 0.88 million parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from meshbolt.demos import ByteGPT, PydocText
        >>> trainer = Trainer(strategy="zero2", accelerator="cpu", devices=2, max_steps=50)
        >>> trainer.fit(ByteGPT(), PydocText())
    """

    def __init__(
        self,
        dim: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        max_length: int = 128,
        learning_rate: float = 3e-3,
        warmup_steps: int = 10,
        weight_decay: float = 0.01,
    ) -> None:
        """Build the model.

        Args:
            dim: width of the residual stream.
            num_layers: number of blocks.
            num_heads: attention heads of a block; divides `dim`.
            max_length: the longest context, in bytes.
            learning_rate: of AdamW, after the warm-up.
            warmup_steps: optimizer steps over which the learning rate grows linearly from nothing.
            weight_decay: of AdamW.
        """
        super().__init__()
        self.save_hyperparameters()
        self.max_length = max_length
        self.learning_rate, self.warmup_steps, self.weight_decay = learning_rate, warmup_steps, weight_decay
        self.tokens = nn.Embedding(VOCABULARY, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.blocks = nn.ModuleList([Block(dim, num_heads=num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY, bias=False)
        # What each layer adds is small beside the stream it is added to, and no byte is likelier than another at first.
        nn.init.normal_(self.tokens.weight, std=0.5)
        nn.init.normal_(self.positions.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the byte after each position.

        Args:
            tokens: byte values, (batch, length).

        Returns:
            Logits, (batch, length, 256).
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch, in nats per byte."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean cross-entropy over the held-out text, in nats per byte."""
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean cross-entropy of a batch, in nats per byte."""
        self.log("test_loss", self._loss(batch), prog_bar=True, sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the likeliest byte after each position, (batch, length)."""
        likeliest: Tensor = self(batch[0]).argmax(dim=-1)
        return likeliest

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a linear warm-up."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=self.weight_decay
        )
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / self.warmup_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    @torch.no_grad()
    def generate(self, prompt: str, *, num_bytes: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
        """Continue a text, one sampled byte after the other; all ranks sample alike.

        Args:
            prompt: what to continue.
            num_bytes: how much to add.
            temperature: below 1 keeps to likely bytes, above 1 is bolder.
            seed: of a random generator of its own, so that training is not disturbed.

        Returns:
            The prompt and its continuation.
        """
        dice = torch.Generator().manual_seed(seed)
        text = list(prompt.encode())
        for _ in range(num_bytes):
            context = torch.tensor([text[-self.max_length :]], device=self.device)
            logits = self(context)[0, -1].float().cpu()
            text.append(int(torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=dice)))
        return bytes(text).decode(errors="replace")

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())
