"""The decoder-only language model that Qwen2, Qwen2.5, Qwen3 and Llama share; the configuration tells them apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from s1engine.models.batch import PackedBatch, SlotBatch
from s1engine.models.config import ModelConfig
from s1engine.models.layers import DecoderLayer, Linear, RMSNorm
from s1engine.models.step import StepPlanner


class CausalLM(nn.Module):
    """One definition for every caller: rows of any mixture of prompts and decoding sequences go in packed.

    row_invariant  the bits of a row's output do not depend on the other rows, nor on how its prompt was cut into chunks
    """

    def __init__(self, config: ModelConfig, *, row_invariant: bool = False) -> None:
        super().__init__()
        self.config = config
        self.planner = StepPlanner(config, row_invariant)
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, row_invariant) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, row_invariant=row_invariant)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens

    def allocate(self, device: torch.device) -> None:
        """Give a model that was built on the meta device storage, its parameters without values, and its angles."""
        config = self.config
        self.to(config.dtype).to_empty(device=device).requires_grad_(False).eval()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens
        self.planner.allocate(device)

    def forward(self, token_ids: Tensor, batch: PackedBatch | SlotBatch, kv_cache: Tensor) -> Tensor:
        """Compute one step and write its keys and values.

        token_ids  int64 [T]
        batch      where the rows belong
        kv_cache   [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim] in the model's dtype; finite
                   everywhere, unused entries included
        Returns the hidden states after the final norm, [T, hidden_size], in the model's dtype.
        """
        step = self.planner(batch, kv_cache)
        residual = functional.embedding(token_ids, self.embed_tokens).float()
        x: Tensor | None = None
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache.unbind(0), strict=True):
            x = layer(residual, x, step, k_cache, v_cache)
        return self.norm(residual, x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size], in the model's dtype; returns float32 [R, vocab_size]."""
        return self.lm_head(hidden).float()
