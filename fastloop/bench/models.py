# SPDX-License-Identifier: Apache-2.0
"""Parameter shapes of real models, by formula: nothing is downloaded and no model library is needed."""

from __future__ import annotations

from itertools import pairwise

Shape = tuple[int, ...]


def _linear(out_features: int, in_features: int) -> list[Shape]:
    return [(out_features, in_features), (out_features,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """GPT-2 with tied embeddings; the defaults are the model of 124,439,808 parameters in 148 tensors.

    Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    block = [
        *_norm(width),
        *[(width, 3 * width), (3 * width,)],  # c_attn: GPT-2 stores weights as (in, out)
        *[(width, width), (width,)],
        *_norm(width),
        *[(width, 4 * width), (4 * width,)],
        *[(4 * width, width), (width,)],
    ]
    return [(vocabulary, width), (context, width), *(block * layers), *_norm(width)]


def bert(layers: int = 12, width: int = 768, vocabulary: int = 30522, context: int = 512) -> list[Shape]:
    """BERT with its pooler; the defaults are BERT-base: 109,482,240 parameters in 199 tensors.

    Reference: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2018.
    """
    embeddings = [(vocabulary, width), (context, width), (2, width), *_norm(width)]
    block = [
        *(_linear(width, width) * 4),  # query, key, value, output
        *_norm(width),
        *_linear(4 * width, width),
        *_linear(width, 4 * width),
        *_norm(width),
    ]
    return [*embeddings, *(block * layers), *_linear(width, width)]


def resnet50(classes: int = 1000) -> list[Shape]:
    """ResNet-50: 25,557,032 parameters in 161 tensors (running statistics are buffers, not parameters).

    Reference: He et al., "Deep Residual Learning for Image Recognition", 2015.
    """
    expansion = 4
    shapes: list[Shape] = [(64, 3, 7, 7), *_norm(64)]
    channels = 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), *_norm(width)]
            shapes += [(width, width, 3, 3), *_norm(width)]
            shapes += [(expansion * width, width, 1, 1), *_norm(expansion * width)]
            if block == 0:  # the projection of the shortcut
                shapes += [(expansion * width, channels, 1, 1), *_norm(expansion * width)]
            channels = expansion * width
    return [*shapes, *_linear(classes, channels)]


def mlp(*widths: int) -> list[Shape]:
    """A chain of linear layers: `mlp(64, 64, 64, 10)` has 6 parameter tensors."""
    return [shape for inputs, outputs in pairwise(widths) for shape in _linear(outputs, inputs)]
