"""The decoder-only language model that Qwen2, Qwen2.5, Qwen3 and Llama share; the configuration tells them apart."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from s1engine.kernels.decoder_layers import decoder_layers
from s1engine.kernels.huge_pages import Arena, num_bytes
from s1engine.kernels.packed import packed_embedding, packed_linear
from s1engine.models.batch import PackedBatch, SlotBatch
from s1engine.models.config import ModelConfig
from s1engine.models.layers import DecoderLayer, Linear, RMSNorm
from s1engine.models.step import NativeStep, StepPlanner


class CausalLM(nn.Module):
    """One definition for every caller: rows of any mixture of prompts and decoding sequences go in packed.

    row_invariant  the bits of a row's output do not depend on the other rows, nor on how its prompt was cut into chunks
    """

    embed_tokens: nn.Parameter | None

    def __init__(self, config: ModelConfig, *, row_invariant: bool = False) -> None:
        super().__init__()
        self.config = config
        self.weights_version = 0  # counts the updates of a loaded model
        self._packed: tuple[Tensor, list[Tensor], list[Tensor]] | None = None
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
        if config.tie_word_embeddings and self.embed_tokens is not None:
            self.lm_head.weight = self.embed_tokens
        self.planner.allocate(device)

    def pack(self, dtype: torch.dtype) -> None:
        """Give the matrices of a model on the meta device storage in the C++ operators' layout; before `allocate`.

        They lie in huge pages, in the order of their use. A tied embedding is stored once, in the head's packed form.
        dtype: the model's, or int8.
        """
        matrices = [module for module in self.modules() if isinstance(module, Linear)]
        arena = Arena(sum(num_bytes(matrix.packed_shape(dtype), dtype) for matrix in matrices))
        for matrix in matrices:
            matrix.pack_into(arena.zeros(matrix.packed_shape(dtype), dtype))
        if self.config.tie_word_embeddings:
            self.embed_tokens = None

    def _embed(self, token_ids: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            return functional.embedding(token_ids, self.embed_tokens).float()
        packed = self.lm_head.packed
        assert packed is not None
        return packed_embedding(token_ids, packed.storage, packed.inputs)

    def forward(self, token_ids: Tensor, batch: PackedBatch | SlotBatch, kv_cache: Tensor) -> Tensor:
        """Compute one step and write its keys and values.

        token_ids  int64 [T]
        batch      where the rows belong
        kv_cache   [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim] in the model's dtype; finite
                   everywhere, unused entries included
        Returns the hidden states after the final norm, [T, hidden_size], in the model's dtype.
        """
        step = self.planner(batch, kv_cache)
        residual = self._embed(token_ids)
        if isinstance(step, NativeStep) and self.lm_head.packed is not None:
            return self.norm(residual, self._run_packed(residual, step, kv_cache))
        x: Tensor | None = None
        for layer, (k_cache, v_cache) in zip(self.layers, kv_cache.unbind(0), strict=True):
            x = layer(residual, x, step, k_cache, v_cache)
        return self.norm(residual, x)

    def _run_packed(self, residual: Tensor, step: NativeStep, kv_cache: Tensor) -> Tensor:
        """All layers in one call. Neither weights nor the cache move, so the lists of them are made once."""
        if self._packed is None or self._packed[0] is not kv_cache:
            layers = cast("list[DecoderLayer]", list(self.layers))
            weights = [tensor for layer in layers for tensor in layer.packed_weights()]
            self._packed = kv_cache, weights, [cache for layer in kv_cache.unbind(0) for cache in layer.unbind(0)]
        _, weights, caches = self._packed
        batch, config = step.batch, self.config
        return decoder_layers(
            residual, weights, caches, step.rotary, batch.positions, batch.slot_mapping, batch.block_tables,
            batch.query_start, batch.context_lens, config.num_heads, config.intermediate_size, config.rms_norm_eps,
            config.head_dim**-0.5,
        )  # fmt: skip

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size], in the model's dtype; returns float32 [R, vocab_size]."""
        packed = self.lm_head.packed
        if packed is not None:
            return packed_linear(hidden, packed.storage, None, packed.outputs, False, True)
        return self.lm_head(hidden).float()
