"""Models that are cut into pipeline stages as they are, as data: who makes them, where they are cut, what passes.

Tiny and random: Hugging Face's from their settings alone, torch's own, and ones written as users write them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tests.parity.tensor_models import (
    CLASSES,
    HEADS,
    HIDDEN,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Batch,
    Model,
    classified,
    distance,
    hugging_face,
    masked,
    own_loss,
    pictures,
    predicted,
    text,
    tokens,
    vectors,
)
from torch import Tensor, nn

LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model and where it is cut.

    Attributes:
        model: makes it, draws a batch, computes the loss.
        cuts: names of the modules with which stages 1, 2, ... begin.
        tensors: how many pass each cut.
        tied: names of parameters that several stages hold.
        tolerance: of losses and gradients; float64 but for losses that Hugging Face computes in float32.
    """

    model: Model
    cuts: Sequence[str]
    tensors: Sequence[int]
    tied: frozenset[str] = frozenset()
    tolerance: float = 1e-12


# Models as users write them ----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class NanoGPT(nn.Module):
    """Modules in a dictionary, and a head that is the embedding's weight, read by a function."""

    def __init__(self, *, functional: bool) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(LENGTH, WIDTH),
                "h": nn.ModuleList(Layer() for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.functional = functional
        if not functional:
            self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        x = self.transformer["ln_f"](x)
        return F.linear(x, self.transformer["wte"].weight) if self.functional else self.lm_head(x)


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """Convolutions and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1 = nn.Sequential(Residual(4), Residual(4))
        self.layer2 = nn.Sequential(Residual(4), Residual(4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(pixels))).mean(dim=(2, 3)))


class UNet(nn.Module):
    """What the way down returns is read on the way up, past all that lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.out = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        first = self.down1(pixels)
        x = self.up(self.middle(self.down2(first)))
        return self.head(self.out(torch.cat([x, first], dim=1)).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    """States are handed on from one recurrent layer to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Batch) -> Tensor:
        x, state = self.first(batch["x"])
        x, (hidden, _) = self.second(x, state)
        return self.out(x) + hidden[0].unsqueeze(1)


class Translator(nn.Module):
    """torch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Transformer(WIDTH, HEADS, 2, 2, HIDDEN, batch_first=True, norm_first=True)

    def forward(self, batch: Batch) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=batch["x"].dtype)
        return self.net(batch["memory"], batch["x"], tgt_mask=mask, tgt_is_causal=True)


class Noisy(nn.Module):
    """Noise is the input of the first layer and, compared with it, the target of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.Sequential(*(Layer() for _ in range(LAYERS))), nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Batch) -> Tensor:
        noise = torch.randn_like(batch["x"])
        return batch["y"] + self.out(self.layers(batch["x"] + noise)) - noise


class Perceptron(nn.Sequential):
    """Layers of torch's, one after the other."""

    def __init__(self) -> None:
        super().__init__(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch["x"])


# The table ---------------------------------------------------------------------------------------------------------------

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "head_dim": 4,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": LENGTH,
    "initializer_range": 0.2,
    "use_cache": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_BERT = {**_LLAMA, "num_labels": CLASSES, "pad_token_id": 0}
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
_WHISPER = {
    **_BART,
    "num_mel_bins": 4,
    "max_source_positions": LENGTH,
    "max_target_positions": LENGTH,
    "decoder_start_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_VIT = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": CLASSES,
    "initializer_range": 0.2,
}
_MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "state_size": 4,
    "num_hidden_layers": LAYERS,
    "time_step_rank": 4,
    "initializer_range": 0.2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# The other implementation has no kernel for float64 on CPUs.
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}


def _layers(kind: str, settings: Mapping[str, object], path: str, **more: object) -> Callable[..., Cut]:
    model = Model(network=functools.partial(hugging_face, kind, **{**settings, **more}), loss=predicted)
    return functools.partial(Cut, model=model, cuts=[f"network.{path}.{at}" for at in (1, 3)], tensors=(1, 1))


def _tied(*names: str) -> frozenset[str]:
    return frozenset(f"network.{name}.weight" for name in names)


