"""The least time that a run can take on a machine: what must be read and computed, over measured rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from s1engine.bench.speed.shapes import SHAPES


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model, in elements.

    weights  read in a decode step: of the layers and of the LM head
    body     without the LM head
    kv       keys and values of a token, of all layers
    vocab    ids
    """

    weights: int
    body: int
    kv: int
    vocab: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of a machine, measured: bytes and operations per second."""

    bandwidth: float
    operations: float


def model_sizes(model: str) -> Sizes:
    """Of a model folder or hub id."""
    from transformers import AutoConfig

    return _sizes(AutoConfig.from_pretrained(model))


def shape_sizes(name: str) -> Sizes:
    """Of the entry `name` of SHAPES."""
    from transformers import AutoConfig

    return _sizes(AutoConfig.for_model(**SHAPES[name]))


def _sizes(config: Any) -> Sizes:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    head = config.vocab_size * config.hidden_size
    total = sum(p.numel() for p in net.parameters())
    body = total - head - (0 if config.tie_word_embeddings else head)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return Sizes(weights=body + head, body=body, kv=kv, vocab=config.vocab_size)


def step_seconds(sizes: Sizes, rows: int, context: int, item_bytes: int, rates: Rates) -> float:
    """Least time of a decode step of `rows` rows that attend to `context` tokens, all of them together.

    It reads the weights once and each row's keys and values, or it multiplies every row by the weights: what is longer.
    """
    num_bytes = (sizes.weights + context * sizes.kv) * item_bytes
    return max(num_bytes / rates.bandwidth, 2 * sizes.weights * rows / rates.operations)


def run_seconds(sizes: Sizes, lengths: Sequence[tuple[int, int]], item_bytes: int, rates: Rates) -> float:
    """Least time for requests of `lengths`, (prompt tokens, new tokens) each, that all run at once.

    The prompts are computed together and give each request its first token; then a row decodes until it has all of its
    tokens, and is gone.
    """
    prompt_tokens = sum(prompt for prompt, _ in lengths)
    seconds = max(sizes.weights * item_bytes / rates.bandwidth, 2 * sizes.body * prompt_tokens / rates.operations)
    for step in range(1, max(new for _, new in lengths)):
        contexts = [prompt + step for prompt, new in lengths if new > step]
        seconds += step_seconds(sizes, len(contexts), sum(contexts), item_bytes, rates)
    return seconds
