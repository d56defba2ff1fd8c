"""Runs a model over a paged cache with scattered blocks, as an engine would, but with nothing else of one."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from s1engine.models import CausalLM, PackedBatch


class PagedRunner:
    """Feeds tokens of several sequences to a model, any number at a time.

    Blocks are taken in random order. Unused cache entries hold large finite values, so that a key which should be
    hidden shows.
    """

    def __init__(self, model: CausalLM, *, block_size: int = 16, num_blocks: int = 128, seed: int = 0) -> None:
        self.model, self.block_size = model, block_size
        config = model.config
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.kv_cache = torch.full(shape, 50.0, dtype=config.dtype)
        self.free = random.Random(seed).sample(range(num_blocks), num_blocks)
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, chunks: dict[str, list[int]]) -> dict[str, Tensor]:
        """One forward pass: the next tokens of each named sequence; returns its hidden states, [tokens, hidden]."""
        names = sorted(chunks, key=lambda name: len(chunks[name]) > 1)
        tokens, positions, slots, starts, contexts = [], [], [], [0], []
        for name in names:
            length, table = self.lengths.setdefault(name, 0), self.blocks.setdefault(name, [])
            for position, token in enumerate(chunks[name], length):
                if position // self.block_size == len(table):
                    table.append(self.free.pop())
                tokens.append(token)
                positions.append(position)
                slots.append(table[position // self.block_size] * self.block_size + position % self.block_size)
            self.lengths[name] += len(chunks[name])
            starts.append(len(tokens))
            contexts.append(self.lengths[name])
        tables = torch.zeros(len(names), max(len(self.blocks[name]) for name in names), dtype=torch.int32)
        for row, name in enumerate(names):
            tables[row, : len(self.blocks[name])] = torch.tensor(self.blocks[name])
        batch = PackedBatch(
            positions=torch.tensor(positions),
            slot_mapping=torch.tensor(slots),
            query_start=torch.tensor(starts, dtype=torch.int32),
            query_start_list=starts,
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            context_lens_list=contexts,
            block_tables=tables,
            num_decodes=sum(len(chunks[name]) == 1 for name in names),
        )
        with torch.inference_mode():
            hidden = self.model(torch.tensor(tokens), batch, self.kv_cache)
        return dict(zip(names, hidden.split([len(chunks[name]) for name in names]), strict=True))

    def logits(self, hidden: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model.compute_logits(hidden)


@pytest.fixture(scope="session")
def paged_runner() -> type[PagedRunner]:
    return PagedRunner
