"""The decoder-only language model that Qwen2, Qwen2.5, Qwen3 and Llama share; the configuration tells them apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from s1engine.kernels.linear import linear
from s1engine.models.batch import PackedBatch
from s1engine.models.config import ModelConfig
from s1engine.models.layers import DecoderLayer, RMSNorm, plan_step
from s1engine.models.rotary import rotary_table


class CausalLM(nn.Module):
    """One definition for every caller: rows of any mixture of prompts and decoding sequences go in packed.

    row_invariant  the bits of a row's output do not depend on the other rows, nor on how its prompt was cut into chunks
    """

    rotary: Tensor

    def __init__(self, config: ModelConfig, *, row_invariant: bool = False) -> None:
        super().__init__()
        self.config = config
        self.row_invariant = row_invariant
        self.embed_tokens = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config, row_invariant) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.lm_head = self.embed_tokens
        else:
            self.lm_head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def allocate(self, device: torch.device) -> None:
        """Give a model that was built on the meta device storage, its parameters without values, and its angles."""
        config = self.config
        self.to(config.dtype).to_empty(device=device).requires_grad_(False).eval()
        if config.tie_word_embeddings:
            self.lm_head = self.embed_tokens
        table = rotary_table(config.rope, config.head_dim, config.max_position_embeddings)
        self.register_buffer("rotary", table.to(device), persistent=False)

    def forward(self, token_ids: Tensor, batch: PackedBatch, kv_cache: Tensor) -> Tensor:
        """Compute one step and write its keys and values.

        token_ids  int64 [T]
        batch      where the rows belong
        kv_cache   [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim] in the model's dtype; finite
                   everywhere, unused entries included
        Returns the hidden states after the final norm, [T, hidden_size], in the model's dtype.
        """
        step = plan_step(
            self.config, batch, self.rotary.index_select(0, batch.positions), kv_cache.size(3), self.row_invariant
        )
        residual = functional.embedding(token_ids, self.embed_tokens).float()
        x: Tensor | None = None
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache.unbind(0), strict=True):
            x = layer(residual, x, step, k_cache, v_cache)
        return self.norm(residual, x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size], in the model's dtype; returns float32 [R, vocab_size]."""
        return linear(hidden, self.lm_head, None, self.row_invariant).float()
