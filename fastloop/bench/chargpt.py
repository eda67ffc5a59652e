# SPDX-License-Identifier: Apache-2.0
"""A small character-level GPT in plain torch, and real text that every machine has: Python's standard library."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 98  # tab, newline, the 95 printable ASCII characters, and one symbol for everything else
_OTHER = VOCABULARY - 1


class NoText(Exception):
    """Python is installed without the sources of its standard library."""


@dataclass(frozen=True)
class Size:
    """Small enough that 2 cores take a few milliseconds per step, with as many tensors as a deep model has layers."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    context: int = 32
    batch: int = 4
    vocabulary: int = VOCABULARY
    tied: bool = False  # the head's weights are the embedding's, as GPT-2's are


class Block(nn.Module):
    """Pre-norm attention and MLP, as GPT-2's."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_attention = nn.LayerNorm(size.width)
        self.query_key_value = nn.Linear(size.width, 3 * size.width)
        self.project = nn.Linear(size.width, size.width)
        self.norm_mlp = nn.LayerNorm(size.width)
        self.expand = nn.Linear(size.width, 4 * size.width)
        self.contract = nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.query_key_value(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.contract(functional.gelu(self.expand(self.norm_mlp(x))))


class CharGPT(nn.Module):
    """Characters in, the logits of the next character out: [batch, length] -> [batch, length, vocabulary]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Parameter(torch.zeros(size.context, size.width))
        self.blocks = nn.Sequential(*[Block(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        if size.tied:
            nn.init.normal_(self.embed.weight, std=0.02)  # GPT-2's: logits of N(0, 1) embeddings would start at 28
            self.head.weight = self.embed.weight

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embed(characters) + self.position[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def encode(text: str) -> Tensor:
    """One int64 in [0, VOCABULARY) per character."""
    codes = torch.tensor(list(text.encode("ascii", errors="replace")), dtype=torch.int64)
    printable = (codes >= 32) & (codes < 127)
    result = torch.where(printable, codes - 32, _OTHER)
    result[codes == 9], result[codes == 10] = 95, 96
    return result


def standard_library(limit: int = 2_000_000) -> Tensor:
    """The first `limit` characters of the standard library's top-level modules, in the order of their names.

    Raises NoText where Python is installed without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    length = 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        length += len(parts[-1])
        if length >= limit:
            break
    if length < 10_000:
        raise NoText(f"[bench] wanted the sources of the standard library in {folder}, got {length} characters")
    return encode("".join(parts)[:limit])


def batches(text: Tensor, size: Size, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of random windows and, as targets, the same windows one character later."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - size.context - 1, (count, size.batch, 1), generator=generator)
    windows = text[starts + torch.arange(size.context + 1)]
    return [(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in windows]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in nats per character."""
    characters, targets = batch
    return functional.cross_entropy(model(characters).flatten(0, 1), targets.flatten())
