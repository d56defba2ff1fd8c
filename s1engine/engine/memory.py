"""How much memory there is for the KV cache, on a CPU and on a GPU."""

from __future__ import annotations

import os

import torch

from s1engine.config import EngineConfig
from s1engine.kernels.slot_attention import SPLIT_KEYS
from s1engine.kernels.slot_layout import FIELD_WIDTH
from s1engine.models.config import ModelConfig
from s1engine.thinking.layout import PROGRAM_WIDTH, STATE_WIDTH

CPU_KV_BYTES = 4 * 2**30
# What a GPU's libraries and graphs take beside tensors.
GPU_RESERVE_BYTES = 2**30


def block_shape(model: ModelConfig, block_size: int) -> tuple[int, int, int, int]:
    """(layers, block_size, kv_heads, head_dim): what one block holds of keys, and again of values."""
    return (model.num_layers, block_size, model.num_kv_heads, model.head_dim)


def num_kv_blocks(model: ModelConfig, config: EngineConfig, max_model_len: int, device: torch.device) -> int:
    """Blocks that the KV cache gets. Raises ValueError where not even one fits."""
    layers, size, heads, dim = block_shape(model, config.block_size)
    block_bytes = 2 * layers * size * heads * dim * model.dtype.itemsize
    full = config.max_num_seqs * -(-max_model_len // config.block_size)
    given = config.kv_cache_memory
    if given is not None:
        budget = given
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = total - free
        budget = int(config.gpu_memory_utilization * total) - used - step_bytes(model, config, max_model_len)
    else:
        budget = min(CPU_KV_BYTES, int(config.gpu_memory_utilization * free_memory()))
    if budget < block_bytes:
        field = "gpu_memory_utilization" if given is None else f"kv_cache_memory={given}"
        raise ValueError(f"{field}: leaves no memory for one KV block, which takes {block_bytes} bytes")
    return min(budget // block_bytes, full) if given is None else budget // block_bytes


def step_bytes(model: ModelConfig, config: EngineConfig, max_model_len: int) -> int:
    """Bytes that the largest step needs on a GPU beside weights and KV cache: an estimate from above."""
    width = model.dtype.itemsize
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = 2 * model.hidden_size * (4 + width) + width * (2 * qkv + 3 * model.intermediate_size)
    # Logits of graphs, of prompts and in float32; occurrences of tokens, where there are penalties.
    logits = config.max_num_seqs * model.vocab_size * (2 * width + 4 + 5)
    slots = config.max_num_seqs * 4 * (FIELD_WIDTH + PROGRAM_WIDTH + STATE_WIDTH + max_model_len)
    partials = config.max_num_seqs * -(-max_model_len // SPLIT_KEYS) * model.num_heads * (model.head_dim + 2) * 4
    return GPU_RESERVE_BYTES + 2 * per_token * config.max_num_batched_tokens + logits + slots + partials


def free_memory() -> int:
    """Bytes that could be allocated now without swapping: what is free, and on Linux also what caches would give up."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