def listen(network: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a model that hears."""
    features = batch["x"].reshape(len(batch["x"]), 4, -1)[:, :, : 2 * LENGTH]
    ids = (batch["y"][:, :, 0].abs() * 7).long() % VOCABULARY
    out = network(input_features=features, decoder_input_ids=ids)
    return F.cross_entropy(out.logits.flatten(0, 1), ids.roll(1, 1).flatten())


def continued(network: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a model with an encoder and a decoder, of its logits, in the dtype they are in."""
    out = network(input_ids=batch["input_ids"], decoder_input_ids=batch["labels"])
    return F.cross_entropy(out.logits.flatten(0, 1), batch["next"].flatten())


def recognised(network: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a Hugging Face model that sees, of its logits, in the dtype they are in."""
    return F.cross_entropy(network(pixel_values=batch["pixel_values"]).logits, batch["labels"])


def _own(network: Callable[[], nn.Module], loss: Callable[..., Tensor], batch: Callable[..., Batch]) -> Model:
    return Model(network=network, loss=loss, batch=batch)


CUTS: Mapping[str, Cut] = {
    "llama": _layers("LlamaForCausalLM", _LLAMA, "model.layers")(),
    "llama_tied": _layers("LlamaForCausalLM", _LLAMA, "model.layers", tie_word_embeddings=True)(
        tied=_tied("model.embed_tokens", "lm_head")
    ),
    "llama_own_loss": Cut(
        model=Model(network=functools.partial(hugging_face, "LlamaForCausalLM", **_LLAMA), loss=own_loss),
        cuts=["network.model.layers.2", "network.model.norm"],
        tensors=(1, 1),
        tolerance=1e-6,
    ),
    "qwen3": _layers("Qwen3ForCausalLM", _LLAMA, "model.layers")(),
    "mistral": _layers("MistralForCausalLM", _LLAMA, "model.layers")(),
    "gemma": _layers("GemmaForCausalLM", _LLAMA, "model.layers")(tied=_tied("model.embed_tokens", "lm_head")),
    "gemma2": _layers("Gemma2ForCausalLM", _LLAMA, "model.layers")(tied=_tied("model.embed_tokens", "lm_head")),
    "mixtral": _layers("MixtralForCausalLM", _LLAMA, "model.layers", **_EXPERTS)(),
    "gpt2": _layers("GPT2LMHeadModel", _GPT2, "transformer.h")(tied=_tied("transformer.wte", "lm_head")),
    "bert": Cut(
        model=Model(network=functools.partial(hugging_face, "BertForMaskedLM", **_BERT), loss=predicted, batch=masked),
        cuts=["network.bert.encoder.layer.1", "network.bert.encoder.layer.3"],
        tensors=(1, 1),
        tied=_tied("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ),
    "vit": Cut(
        model=_own(functools.partial(hugging_face, "ViTForImageClassification", **_VIT), recognised, pictures),
        cuts=["network.vit.layers.1", "network.vit.layers.3"],
        tensors=(1, 1),
    ),
    "t5": Cut(
        model=Model(network=functools.partial(hugging_face, "T5ForConditionalGeneration", **_T5), loss=continued),
        cuts=["network.encoder.block.1", "network.decoder.block.0", "network.decoder.block.1"],
        tensors=(2, 2, 3),
        tied=_tied("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    ),
    "bart": Cut(
        model=Model(network=functools.partial(hugging_face, "BartForConditionalGeneration", **_BART), loss=continued),
        cuts=["network.model.encoder.layers.1", "network.model.decoder.layers.0", "network.model.decoder.layers.1"],
        tensors=(1, 2, 2),
        tied=_tied("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"),
    ),
    "whisper": Cut(
        model=_own(functools.partial(hugging_face, "WhisperForConditionalGeneration", **_WHISPER), listen, vectors),
        cuts=["network.model.encoder.layers.1", "network.model.decoder.layers.0", "network.model.decoder.layers.1"],
        tensors=(1, 2, 2),
        tied=_tied("model.decoder.embed_tokens", "proj_out"),
    ),
    "mamba": _layers("MambaForCausalLM", _MAMBA, "backbone.layers")(tied=_tied("backbone.embeddings", "lm_head")),
    "transformer": Cut(
        model=_own(Translator, distance, vectors),
        cuts=["network.net.encoder.layers.1", "network.net.decoder.layers.0", "network.net.decoder.layers.1"],
        tensors=(1, 1, 2),
    ),
    "nanogpt": Cut(
        model=_own(functools.partial(NanoGPT, functional=False), text, tokens),
        cuts=["network.transformer.h.1", "network.transformer.h.3"],
        tensors=(1, 1),
        tied=_tied("transformer.wte", "lm_head"),
    ),
    "nanogpt_functional": Cut(
        model=_own(functools.partial(NanoGPT, functional=True), text, tokens),
        cuts=["network.transformer.h.1", "network.transformer.h.3"],
        tensors=(1, 1),
        tied=_tied("transformer.wte"),
    ),
    "sequential": Cut(model=_own(Perceptron, distance, vectors), cuts=["network.3", "network.6"], tensors=(1, 1)),
    "resnet": Cut(
        model=_own(ResNet, classified, pictures), cuts=["network.layer1.1", "network.layer2"], tensors=(1, 1)
    ),
    "resnet_inside_a_block": Cut(model=_own(ResNet, classified, pictures), cuts=["network.layer1.1.bn2"], tensors=(2,)),
    "unet": Cut(
        model=_own(UNet, classified, pictures),
        cuts=["network.down2", "network.middle", "network.up"],
        tensors=(1, 2, 2),
    ),
    "recurrent": Cut(model=_own(Recurrent, distance, vectors), cuts=["network.second"], tensors=(3,)),
    "noise": Cut(
        model=_own(Noisy, distance, vectors),
        cuts=["network.layers.1", "network.layers.3"],
        tensors=(1, 1),
    ),
}
