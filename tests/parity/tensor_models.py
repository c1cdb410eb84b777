"""The parity rows of tensor parallelism as data: models that know nothing of it, and settings under which each is trained.

The models are tiny and random, of the architectures that plans are registered for: demo GPT, Hugging Face's, torch's own
transformer layers, and one with a fused projection as timm has them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshbolt import Zero
from meshbolt.demos import ByteGPT
from meshbolt.tensor import TensorParallel
from meshbolt.testing.parity.case import Case

WIDTH, HEADS, HIDDEN, VOCABULARY, LENGTH, BATCH, CLASSES = 16, 4, 24, 32, 8, 2, 4
STEPS = 4
Batch = dict[str, Tensor]


class Task(pl.LightningModule):
    """An ordinary LightningModule around a network."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = model.network()
        self.loss = model.loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(self.network, batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


# Batches ----------------------------------------------------------------------------------------------------------------


def tokens(generator: torch.Generator) -> Batch:
    """Draw tokens to be predicted from those before."""
    drawn = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return {"input_ids": drawn[:, :-1], "labels": drawn[:, :-1], "next": drawn[:, 1:]}


def masked(generator: torch.Generator) -> Batch:
    """Draw tokens of sequences of different lengths, some of which are to be predicted, and a class."""
    drawn = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)
    chosen = torch.rand(drawn.shape, generator=generator) < 0.4
    chosen[:, 0] = True
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
    present = torch.arange(LENGTH) < lengths
    return {
        "input_ids": drawn.masked_fill(chosen, 1),
        "attention_mask": present.long(),
        "next": drawn.masked_fill(~chosen, -100),
        "labels": torch.randint(CLASSES, (BATCH,), generator=generator),
    }


def pictures(generator: torch.Generator) -> Batch:
    """Draw pictures of 4 x 4 points and their classes."""
    return {
        "pixel_values": torch.randn(BATCH, 1, 8, 8, generator=generator),
        "labels": torch.randint(CLASSES, (BATCH,), generator=generator),
    }


