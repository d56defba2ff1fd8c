"""Building a model from a folder or the hub: every tensor of the checkpoint goes straight into its place.

Parameters, some of them fused, are allocated once without being initialised and filled from the mapped pages of the
files; so no second copy of the checkpoint is ever held in memory of our own.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from s1engine.kernels.attention_row_invariant import attention_rows_are_independent
from s1engine.kernels.linear import rows_are_independent
from s1engine.models.causal_lm import CausalLM
from s1engine.models.checkpoint import Checkpoint
from s1engine.models.config import ModelConfig, read_config
from s1engine.models.layers import DecoderLayer, Linear

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

logger = logging.getLogger(__name__)


def resolve_model_path(path_or_id: str) -> Path:
    """The folder of a model: the one named or, where there is none of that name, a downloaded snapshot of the hub's."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    return Path(snapshot_download(path_or_id, allow_patterns=patterns))


def load_model(
    path_or_id: str, *, dtype: str = "auto", device: str | torch.device = "cpu", row_invariant: bool = False
) -> CausalLM:
    """Build the model of a folder or hub id and fill its parameters; ready for inference, without gradients.

    dtype          "auto" (the config's), "float32" or "bfloat16"
    row_invariant  see CausalLM; raises RuntimeError where this machine's matrix product cannot keep the promise
    Raises ValueError that names every unsupported feature or every missing, unexpected or misshapen tensor.
    """
    folder = resolve_model_path(path_or_id)
    config = read_config(folder, dtype)
    with Checkpoint(folder) as checkpoint:
        config = _settle_tying(config, checkpoint)
        with torch.device("meta"):
            model = CausalLM(config, row_invariant=row_invariant)
        targets = checkpoint_targets(model)
        shapes = {name: tuple(target.shape) for name, target in targets.items()}
        problems = list(checkpoint.problems(shapes, _derived(config, checkpoint)))
        if problems:
            raise ValueError(f"{folder}: the checkpoint does not fit the config: {'; '.join(problems)}")
        model.allocate(torch.device(device))
        for name, target in checkpoint_targets(model).items():
            target.copy_(checkpoint.tensor(name))
    if row_invariant:
        _check_row_invariance(model)
    return model


def checkpoint_targets(model: CausalLM) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes: its name there to the parameter, or the rows of a fused one."""
    config = model.config
    targets = {EMBEDDING: model.embed_tokens.detach(), "model.norm.weight": model.norm.weight.detach()}
    if not config.tie_word_embeddings:
        targets[HEAD] = model.lm_head.detach()
    for number, layer in enumerate(cast("list[DecoderLayer]", list(model.layers))):
        prefix = f"model.layers.{number}."
        targets[prefix + "input_layernorm.weight"] = layer.input_norm.weight.detach()
        targets[prefix + "post_attention_layernorm.weight"] = layer.post_attention_norm.weight.detach()
        if config.qk_norm:
            targets[prefix + "self_attn.q_norm.weight"] = layer.attention.q_norm.detach()
            targets[prefix + "self_attn.k_norm.weight"] = layer.attention.k_norm.detach()
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for module, names, sizes in (
            (layer.attention.qkv_proj, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q, kv, kv)),
            (layer.attention.o_proj, ("self_attn.o_proj",), (config.hidden_size,)),
            (layer.mlp.gate_up_proj, ("mlp.gate_proj", "mlp.up_proj"), (config.intermediate_size,) * 2),
            (layer.mlp.down_proj, ("mlp.down_proj",), (config.hidden_size,)),
        ):
            for kind, parameter in module.named_parameters():
                for name, part in zip(names, parameter.detach().split(sizes), strict=True):
                    targets[f"{prefix}{name}.{kind}"] = part
    return targets


def _settle_tying(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Untie where the config ties but the checkpoint holds two different tensors, as transformers does."""
    names = checkpoint.names()
    if not config.tie_word_embeddings or EMBEDDING not in names or HEAD not in names:
        return config
    if torch.equal(checkpoint.tensor(EMBEDDING), checkpoint.tensor(HEAD)):
        return config
    logger.warning("%s: tie_word_embeddings is set, but %s has values of its own: not tied", checkpoint.folder, HEAD)
    return replace(config, tie_word_embeddings=False)


def _derived(config: ModelConfig, checkpoint: Checkpoint) -> set[str]:
    """Tensors that some checkpoints carry although others determine them."""
    derived = {name for name in checkpoint.names() if name.endswith(".rotary_emb.inv_freq")}
    return derived | {HEAD} if config.tie_word_embeddings else derived


def _check_row_invariance(model: CausalLM) -> None:
    """One probe for every shape of matrix product in the model."""
    config = model.config
    products: list[tuple[str, Tensor, nn.Parameter | None]] = [("lm_head", model.lm_head, None)]
    for name, module in model.layers[0].named_modules():
        if isinstance(module, Linear):
            products.append((name, module.weight, module.bias))
    failing = [
        f"{name} {list(weight.shape)}" for name, weight, bias in products if not rows_are_independent(weight, bias)
    ]
    if not attention_rows_are_independent(config.num_heads // config.num_kv_heads, config.head_dim):
        failing.append("attention scores")
    if failing:
        raise RuntimeError(
            f"row_invariant=True: with this machine's {config.dtype} matrix products a row's bits depend on its "
            f"neighbours for {', '.join(failing)}"
        )
