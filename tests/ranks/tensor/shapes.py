"""Rows of operations that move elements, reduce dims, multiply, attend, look tokens up and lose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.ranks.tensor.elements import forms
from tests.ranks.tensor.rows import GATHERED, SPLIT, WHOLE, Operand, Row, plain, split

WIDTH = 24
# (batch, length, features), features split as a layer's output is; in three sections as a fused projection's is.
FEATURES = split(2, 8, WIDTH, dim=2)
FUSED = split(2, 8, 3 * WIDTH, dim=2, sections=3)
SEQUENCE = split(2, 8, WIDTH, dim=1)
# (batch, heads, length, size of a head)
HEADS = split(2, 8, 6, 4, dim=1)
BATCH = split(8, 2, 6, 4, dim=0)
TOKENS = plain(2, 6, dtype=torch.int64, below=16)


def row(name: str, function: Callable[..., Any], *operands: Operand, result: str = SPLIT) -> Row:
    return Row(name, function, operands, result)


def view_rows() -> list[Row]:
    return [
        row("view heads", lambda x: x.view(2, 8, 4, 6), FEATURES),
        row("view -1", lambda x: x.view(2, -1, 4, 6), FEATURES),
        row("view by name", lambda x: x.view(size=(2, 8, 4, 6)), FEATURES),
        row("view a list", lambda x: x.view([2, 8, 8, 3]), FEATURES),
        row("view flat rows", lambda x: x.view(-1, WIDTH), FEATURES),
        row("view flat", lambda x: x.view(-1), FEATURES),
        row("view flat and back", lambda x: x.view(-1).view(2, 8, WIDTH), FEATURES),
        row("view rows of a split sequence", lambda x: x.reshape(16, WIDTH), SEQUENCE),
        row("view with too small a dim", lambda x: x.view(2, 8, 3, 8), FEATURES, result=GATHERED),
        row("view as another dtype", lambda x: x.view(torch.int64), FEATURES, result=GATHERED),
        row("view fused", lambda x: x.view(2, 8, 3, 4, 6), FUSED),
        row("view heads of a fused projection by heads", lambda x: x.view(2, 8, 4, 18), split(2, 8, 72, dim=2)),
        row("reshape", lambda x: torch.reshape(x, (2, 8, 4, 6)), FEATURES),
        row("reshape by name", lambda x: torch.reshape(x, shape=(2, 8, 4, 6)), FEATURES),
        row("reshape numbers", lambda x: x.reshape(2, 8, 4, 6), FEATURES),
        row("reshape, heads joined", lambda x: x.transpose(1, 2).reshape(2, 6, 32), HEADS),
        row("view_as", lambda x, y: (x.view_as(y), x.reshape_as(y)), FEATURES, plain(2, 8, 4, 6)),
        row("whole as split", lambda x, y: y.view_as(x), FEATURES, plain(16, WIDTH), result=GATHERED),
        row("flatten", lambda x: (x.flatten(), x.flatten(1), x.flatten(0, 1), torch.flatten(x, start_dim=2)), HEADS),
        row("flatten heads", lambda x: x.transpose(1, 2).flatten(-2), HEADS),
        row("flatten by names", lambda x: torch.flatten(input=x, start_dim=0, end_dim=1), SEQUENCE),
        row(
            "unflatten",
            lambda x: (x.unflatten(-1, (4, -1)), x.unflatten(1, (2, 4)), torch.unflatten(x, 2, (8, 3))),
            FEATURES,
        ),
        row("unflatten by names", lambda x: x.unflatten(dim=2, sizes=(3, 8, 3)), FUSED),
        row(
            "transpose", lambda x: (x.transpose(1, 2), x.transpose(-1, -2), x.transpose(0, 1), x.transpose(1, 1)), HEADS
        ),
        row("transpose by names", lambda x: (x.transpose(dim0=1, dim1=-1), x.transpose(1, dim1=0)), HEADS),
        row("torch.transpose", lambda x: torch.transpose(x, 1, 3), HEADS),
        row("swapaxes", lambda x: (x.swapaxes(1, 2), torch.swapaxes(x, axis0=0, axis1=1)), HEADS),
        row("swapdims", lambda x: (x.swapdims(1, 2), torch.swapdims(x, dim0=0, dim1=1)), HEADS),
        row("t", lambda x: (x.t(), x.T, torch.t(x), x.H), split(8, 6, dim=0)),
        row("mT, adjoint", lambda x: (x.mT, x.mH, x.adjoint(), torch.adjoint(x)), HEADS),
        row(
            "adjoint of complex ones",
            lambda x: x.adjoint(),
            split(4, 6, dim=0, dtype=torch.complex128),
            result=GATHERED,
        ),
        row("mH of complex ones", lambda x: x.mH, split(4, 6, dim=0, dtype=torch.complex128), result=GATHERED),
        row(
            "permute",
            lambda x: (x.permute(0, 2, 1, 3), x.permute((3, 1, 0, -2)), torch.permute(x, (1, 0, 2, 3))),
            HEADS,
        ),
        row("permute by name", lambda x: x.permute(dims=(2, 0, 1, 3)), HEADS),
        row("permute fused", lambda x: x.view(2, 8, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0), FUSED),
        row("movedim", lambda x: (x.movedim(1, -1), torch.movedim(x, (0, 1), (2, 0)), x.moveaxis(2, 1)), HEADS),
        row("movedim by names", lambda x: torch.movedim(x, destination=0, source=1), HEADS),
        row("moveaxis", lambda x: torch.moveaxis(x, 1, 2), HEADS),
        row(
            "unsqueeze",
            lambda x: (x.unsqueeze(0), x.unsqueeze(1), x.unsqueeze(-1), torch.unsqueeze(x, dim=-2)),
            FEATURES,
        ),
        row(
            "squeeze", lambda x: (x.squeeze(1), x.squeeze(), x.squeeze(0), x.squeeze((0, 1))), split(1, 1, 8, 6, dim=2)
        ),
        row(
            "torch.squeeze",
            lambda x: (torch.squeeze(x), torch.squeeze(x, dim=-4), x.squeeze(2)),
            split(1, 1, 8, 6, dim=2),
        ),
        row("squeeze a dim of one per rank", lambda x: x.squeeze(), split(2, 4, 3, dim=1)),
        row("squeeze a dim of one per rank by number", lambda x: x.squeeze(1), split(2, 4, 3, dim=1)),
        row("expand", lambda x: (x.expand(5, -1, 8, 6), x.expand((1, 3, 8, -1))), split(1, 1, 8, 6, dim=2)),
        row("expand by name", lambda x: x.expand(size=(2, 1, 1, 8, 6)), split(1, 1, 8, 6, dim=2)),
        row("expand heads", lambda x: x[:, :, None].expand(2, 8, 3, 6, 4).reshape(2, 24, 6, 4), HEADS),
        row("expand_as", lambda x, y: x.expand_as(y), split(1, 8, 1, dim=1), plain(3, 8, 5)),
        row(
            "whole expanded as split",
            lambda x, y: y.expand_as(x),
            split(3, 8, 5, dim=1),
            plain(1, 8, 5),
            result=GATHERED,
        ),
        row(
            "broadcast_to",
            lambda x: (x.broadcast_to((3, 8, 5)), torch.broadcast_to(x, size=(2, 3, 8, 5))),
            split(8, 5, dim=0),
        ),
        row("repeat_interleave", lambda x: (x.repeat_interleave(3, dim=1), torch.repeat_interleave(x, 2, -1)), HEADS),
        row("repeat_interleave by names", lambda x: torch.repeat_interleave(x, repeats=2, dim=0), FUSED),
        row("repeat_interleave in sections", lambda x: x.repeat_interleave(2, 2), FUSED),
        row("repeat_interleave flat", lambda x: x.repeat_interleave(2), HEADS, result=GATHERED),
        row(
            "repeat_interleave by a tensor",
            lambda x, n: x.repeat_interleave(n, 1),
            HEADS,
            plain(8, dtype=torch.int64, below=3),
            result=GATHERED,
        ),
        row(
            "repeat", lambda x: (x.repeat(2, 1, 3, 1), x.repeat((3, 1, 1, 1, 2)), x.repeat(repeats=(1, 1, 2, 1))), HEADS
        ),
        row("repeat the split dim", lambda x: x.repeat(1, 2, 1, 1), HEADS, result=GATHERED),
        row("tile", lambda x: (torch.tile(x, (2, 1, 3, 1)), x.tile(2, 1, 1, 1)), HEADS),
        row("tile fewer dims", lambda x: x.tile(2), HEADS, result=GATHERED),
        row("flip", lambda x: (x.flip(2), x.flip((0, -1)), torch.flip(x, dims=(3,))), HEADS),
        row("flip the split dim", lambda x: x.flip(1), HEADS, result=GATHERED),
        row("roll", lambda x: (x.roll(1, 2), x.roll((1, 2), (0, -1)), torch.roll(x, shifts=1, dims=3)), HEADS),
        row("roll flat", lambda x: x.roll(1), HEADS, result=GATHERED),
        row(
            "pad",
            lambda x: (F.pad(x, (1, 0)), F.pad(x, (0, 0, 2, 1), value=3.0), F.pad(x, [1, 1], mode="constant")),
            HEADS,
        ),
        row("pad the split dim", lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), HEADS, result=GATHERED),
        row("pad by reflection", lambda x: F.pad(x, (1, 1), mode="reflect"), split(2, 8, 6, dim=1), result=GATHERED),
        row(
            "index_select",
            lambda x, i: (x.index_select(2, i), torch.index_select(x, -2, index=i)),
            HEADS,
            plain(3, dtype=torch.int64, below=6),
        ),
        row(
            "index_select the split dim",
            lambda x, i: x.index_select(1, i),
            HEADS,
            plain(3, dtype=torch.int64, below=6),
            result=GATHERED,
        ),
        row("tril", lambda x: (x.tril(), torch.tril(x, diagonal=1), x.triu(1), torch.triu(x)), split(4, 6, 6, dim=0)),
        row("tril of split matrices", lambda x: x.tril(), split(2, 8, 8, dim=1), result=GATHERED),
        row("view_as_complex", _complex, FEATURES),
        row(
            "view_as_complex, pairs split", lambda x: torch.view_as_complex(x.view(2, 8, 12, 2)), split(2, 8, 24, dim=2)
        ),
        row("contiguous", lambda x: x.transpose(1, 2).contiguous().view(2, 6, 32), HEADS),
        row("strides", _by_strides, HEADS),
        row("data, detach", lambda x: (x.data, x.detach()), HEADS),
    ]


def _complex(x: Any) -> Any:
    pairs = torch.view_as_complex(x.reshape(2, 8, 4, 3, 2))
    turned = pairs * torch.polar(torch.ones(8, 1, 3, dtype=x.dtype), torch.arange(24, dtype=x.dtype).view(8, 1, 3))
    return torch.view_as_real(turned).flatten(3)


def _by_strides(x: Any) -> Any:
    turned = x.transpose(1, 2)
    if turned.is_contiguous() or not x.is_contiguous():
        raise AssertionError("the order in memory is another one")
    if turned.stride() != (192, 4, 24, 1) or turned.stride(1) != 4 or x.stride(dim=-1) != 1:
        raise AssertionError(turned.stride())
    return turned


def index_rows() -> list[Row]:
    truth = torch.tensor([True, False])
    return [
        row("chunk", lambda x: x.chunk(3, dim=-1), FUSED),
        row("torch.chunk", lambda x: torch.chunk(x, chunks=2, dim=0), FUSED),
        row("chunk another dim", lambda x: x.chunk(3, 1), split(2, 8, 8, dim=2)),
        row("chunk of two sections", lambda x: x.chunk(2, dim=2), split(2, 8, 16, dim=2, sections=2)),
        row("chunk what has one section", lambda x: x.chunk(3, dim=2), FEATURES, result=GATHERED),
        row("split", lambda x: x.split(WIDTH, dim=2), FUSED),
        row("split by lengths", lambda x: torch.split(x, [2 * WIDTH, WIDTH], dim=-1), FUSED),
        row("split by name", lambda x: x.split(split_size=WIDTH, dim=2), FUSED),
        row("torch.split by names", lambda x: torch.split(x, split_size_or_sections=3, dim=1), FUSED),
        row(
            "split_with_sizes",
            lambda x: (x.split_with_sizes([WIDTH, 2 * WIDTH], -1), torch.split_with_sizes(x, [3, 5], 1)),
            FUSED,
        ),
        row("tensor_split", lambda x: (x.tensor_split(3, dim=2), torch.tensor_split(x, (2, 5), dim=1)), FUSED),
        row("tensor_split by a tensor", lambda x: x.tensor_split(torch.tensor([2]), dim=1), FUSED, result=GATHERED),
        row("unsafe_chunk", lambda x: (x.unsafe_chunk(3, 2), torch.unsafe_chunk(x, 2, 1)), FUSED),
        row("unsafe_split", lambda x: (x.unsafe_split(WIDTH, 2), torch.unsafe_split(x, 4, 1)), FUSED),
        row("unbind", lambda x: (x.unbind(0), torch.unbind(x, dim=2), x.unbind()), HEADS),
        row("unbind the split dim", lambda x: x.unbind(1), HEADS, result=GATHERED),
        row("iteration", lambda x: [*x], HEADS),
        row("taking apart", lambda x: sum(part * n for n, part in enumerate(x)), HEADS),
        row("select", lambda x: (x.select(0, 1), torch.select(x, -1, -2), x.select(dim=2, index=0)), HEADS),
        row("select the split dim", lambda x: x.select(1, 0), HEADS, result=GATHERED),
        row(
            "narrow",
            lambda x: (x.narrow(1, 2, 3), torch.narrow(x, -1, WIDTH, 2 * WIDTH), x.narrow(dim=0, start=-1, length=1)),
            FUSED,
        ),
        row("narrow from the end", lambda x: x.narrow(2, -WIDTH, WIDTH), FUSED),
        row("narrow the whole", lambda x: x.narrow(2, 0, WIDTH), FEATURES),
        row("narrow a part", lambda x: x.narrow(2, 0, 8), FEATURES, result=GATHERED),
        row("x[i]", lambda x: (x[0], x[-1], x[np.int64(1)], x[:, 2:4], x[1:, ...]), FEATURES),
        row("x[..., a:b]", lambda x: (x[..., :WIDTH], x[..., WIDTH : 2 * WIDTH], x[..., -WIDTH:], x[:, :, :]), FUSED),
        row("x[::2]", lambda x: (x[:, ::2], x[:, 1::3], x[:, 5:2], x[:, -3:-1]), FEATURES),
        row("x[None]", lambda x: (x[None], x[..., None], x[:, None], x[:, None, :, 0], x[None, ..., None]), HEADS),
        row("x[..., 0]", lambda x: (x[..., 0], x[0, :, 1, -1], x[0, ..., 2], x[...], x[()]), HEADS),
        row("x[:, tensor bounds]", lambda x: x[:, : torch.tensor(3)], FEATURES),
        row("rotate halves", _rotate_half, HEADS),
        row("even and odd", lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2), HEADS),
        row("x[i] of the split dim", lambda x: x[:, 0], HEADS, result=GATHERED),
        row("x[::2] of the split dim", lambda x: x[:, ::2], HEADS, result=GATHERED),
        row("x[tensor]", lambda x, i: x[:, :, i], HEADS, plain(3, dtype=torch.int64, below=6), result=GATHERED),
        row("x[0-dim tensor]", lambda x: x[:, :, torch.tensor(2)], HEADS, result=GATHERED),
        row("x[list]", lambda x: x[:, :, [0, 2]], HEADS, result=GATHERED),
        row("x[array]", lambda x: x[:, :, np.array([1])], HEADS, result=GATHERED),
        row("x[truth]", lambda x: (x[truth], x[True]), HEADS, result=GATHERED),
        row("x[x > 0]", lambda x: x[x > 0], FEATURES, result=GATHERED),
        row("plain[split]", lambda x, y: y[x > 0], FEATURES, plain(2, 8, WIDTH), result=GATHERED),
        row(
            "cat",
            lambda x, y: (torch.cat([x, y], dim=1), torch.concat((y, x), 0), torch.cat((x, x), -2)),
            FEATURES,
            plain(2, 8, WIDTH),
        ),
        row("cat by names", lambda x, y: torch.cat(tensors=[x, y], dim=1), FEATURES, plain(2, 3, WIDTH)),
        row("cat along an axis", lambda x, y: torch.concatenate([x, y], axis=1), FEATURES, plain(2, 3, WIDTH)),
        row("cat with an empty one", lambda x: torch.cat([torch.tensor([], dtype=x.dtype), x], dim=-2), HEADS),
        row("cat at the split dim", lambda x, y: torch.cat([x, y, x], dim=2), FEATURES, FEATURES),
        row("cat sections", lambda x, y: torch.cat([x, y], dim=2).chunk(4, -1), FEATURES, FUSED),
        row(
            "cat a whole one at the split dim",
            lambda x, y: torch.cat([x, y], 2),
            FEATURES,
            plain(2, 8, WIDTH),
            result=GATHERED,
        ),
        row(
            "cat of other lengths", lambda x, y: torch.cat([x, y], 2), FEATURES, split(2, 8, 8, dim=2), result=GATHERED
        ),
        row("cat of what is split differently", lambda x, y: torch.cat([x, y], 0), FEATURES, SEQUENCE, result=GATHERED),
        row(
            "stack",
            lambda x, y: (torch.stack([x, y]), torch.stack((y, x), dim=-1), torch.stack([x, x], 2)),
            FEATURES,
            plain(2, 8, WIDTH),
        ),
        row("rows of a split vector", lambda x: x.view(4, 6), split(24, dim=0)),
    ]


def _rotate_half(x: Any) -> Any:
    angles = torch.arange(24, dtype=x.dtype).view(6, 4)
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


def reduction_rows() -> list[Row]:
    plainly = [
        row(place, lambda x, f=found: (f(x, -1), f(x, dim=0), f(x, 2, True), f(x, dim=-2, keepdim=True)), HEADS)
        for name in ("sum", "mean", "amax", "amin", "logsumexp", "any", "all", "argmax", "argmin", "prod")
        for place, found in forms(name)
    ]
    gathering = [
        row(f"{name}, split dim", lambda x, n=name: getattr(torch, n)(x, 1), HEADS, result=GATHERED)
        for name in (
            "amax",
            "amin",
            "logsumexp",
            "any",
            "all",
            "argmax",
            "argmin",
            "prod",
            "var",
            "std",
            "softmax",
            "cumsum",
        )
    ]
    return [
        *plainly,
        *gathering,
        row("sum of all", lambda x: (x.sum(), torch.sum(x), x.sum(None), x.sum(())), HEADS, result=WHOLE),
        row(
            "sum over the split dim",
            lambda x: (x.sum(1), x.sum((1, -1)), x.sum(dim=[0, 1], keepdim=True)),
            HEADS,
            result=WHOLE,
        ),
        row("sum with numpy's names", lambda x: x.sum(axis=1, keepdims=True), HEADS, result=WHOLE),
        row("sum over other dims with numpy's names", lambda x: x.sum(axis=0, keepdims=True), HEADS),
        row("sum, dtype", lambda x: x.sum(1, dtype=torch.float32).double() * 0, HEADS, result=WHOLE),
        row(
            "sum of float32 in float64",
            lambda x: x.sum((1, 2), True, dtype=torch.float64),
            split(2, 8, 6, dim=1, dtype=torch.float32),
            result=WHOLE,
        ),
        row(
            "sum of integers",
            lambda x: (x.sum(), x.sum(1), (x > 3).sum(1)),
            split(2, 8, dim=1, dtype=torch.int64, below=9),
            result=WHOLE,
        ),
        row(
            "mean over the split dim",
            lambda x: (x.mean(1), x.mean(), torch.mean(x, (1, 2), keepdim=True)),
            HEADS,
            result=WHOLE,
        ),
        row("mean over sections", lambda x: x.mean(-1, keepdim=True), FUSED, result=WHOLE),
        row(
            "mean of integers",
            lambda x: x.mean(1, dtype=torch.float64),
            split(2, 8, dim=1, dtype=torch.int64, below=9),
            result=WHOLE,
        ),
        row(
            "mean and variance by hand",
            lambda x: (x - x.mean(-1, keepdim=True)).pow(2).mean(-1),
            FEATURES,
            result=WHOLE,
        ),
        row(
            "var",
            lambda x: (
                x.var(-1),
                x.var(dim=0, unbiased=False),
                torch.var(x, 2, correction=0),
                x.var((2, 3), keepdim=True),
            ),
            HEADS,
        ),
        row("std", lambda x: (x.std(-1), torch.std(x, dim=2, keepdim=True), x.std(-1, False)), HEADS),
        row("var without dim", lambda x: x.var(unbiased=False), HEADS, result=GATHERED),
        row("var, unbiased in place", lambda x: x.var(False), HEADS, result=GATHERED),
        row(
            "norm",
            lambda x: (x.norm(dim=-1), x.norm(2, -1, True), torch.norm(x, p=1, dim=2), x.norm(3, dim=(2, 3))),
            HEADS,
        ),
        row("linalg.norm", lambda x: torch.linalg.norm(x, dim=-1), HEADS),
        row("norm of all", lambda x: (x.norm(), x.norm(1)), HEADS, result=GATHERED),
        row("norm over the split dim", lambda x: x.norm(2, 1), HEADS, result=GATHERED),
        row(
            "normalize",
            lambda x: (F.normalize(x, dim=-1), F.normalize(x, 1, 2), F.normalize(x, p=2, dim=0, eps=1e-3)),
            HEADS,
        ),
        row("normalize the split dim", lambda x: F.normalize(x), HEADS, result=GATHERED),
        row(
            "max", lambda x: (*x.max(-1), *torch.max(x, dim=0), *x.max(2, keepdim=True), *torch.max(x, 3, True)), HEADS
        ),
        row("min", lambda x: (*x.min(-1), *torch.min(x, dim=0), x.min(2).indices, x.min(dim=3).values), HEADS),
        row("max of all", lambda x: x.max(), HEADS, result=GATHERED),
        row("max over the split dim", lambda x: (*x.max(1),), HEADS, result=GATHERED),
        row("max of two", lambda x, y: torch.max(x, y), HEADS, plain(4), result=GATHERED),
        row("topk", lambda x: (*x.topk(2), *torch.topk(x, 3, dim=2), *x.topk(1, -1, False)), HEADS),
        row(
            "sort",
            lambda x: (*x.sort(), *torch.sort(x, dim=2, descending=True), x.argsort(-1), torch.argsort(x, 0)),
            HEADS,
        ),
        row("sort, stable", lambda x: (*torch.sort(x, stable=True, dim=-1),), HEADS),
        row("sort the split dim", lambda x: (*x.sort(1),), HEADS, result=GATHERED),
        row(
            "softmax",
            lambda x: (x.softmax(-1), F.softmax(x, dim=2), torch.softmax(x, 0), F.softmax(x, -1, dtype=torch.float32)),
            HEADS,
        ),
        row(
            "softmax by names",
            lambda x: (F.softmax(input=x, dim=-1), torch.softmax(input=x, dim=2), torch.special.softmax(x, 3)),
            HEADS,
        ),
        row(
            "log_softmax",
            lambda x: (
                x.log_softmax(-1),
                F.log_softmax(x, 2),
                torch.log_softmax(x, 0),
                torch.special.log_softmax(x, 3),
            ),
            HEADS,
        ),
        row("cumsum", lambda x: (x.cumsum(2), torch.cumsum(x, dim=-1), x.cumprod(2), torch.cumprod(x, 0)), HEADS),
        row("cumsum, an axis", lambda x: torch.cumsum(x, axis=2), HEADS),
        row("logcumsumexp", lambda x: (x.logcumsumexp(2), torch.logcumsumexp(x, -1)), HEADS),
        row("layer_norm", lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b, 1e-3), SEQUENCE, plain(WIDTH), plain(WIDTH)),
        row("layer_norm without weights", lambda x: (F.layer_norm(x, [4]), F.layer_norm(x, (6, 4))), HEADS),
        row(
            "layer_norm by names",
            lambda x, w: F.layer_norm(x, normalized_shape=(4,), weight=w, bias=None, eps=1e-6),
            HEADS,
            plain(4),
        ),
        row(
            "torch.layer_norm", lambda x, w, b: torch.layer_norm(x, (4,), w, b, 1e-5, False), HEADS, plain(4), plain(4)
        ),
        row(
            "layer_norm of the split dim",
            lambda x, w: F.layer_norm(x, (WIDTH,), w),
            FEATURES,
            plain(WIDTH),
            result=GATHERED,
        ),
        row(
            "layer_norm with split weights",
            lambda x, w: F.layer_norm(x, (WIDTH,), w),
            plain(2, 8, WIDTH),
            split(WIDTH, dim=0),
            result=GATHERED,
        ),
        row(
            "rms_norm", lambda x, w: (F.rms_norm(x, (WIDTH,), w, 1e-6), F.rms_norm(x, [WIDTH])), SEQUENCE, plain(WIDTH)
        ),
        row("torch.rms_norm", lambda x, w: torch.rms_norm(x, (4,), weight=w, eps=1e-5), HEADS, plain(4)),
        row(
            "rms_norm by hand",
            lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
            SEQUENCE,
            plain(WIDTH),
        ),
        row("glu", lambda x: (F.glu(x), F.glu(x, dim=2), F.glu(input=x, dim=1)), split(2, 8, WIDTH, dim=2, sections=2)),
        row(
            "glu, pad of torch._C._nn",
            lambda x: (torch._C._nn.glu(x, 1), torch._C._nn.pad(x, (1, 2))),
            split(8, 4, 6, dim=0),
        ),
        row("glu of one section", lambda x: F.glu(x, -1), split(2, 8, 8, dim=2), result=GATHERED),
    ]


def product_rows() -> list[Row]:
    columns, rows = split(16, WIDTH, dim=0), split(16, WIDTH, dim=1)
    narrow, inputs = split(2, 8, WIDTH, dim=2), plain(2, 8, WIDTH)
    return [
        row("linear by columns", lambda x, w, b: F.linear(x, w, b), inputs, columns, split(16, dim=0)),
        row("linear by columns, whole bias", lambda x, w, b: F.linear(x, w, bias=b), inputs, columns, plain(16)),
        row("linear by columns, no bias", lambda x, w: F.linear(input=x, weight=w), inputs, columns),
        row(
            "linear by columns in sections",
            lambda x, w, b: F.linear(x, w, b).chunk(3, -1),
            inputs,
            split(24, WIDTH, dim=0, sections=3),
            split(24, dim=0, sections=3),
        ),
        row(
            "linear by columns, bias split otherwise",
            lambda x, w, b: F.linear(x, w, b),
            inputs,
            columns,
            split(16, dim=0, sections=2),
            result=GATHERED,
        ),
        row(
            "three that read the same",
            lambda x, w, v: (F.linear(x, w) * F.linear(x, v), F.linear(x, w)),
            inputs,
            columns,
            columns,
        ),
        row("linear by columns of a split input", lambda x, w, b: F.linear(x, w, b), narrow, columns, plain(16)),
        row("linear by columns of a split sequence", lambda x, w, b: F.linear(x, w, b), SEQUENCE, columns, plain(16)),
        row("a vector into columns", lambda x, w: F.linear(x, w), plain(WIDTH), columns),
        row("linear by rows", lambda x, w, b: F.linear(x, w, b), narrow, rows, plain(16), result=WHOLE),
        row("linear by rows, no bias", lambda x, w: F.linear(x, w), narrow, rows, result=WHOLE),
        row(
            "linear by rows, split bias",
            lambda x, w, b: F.linear(x, w, b),
            narrow,
            rows,
            split(16, dim=0),
            result=WHOLE,
        ),
        row(
            "linear by rows of a whole input", lambda x, w, b: F.linear(x, w, b), inputs, rows, plain(16), result=WHOLE
        ),
        row("linear by rows of a split sequence", lambda x, w: F.linear(x, w), SEQUENCE, rows, result=WHOLE),
        row(
            "linear by rows in sections",
            lambda x, w: F.linear(x, w),
            split(2, 8, WIDTH, dim=2, sections=3),
            split(16, WIDTH, dim=1, sections=3),
            result=WHOLE,
        ),
        row(
            "linear by rows, sections differ",
            lambda x, w: F.linear(x, w),
            split(2, 8, WIDTH, dim=2, sections=3),
            rows,
            result=GATHERED,
        ),
        row(
            "columns, then rows",
            lambda x, w, v: F.linear(F.gelu(F.linear(x, w)), v),
            inputs,
            split(32, WIDTH, dim=0),
            split(WIDTH, 32, dim=1),
            result=WHOLE,
        ),
        row("whole layer of a split input", lambda x, w: F.linear(x, w), narrow, plain(16, WIDTH), result=GATHERED),
        row(
            "whole layer of a split sequence",
            lambda x, w, b: F.linear(x, w, b),
            SEQUENCE,
            plain(16, WIDTH),
            plain(16),
            result=WHOLE,
        ),
        row("linear, vector for a weight", lambda x, w: F.linear(x, w), inputs, split(WIDTH, dim=0), result=GATHERED),
        row(
            "addmm by columns",
            lambda b, x, w: torch.addmm(b, x, w),
            plain(16),
            plain(6, WIDTH),
            split(WIDTH, 16, dim=1),
        ),
        row(
            "addmm by columns in sections",
            lambda b, x, w: torch.addmm(b, x, w).split(8, 1),
            split(24, dim=0, sections=3),
            plain(6, WIDTH),
            split(WIDTH, 24, dim=1, sections=3),
        ),
        row(
            "addmm by rows",
            lambda b, x, w: torch.addmm(b, x, w),
            plain(16),
            split(6, WIDTH, dim=1),
            split(WIDTH, 16, dim=0),
            result=WHOLE,
        ),
        row(
            "addmm by rows of rows",
            lambda b, x, w: torch.addmm(b, x, w),
            plain(16),
            split(8, WIDTH, dim=0),
            split(WIDTH, 16, dim=0),
            result=WHOLE,
        ),
        row("addmm as a method", lambda b, x, w: b.addmm(x, w), plain(16), plain(6, WIDTH), split(WIDTH, 16, dim=1)),
        row(
            "addmm with factors",
            lambda b, x, w: torch.addmm(b, x, w, beta=0.5),
            plain(16),
            plain(6, WIDTH),
            split(WIDTH, 16, dim=1),
            result=GATHERED,
        ),
        row(
            "addmm of a matrix",
            lambda b, x, w: torch.addmm(b, x, w),
            plain(16, 16),
            plain(16, WIDTH),
            split(WIDTH, 16, dim=1),
            result=GATHERED,
        ),
        row(
            "matmul", lambda x, y: (x @ y.transpose(-1, -2), torch.matmul(x, y.mT), x.matmul(other=y.mT)), HEADS, HEADS
        ),
        row("matmul with a whole one", lambda x, y: (x @ y, y.mT @ x.mT), HEADS, plain(2, 8, 4, 3)),
        row(
            "matmul with one for all heads",
            lambda x, y: (x @ y, torch.matmul(input=y.mT, other=x.mT)),
            HEADS,
            plain(2, 1, 4, 3),
        ),
        row("matmul with a matrix", lambda x, y: x @ y, HEADS, plain(4, 5)),
        row(
            "matmul in sections",
            lambda x, y: x @ y.mT,
            split(2, 12, 6, 4, dim=1, sections=3),
            split(2, 12, 6, 4, dim=1, sections=3),
        ),
        row("linalg.matmul", lambda x, y: torch.linalg.matmul(x, y), HEADS, plain(4, 5)),
        row("matmul by names", lambda x, y: torch.matmul(x, other=y), HEADS, plain(4, 5)),
        row("plain.__rmatmul__", lambda x, y: y.__rmatmul__(x), HEADS, plain(4, 5)),
        row("matmul of more dims", lambda x, y: x @ y, split(8, 6, 4, dim=0), plain(3, 8, 4, 2)),
        row("bmm", lambda x, y: (torch.bmm(x, y.mT), x.bmm(y.mT)), split(8, 6, 4, dim=0), plain(8, 5, 4)),
        row(
            "mm of a split matrix",
            lambda x, y: (torch.mm(x, y), x.mm(y)),
            split(8, 4, dim=0),
            plain(4, 3),
            result=GATHERED,
        ),
        row("matmul of split matrices", lambda x, y: x @ y, FEATURES, plain(WIDTH, 4), result=GATHERED),
        row("matmul of a vector", lambda x, y: x @ y, HEADS, plain(4), result=GATHERED),
        row(
            "baddbmm",
            lambda a, x, y: (
                torch.baddbmm(a, x, y),
                torch.baddbmm(a, x, y, beta=0.5, alpha=0.3),
                a.baddbmm(x, y, beta=0),
            ),
            plain(8, 6, 5),
            split(8, 6, 4, dim=0),
            plain(8, 4, 5),
        ),
        row(
            "einsum",
            lambda x, y: (torch.einsum("bhqd,bhkd->bhqk", x, y), torch.einsum("bhqd,bhkd->bqkh", [x, y])),
            HEADS,
            HEADS,
        ),
        row(
            "einsum with whole ones",
            lambda x, y: (torch.einsum("bhqd, hde -> bqhe", x, y), torch.einsum("hde,bhqd->bhqe", y, x)),
            HEADS,
            plain(8, 4, 3),
        ),
        row("einsum without the split dim", lambda x, y: torch.einsum("bhqd,de->bhqe", x, y), HEADS, plain(4, 3)),
        row("einsum, one for all heads", lambda x, y: torch.einsum("bhqd,bhde->bhqe", x, y), HEADS, plain(2, 1, 4, 3)),
        row("einsum of one", lambda x: torch.einsum("bhqd->hbq", x), HEADS),
        row(
            "einsum over the split dim",
            lambda x, y: torch.einsum("bhqd,bhqd->bqd", x, y),
            HEADS,
            HEADS,
            result=GATHERED,
        ),
        row("einsum of a diagonal", lambda x: torch.einsum("bhh->bh", x), split(2, 8, 8, dim=1), result=GATHERED),
        row("einsum without an arrow", lambda x, y: torch.einsum("bhqd,bhkd", x, y), HEADS, HEADS, result=GATHERED),
        row("einsum with dots", lambda x, y: torch.einsum("...qd,...kd->...qk", x, y), HEADS, HEADS, result=GATHERED),
        row(
            "einsum by lists",
            lambda x, y: torch.einsum(x, [0, 1, 2, 3], y, [3, 4], [0, 1, 2, 4]),
            HEADS,
            plain(4, 3),
            result=SPLIT,
        ),
    ]


def attention_rows() -> list[Row]:
    sdpa = F.scaled_dot_product_attention
    few, many = split(2, 4, 6, 4, dim=1), split(2, 8, 6, 4, dim=1)
    return [
        row(
            "attention",
            lambda q, k, v: (sdpa(q, k, v), sdpa(q, k, v, is_causal=True), sdpa(q, k, value=v, scale=0.3)),
            many,
            many,
            many,
        ),
        row("attention by samples", lambda q, k, v: sdpa(q, k, v), BATCH, BATCH, BATCH),
        row(
            "attention, flat batch",
            lambda q, k, v: sdpa(q, k, v),
            split(8, 6, 4, dim=0),
            plain(8, 5, 4),
            split(8, 5, 4, dim=0),
        ),
        row(
            "attention, whole keys",
            lambda q, k, v: sdpa(query=q, key=k, value=v),
            many,
            plain(2, 8, 5, 4),
            plain(2, 8, 5, 4),
        ),
        row("attention, whole queries", lambda q, k, v: sdpa(q, k, v), plain(2, 8, 5, 4), many, many),
        row("attention, mask", lambda q, k, m: sdpa(q, k, k, m), many, many, plain(6, 6)),
        row("attention, mask by samples", lambda q, k, m: sdpa(q, k, k, attn_mask=m), many, many, plain(2, 1, 6, 6)),
        row("attention, mask by heads", lambda q, k, m: sdpa(q, k, k, m), many, many, plain(8, 6, 6)),
        row("attention, split mask", lambda q, k, m: sdpa(q, k, k, m), many, many, split(1, 8, 6, 6, dim=1)),
        row(
            "attention, mask of truth",
            lambda q, k: sdpa(q, k, k, torch.ones(6, 6, dtype=torch.bool).tril()),
            many,
            many,
        ),
        row("attention by samples, mask", lambda q, m: sdpa(q, q, q, m), BATCH, plain(8, 1, 6, 6)),
        row(
            "grouped heads",
            lambda q, k, v: (sdpa(q, k, v, enable_gqa=True), sdpa(q, k, v, is_causal=True, enable_gqa=True)),
            many,
            few,
            few,
        ),
        row("grouped heads, one of keys", lambda q, k: sdpa(q, k, k, enable_gqa=True), many, plain(2, 1, 6, 4)),
        row("grouped heads, keys whole", lambda q, k: sdpa(q, k, k, enable_gqa=True), many, plain(2, 4, 6, 4)),
        row(
            "grouped heads, too few to share",
            lambda q, k: sdpa(q, k, k, enable_gqa=True),
            split(2, 12, 6, 4, dim=1),
            plain(2, 3, 6, 4),
            result=GATHERED,
        ),
        row("repeated heads", lambda q, k: sdpa(q, _repeat_kv(k), k.repeat_interleave(2, dim=1)), many, few),
        row("positions split", lambda q: sdpa(q, q, q), split(2, 3, 8, 4, dim=2), result=GATHERED),
        row("attention of sections", lambda q: sdpa(q, q, q), split(2, 12, 6, 4, dim=1, sections=3), result=GATHERED),
        row("attention by hand", _attention_by_hand, many, many, many),
        row("attention of a fused projection", _fused_attention, FUSED),
        row("attention, dropout", lambda q, k, v: sdpa(q, k, v, dropout_p=0.3), many, many, many),
        row("attention, all dropped", lambda q, k, v: sdpa(q, k, v, dropout_p=1.0), many, many, many),
        row("attention, dropout, causal", lambda q, k, v: sdpa(q, k, v, None, 0.3, True, scale=0.7), many, many, many),
        row("attention, dropout, mask", lambda q, k, m: sdpa(q, k, k, m, 0.3), many, many, plain(2, 1, 6, 6)),
        row(
            "attention, dropout, who sees nothing",
            lambda q, k, m: sdpa(q, k, k, m, 0.3),
            many,
            many,
            plain(2, 8, 6, 1, dtype=torch.bool),
        ),
        row("attention, dropout, grouped", lambda q, k: sdpa(q, k, k, dropout_p=0.2, enable_gqa=True), many, few),
        row("attention, dropout, by samples", lambda q: sdpa(q, q, q, dropout_p=0.2), BATCH),
        row(
            "attention, who sees nothing",
            lambda q, k, m: sdpa(q, k, k, m),
            many,
            many,
            plain(2, 8, 6, 1, dtype=torch.bool),
        ),
    ]


def _repeat_kv(x: Any) -> Any:
    batch, heads, length, size = x.shape
    return x[:, :, None, :, :].expand(batch, heads, 2, length, size).reshape(batch, heads * 2, length, size)


def _attention_by_hand(query: Any, key: Any, value: Any) -> Any:
    scores = torch.matmul(query, key.transpose(2, 3)) * (1 / math.sqrt(query.size(-1)))
    mask = torch.full((6, 6), torch.finfo(scores.dtype).min, dtype=scores.dtype).triu(1)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float64).to(query.dtype)
    weights = F.dropout(weights, p=0.1, training=True)
    return torch.matmul(weights, value).transpose(1, 2).contiguous().reshape(2, 6, -1)


def _fused_attention(fused: Any) -> Any:
    batch, length, width = fused.shape
    parts = fused.view(batch, length, 3, 4, width // 12).permute(2, 0, 3, 1, 4)
    query, key, value = parts[0], parts[1], parts[2]
    return (
        F.scaled_dot_product_attention(query, key, value, is_causal=True)
        .transpose(1, 2)
        .reshape(batch, length, width // 3)
    )


def token_rows() -> list[Row]:
    table, logits = split(16, 6, dim=0), split(4, 16, dim=1)
    targets, loss = plain(4, dtype=torch.int64, below=16), F.cross_entropy
    images, marks = split(2, 16, 5, 3, dim=1), plain(2, 5, 3, dtype=torch.int64, below=16)
    smooth = {"label_smoothing": 0.1}
    return [
        row("embedding", lambda t, w: F.embedding(t, w), TOKENS, table, result=WHOLE),
        row("embedding by names", lambda t, w: F.embedding(input=t, weight=w), TOKENS, table, result=WHOLE),
        *(
            row(f"embedding, padding {p}", lambda t, w, p=p: F.embedding(t, w, p), TOKENS, table, result=WHOLE)
            for p in (0, 9, -1)
        ),
        row("embedding of int32", lambda t, w: F.embedding(t.int(), w, padding_idx=3), TOKENS, table, result=WHOLE),
        row("embedding, columns split", lambda t, w: F.embedding(t, w), TOKENS, split(16, 8, dim=1), result=GATHERED),
        row(
            "embedding in sections",
            lambda t, w: F.embedding(t, w),
            TOKENS,
            split(16, 8, dim=0, sections=2),
            result=GATHERED,
        ),
        row(
            "embedding scaled", lambda t, w: F.embedding(t, w, scale_grad_by_freq=True), TOKENS, table, result=GATHERED
        ),
        row("torch.embedding", lambda t, w: torch.embedding(w, t), TOKENS, table, result=GATHERED),
        row(
            "embedding of split tokens",
            lambda t, w: F.embedding(t, w),
            split(2, 8, dim=1, dtype=torch.int64, below=16),
            plain(16, 6),
            result=GATHERED,
        ),
        row("cross_entropy", lambda x, t: loss(x, t), logits, targets, result=WHOLE),
        *(
            row(f"cross_entropy, {r}", lambda x, t, r=r: loss(x, t, reduction=r), logits, targets, result=WHOLE)
            for r in ("sum", "none", "mean")
        ),
        *(
            row(
                f"cross_entropy, {r}, smoothed",
                lambda x, t, r=r: loss(x, t, reduction=r, ignore_index=3, **smooth),
                images,
                marks,
                result=WHOLE,
            )
            for r in ("sum", "none", "mean")
        ),
        row(
            "cross_entropy by names",
            lambda x, t: loss(input=x, target=t, ignore_index=5),
            logits,
            targets,
            result=WHOLE,
        ),
        row(
            "cross_entropy by places",
            lambda x, t: loss(x, t, None, None, 5, None, "sum", 0.2),
            logits,
            targets,
            result=WHOLE,
        ),
        row("cross_entropy, ignored", lambda x, t: loss(x, t.masked_fill(t > 7, -100)), logits, targets, result=WHOLE),
        row("cross_entropy, all ignored", lambda x, t: loss(x, t * 0 - 100), logits, targets, result=WHOLE),
        row("cross_entropy of one sample", lambda x, t: loss(x, t[0]), split(16, dim=0), targets, result=WHOLE),
        row("cross_entropy of images", lambda x, t: loss(x, t), images, marks, result=WHOLE),
        row("cross_entropy of large logits", lambda x, t: loss(x * 1e3, t), logits, targets, result=WHOLE),
        row(
            "cross_entropy of flat tokens",
            lambda x, t: loss(x.view(-1, 16), t.view(-1)),
            split(2, 6, 16, dim=2),
            TOKENS,
            result=WHOLE,
        ),
        row(
            "cross_entropy of turned logits",
            lambda x, t: loss(x.transpose(1, 2), t),
            split(2, 6, 16, dim=2),
            TOKENS,
            result=WHOLE,
        ),
        row(
            "cross_entropy of shifted tokens",
            lambda x, t: loss(x[:, :-1].reshape(-1, 16), t[:, 1:].reshape(-1)),
            split(2, 6, 16, dim=2),
            TOKENS,
            result=WHOLE,
        ),
        row(
            "cross_entropy, weights",
            lambda x, t, w: loss(x, t, w.detach()),
            logits,
            targets,
            plain(16, kind="positive"),
            result=GATHERED,
        ),
        row(
            "cross_entropy of probabilities", lambda x, t: loss(x, t.softmax(1)), logits, plain(4, 16), result=GATHERED
        ),
        row("cross_entropy of samples", lambda x, t: loss(x, t), split(4, 16, dim=0), targets, result=GATHERED),
        row(
            "cross_entropy in sections",
            lambda x, t: loss(x, t),
            split(4, 16, dim=1, sections=2),
            targets,
            result=GATHERED,
        ),
        row(
            "cross_entropy, of old",
            lambda x, t: loss(x, t, size_average=None, reduce=None),
            logits,
            targets,
            result=WHOLE,
        ),
    ]


def lost_rows() -> list[Row]:
    return [
        row("writing into a whole tensor", lambda x, y: (y * 1).add_(x), FEATURES, plain(2, 8, WIDTH), result=GATHERED),
        row("x into whole[...]", _written, FEATURES, plain(2, 8, WIDTH), result=GATHERED),
        row(
            "out=",
            lambda x, y: torch.add(x.detach(), y.detach(), out=torch.empty(2, 8, WIDTH, dtype=x.dtype)),
            FEATURES,
            plain(WIDTH),
            result=GATHERED,
        ),
        row("a function without a rule", lambda x: torch.trapezoid(x, dim=1), FEATURES, result=GATHERED),
        row(
            "gather",
            lambda x, i: x.gather(1, i),
            FEATURES,
            plain(2, 3, WIDTH, dtype=torch.int64, below=8),
            result=GATHERED,
        ),
    ]


def _written(x: Any, y: Any) -> Any:
    out = y * 1
    out[:, 2:4] = x[:, :2]
    return out


def shape_rows() -> list[Row]:
    return [
        *view_rows(),
        *index_rows(),
        *reduction_rows(),
        *product_rows(),
        *attention_rows(),
        *token_rows(),
        *lost_rows(),
    ]