def vectors(generator: torch.Generator) -> Batch:
    """Draw sequences of vectors, of which some end early, and what they are to become."""
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
    return {
        "x": torch.randn(BATCH, LENGTH, WIDTH, generator=generator),
        "memory": torch.randn(BATCH, LENGTH // 2, WIDTH, generator=generator),
        "y": torch.randn(BATCH, LENGTH, WIDTH, generator=generator),
        "absent": torch.arange(LENGTH) >= lengths,
    }


# Losses -----------------------------------------------------------------------------------------------------------------


def own_loss(network: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a Hugging Face model computes, in float32."""
    given = {
        key: value for key, value in batch.items() if key in ("input_ids", "attention_mask", "pixel_values", "labels")
    }
    return network(**given).loss


def predicted(network: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a Hugging Face model's logits, in the dtype they are in."""
    given = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    return F.cross_entropy(network(**given).logits.flatten(0, 1), batch["next"].flatten())


def translated(network: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a Hugging Face model with an encoder and a decoder."""
    return network(input_ids=batch["input_ids"], labels=batch["next"].contiguous()).loss


def distance(network: nn.Module, batch: Batch) -> Tensor:
    """Return how far what a network makes of vectors is from what they are to become."""
    return F.mse_loss(network(batch), batch["y"])


def classified(network: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of the classes of pictures."""
    return F.cross_entropy(network(batch["pixel_values"]), batch["labels"])


# Networks ---------------------------------------------------------------------------------------------------------------


def hugging_face(kind: str, **settings: Any) -> nn.Module:
    """Build a model of Hugging Face's from its settings alone.

    Args:
        kind: of the model's class.
        settings: of its configuration.
    """
    transformers = importlib.import_module("transformers")
    made = getattr(transformers, kind)
    return made(made.config_class(**settings)).train()


class Encoder(nn.Module):
    """torch's own encoder."""

    def __init__(self, *, causal: bool = False, padded: bool = False, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **settings)
        nested = settings["batch_first"] and not settings["norm_first"]  # elsewhere torch would only warn
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=nested)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.causal, self.padded, self.batch_first = causal, padded, settings["batch_first"]
        for parameter in self.encoder.layers[1].parameters():  # the second is a copy of the first
            parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"] if self.batch_first else batch["x"].transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=x.dtype) if self.causal else None
        absent = batch["absent"] if self.padded else None
        if self.causal and self.padded:
            mask = mask < 0
        x = self.out(self.encoder(x, mask=mask, src_key_padding_mask=absent, is_causal=self.causal and not self.padded))
        x = x if self.batch_first else x.transpose(0, 1)
        # What is at places without an input depends on which of torch's kernels has run.
        return x if absent is None else x.masked_fill(absent.unsqueeze(-1), 0)


class Decoder(nn.Module):
    """torch's own decoder, with attention to a memory."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, **settings)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, batch: Batch) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=batch["x"].dtype)
        return self.decoder(batch["x"], batch["memory"], tgt_mask=mask, tgt_is_causal=True)


class Attention(nn.Module):
    """nn.MultiheadAttention by itself, with all that it can be told."""

    def __init__(
        self, *, weights: bool = False, average: bool = True, memory: int | None = None, **settings: Any
    ) -> None:
        super().__init__()
        sizes = {} if memory is None else {"kdim": memory, "vdim": memory - 2}
        self.into_keys = nn.Linear(WIDTH, memory or WIDTH)
        self.into_values = nn.Linear(WIDTH, (memory - 2) if memory else WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **sizes, **settings)
        self.weights, self.average, self.from_memory = weights, average, memory is not None

    def forward(self, batch: Batch) -> Tensor:
        x = batch["x"]
        keys, values = (self.into_keys(x), self.into_values(x)) if self.from_memory else (x, x)
        out, weights = self.attention(
            x,
            keys,
            values,
            need_weights=self.weights,
            average_attn_weights=self.average,
            key_padding_mask=batch["absent"],
        )
        if weights is None:
            return out
        # What user code may do with weights: here they take part in the loss.
        spread = weights if self.average else weights.sum(dim=1)
        return out + spread @ x


class FusedBlock(nn.Module):
    """A block of a vision transformer as timm writes it."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
            self.proj_drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            batch, length, width = x.shape
            qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            query, key, value = qkv.unbind(0)
            mixed = F.scaled_dot_product_attention(
                self.q_norm(query), self.k_norm(key), value, dropout_p=0.1 if self.training else 0.0
            )
            return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(batch, length, width)))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = self.Attention(), self.Mlp()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.gamma
        return x + self.mlp(self.norm2(x))


class FusedViT(nn.Module):
    """A vision transformer as timm writes it: patches, a class token, blocks with fused projections."""

    def __init__(self, *, pool: str) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, WIDTH, kernel_size=2, stride=2)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH)) if pool == "token" else None
        self.pos_embed = nn.Parameter(torch.randn(1, 16 + (pool == "token"), WIDTH) / 4)
        self.blocks = nn.Sequential(FusedBlock(), FusedBlock())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        return self.head(x[:, 0] if self.cls_token is not None else x.mean(dim=1))


def text(network: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of the tokens that follow."""
    return F.cross_entropy(network(batch["input_ids"]).flatten(0, 1), batch["next"].flatten())


# The tables -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Model:
    """One network, how it is trained, and what is to be proved of it.

    Attributes:
        network: makes it.
        batch: draws a batch.
        loss: of the network on a batch.
        plan: as in `TensorParallel`.
        head: its head is in the plan, so that the loss may be computed in parts.
        blocks: it has repeated blocks, which can be recomputed.
    """

    network: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any] = tokens
    loss: Callable[[nn.Module, Any], Tensor] = own_loss
    plan: Any = "auto"
    head: bool = False
    blocks: bool = True


_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
    "use_cache": False,
}
_GROUPED = {**_LLAMA, "num_attention_heads": 2 * HEADS, "num_key_value_heads": HEADS, "head_dim": 4}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": LENGTH,
    "initializer_range": 0.2,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_BERT = {**_LLAMA, "num_labels": CLASSES, "pad_token_id": 0}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "max_position_embeddings": LENGTH,
    "init_std": 0.2,
    "pad_token_id": 0,
    "use_cache": False,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": HIDDEN,
    "num_layers": 2,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "use_cache": False,
}
_DRY = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": CLASSES,
    "initializer_range": 0.2,
}


def _of(kind: str, settings: Mapping[str, Any], **more: Any) -> Callable[[], nn.Module]:
    return functools.partial(hugging_face, kind, **{**settings, **more})


def _encoder(**settings: Any) -> Model:
    return Model(network=functools.partial(Encoder, **settings), batch=vectors, loss=distance)


def _attention(**settings: Any) -> Model:
    return Model(network=functools.partial(Attention, **settings), batch=vectors, loss=distance, blocks=False)


MODELS: Mapping[str, Model] = {
    "byte_gpt": Model(
        network=functools.partial(ByteGPT, dim=WIDTH, num_layers=2, num_heads=HEADS, max_length=LENGTH),
        loss=text,
        head=True,
    ),
    "llama": Model(network=_of("LlamaForCausalLM", _GROUPED), head=True),
    "llama_eager_tied": Model(
        network=_of("LlamaForCausalLM", _GROUPED, tie_word_embeddings=True, attn_implementation="eager"), head=True
    ),
    "llama_dropout": Model(
        network=_of("LlamaForCausalLM", _GROUPED, attention_dropout=0.1, attention_bias=True), head=True
    ),
    "llama_odd_vocabulary": Model(network=_of("LlamaForCausalLM", _GROUPED, vocab_size=VOCABULARY + 1)),
    "llama_by_name": Model(network=_of("LlamaForCausalLM", _GROUPED), plan="llama", head=True),
    "llama_own_plan": Model(network=_of("LlamaForCausalLM", _GROUPED), plan="_tp_plan", head=True),
    "qwen2": Model(network=_of("Qwen2ForCausalLM", _GROUPED), head=True),
    "qwen2_eager_tied": Model(
        network=_of("Qwen2ForCausalLM", _GROUPED, tie_word_embeddings=True, attn_implementation="eager"), head=True
    ),
    "qwen3": Model(network=_of("Qwen3ForCausalLM", _GROUPED), head=True),
    "qwen3_own_plan": Model(network=_of("Qwen3ForCausalLM", _GROUPED), plan="_tp_plan", head=True),
    "gpt2": Model(network=_of("GPT2LMHeadModel", _GPT2, **_DRY), loss=predicted, head=True),
    "gpt2_dropout": Model(network=_of("GPT2LMHeadModel", _GPT2), loss=predicted, head=True),
    "gpt2_dropout_eager": Model(
        network=_of("GPT2LMHeadModel", _GPT2, attn_implementation="eager"), loss=own_loss, head=True
    ),
    "bert_masked": Model(network=_of("BertForMaskedLM", _BERT), batch=masked, loss=predicted, head=True),
    "bert_masked_eager": Model(
        network=_of("BertForMaskedLM", _BERT, attn_implementation="eager"), batch=masked, loss=predicted, head=True
    ),
    "bert_classifier": Model(network=_of("BertForSequenceClassification", _BERT), batch=masked),
    "vit": Model(network=_of("ViTForImageClassification", _VIT), batch=pictures),
    "vit_eager": Model(
        network=_of("ViTForImageClassification", _VIT, attn_implementation="eager", attention_probs_dropout_prob=0.1),
        batch=pictures,
    ),
    "bart_tied": Model(network=_of("BartForConditionalGeneration", _BART), loss=translated, head=True),
    "t5": Model(network=_of("T5ForConditionalGeneration", _T5), loss=translated, head=True),
    "phi3_own_plan": Model(network=_of("Phi3ForCausalLM", {**_LLAMA, "pad_token_id": 0, "eos_token_id": 0})),
    "encoder": _encoder(batch_first=True, norm_first=False),
    "encoder_sequence_first": _encoder(batch_first=False, norm_first=False, padded=True),
    "encoder_norm_first": _encoder(batch_first=True, norm_first=True, causal=True, activation="gelu"),
    "encoder_dry": _encoder(batch_first=True, norm_first=True, causal=True, dropout=0.0, bias=False),
    "encoder_padded": _encoder(batch_first=True, norm_first=False, padded=True, dropout=0.0),
    "encoder_padded_causal": _encoder(batch_first=False, norm_first=True, padded=True, causal=True),
    "decoder": Model(network=functools.partial(Decoder, norm_first=False), batch=vectors, loss=distance),
    "decoder_norm_first": Model(
        network=functools.partial(Decoder, norm_first=True, dropout=0.0), batch=vectors, loss=distance
    ),
    "attention": _attention(dropout=0.1),
    "attention_weights": _attention(weights=True, dropout=0.1),
    "attention_weights_by_head": _attention(weights=True, average=False, bias=False),
    "attention_of_memory": _attention(memory=10),
    "attention_of_memory_weights": _attention(memory=10, weights=True, bias=False),
    "fused_vit": Model(network=functools.partial(FusedViT, pool="token"), batch=pictures, loss=classified),
    "fused_vit_mean": Model(network=functools.partial(FusedViT, pool="mean"), batch=pictures, loss=classified),
}

_CLIPPED = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is trained.

    Attributes:
        ranks: in all.
        size: that share layers.
        zero: stage over the others.
        tensor: further arguments of `TensorParallel`.
        arguments: further arguments of `MeshStrategy`.
        trainer: arguments of the Trainer.
        needs_head: only models whose head is in the plan can be trained so.
    """

    ranks: int = 2
    size: int = 2
    zero: int = 0
    tensor: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    needs_head: bool = False


SETTINGS: Mapping[str, Setting] = {
    "tp2": Setting(),
    "tp2_whole_sequences": Setting(tensor={"sequence_parallel": False}),
    "tp4": Setting(ranks=4, size=4),
    "tp2_zero1_accumulated": Setting(ranks=4, zero=1, trainer=_CLIPPED),
    "tp2_zero3_accumulated": Setting(ranks=4, zero=3, trainer=_CLIPPED),
    "tp2_zero2_whole_sequences": Setting(ranks=4, zero=2, tensor={"sequence_parallel": False}),
    "tp2_loss": Setting(tensor={"loss_parallel": True}, needs_head=True),
    "tp2_zero3_loss": Setting(ranks=4, zero=3, tensor={"loss_parallel": True}, trainer=_CLIPPED, needs_head=True),
    "tp2_traced": Setting(tensor={"plan": "traced"}),
    "tp2_zero3_traced": Setting(ranks=4, zero=3, tensor={"plan": "traced"}, trainer=_CLIPPED),
    "tp2_zero3_recompute": Setting(ranks=4, zero=3, arguments={"recompute": "full"}),
}


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One comparison, in words of the tables above."""

    model: str
    setting: str

    def __str__(self) -> str:
        """Return the row as a test id."""
        return f"{self.model}-{self.setting}"

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return SETTINGS[self.setting].ranks

    def case(self) -> Case:
        """Return the comparison that the row stands for."""
        model, setting = MODELS[self.model], SETTINGS[self.setting]
        tensor = TensorParallel(setting.size, **{"plan": model.plan, **setting.tensor})
        window = setting.trainer.get("accumulate_grad_batches", 1)
        return Case(
            module=functools.partial(Task, model),
            data=batches(self.model, STEPS * window * setting.ranks // setting.size),
            strategy={"zero": self.zero(), "tensor_parallel": tensor, **setting.arguments},
            ranks=setting.ranks,
            steps=STEPS,
            precision="64-true",
            **setting.trainer,
        )

    def zero(self) -> Zero:
        """Return how the row's ranks divide the module."""
        return Zero(stage=SETTINGS[self.setting].zero)

    def reference(self) -> TensorRow:
        """Return a row that has the same reference in one process: of as many batches, in as large windows."""
        alike = (self.case().data_ranks, SETTINGS[self.setting].trainer)
        others = (dataclasses.replace(self, setting=name) for name in SETTINGS)
        return next(row for row in others if (row.case().data_ranks, SETTINGS[row.setting].trainer) == alike)


@functools.cache
def batches(model: str, count: int) -> list[Any]:
    """Return batches of a model, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return [MODELS[model].batch(generator) for _ in range(count)]


def tensor_rows() -> tuple[TensorRow, ...]:
    """Return every row: each model in each setting that it can be trained in."""
    return tuple(
        TensorRow(model=model, setting=setting)
        for model, what in MODELS.items()
        for setting, how in SETTINGS.items()
        if (what.head or not how.needs_head) and (what.blocks or "recompute" not in how.arguments)
    )
