"""What a model is made of, mapped once from its Hugging Face configuration, with every unsupported feature named."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from s1engine.models.rotary import ROPE_TYPES, RopeConfig, yarn_attention_factor

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only model. Sizes in elements, positions in tokens.

    max_position_embeddings counts what a rope scaling adds. qkv_bias, o_bias, mlp_bias and qk_norm tell which of these
    parameters the architecture has. eos_token_ids: generation ends at any of them; may be empty.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]


def read_config(folder: Path, dtype: str = "auto") -> ModelConfig:
    """Read `config.json` and, where there is one, `generation_config.json` of a model folder.

    dtype  "auto" (the config's own), "float32" or "bfloat16". Weights stored as float16 are computed in float32: CPUs
           have no fast float16 arithmetic.
    Raises ValueError that names every feature of the config that is not supported.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of auto, {', '.join(DTYPES)}")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no config.json in this folder")
    raw = json.loads(file.read_text(encoding="utf-8"))
    architecture = _architecture(raw, file)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (StrictDataclassError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    problems = _unsupported(config)
    if problems:
        raise ValueError(f"{file}: not supported: {'; '.join(problems)}")
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    attention_bias = bool(getattr(config, "attention_bias", False))
    rope = _rope(config)
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        max_position_embeddings=_max_positions(config, rope),
        rms_norm_eps=config.rms_norm_eps,
        rope=rope,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=is_qwen2 or attention_bias,
        o_bias=not is_qwen2 and attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        dtype=_dtype(config, dtype),
        eos_token_ids=_eos_token_ids(folder, config),
    )


def _architecture(raw: dict[str, Any], file: Path) -> str:
    named = raw.get("architectures") or [name for name, kind in ARCHITECTURES.items() if kind == raw.get("model_type")]
    known = [name for name in named if name in ARCHITECTURES]
    if not known:
        what = f"architectures={raw.get('architectures')!r}, model_type={raw.get('model_type')!r}"
        raise ValueError(f"{file}: {what}: must be one of {', '.join(ARCHITECTURES)}")
    if raw.get("model_type") != ARCHITECTURES[known[0]]:
        raise ValueError(
            f"{file}: model_type={raw.get('model_type')!r}: must be {ARCHITECTURES[known[0]]!r} for {known[0]}"
        )
    return known[0]


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _unsupported(config: Any) -> list[str]:
    problems = []
    if config.hidden_act not in ("silu", "swish"):
        problems.append(f"hidden_act={config.hidden_act!r} (must be 'silu')")
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if other_layers:
        problems.append(f"layer_types with {', '.join(map(repr, other_layers))} (must all be 'full_attention')")
    if getattr(config, "quantization_config", None) is not None:
        problems.append("quantization_config (weights must be float32, bfloat16 or float16)")
    problems += _unsupported_rope(config.rope_parameters)
    if config.num_attention_heads % config.num_key_value_heads:
        problems.append(
            f"num_attention_heads={config.num_attention_heads} (must be a multiple of "
            f"num_key_value_heads={config.num_key_value_heads})"
        )
    if _head_dim(config) % 2:
        problems.append(f"head_dim={_head_dim(config)} (must be even)")
    return problems


def _unsupported_rope(rope: dict[str, Any]) -> Iterator[str]:
    if "rope_type" not in rope:
        yield f"rope_parameters={rope!r} (must be one setting for all layers)"
        return
    kind = rope["rope_type"]
    if kind not in ROPE_TYPES:
        yield f"rope_type={kind!r} (must be one of {', '.join(ROPE_TYPES)})"
        return
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={rope['partial_rotary_factor']!r} (must be 1.0)"
    numbers = {
        "default": ("rope_theta",),
        "linear": ("rope_theta", "factor"),
        "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
        "llama3": (
            "rope_theta",
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        ),
    }
    for name in numbers[kind]:
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            yield f"{name}={value!r} with rope_type={kind!r} (must be a number > 0)"


def _rope(config: Any) -> RopeConfig:
    given = config.rope_parameters
    kind, theta = given["rope_type"], float(given["rope_theta"])
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(rope_type=kind, theta=theta, factor=float(given["factor"]))
    original = given["original_max_position_embeddings"]
    if kind == "llama3":
        return RopeConfig(
            rope_type=kind,
            theta=theta,
            factor=float(given["factor"]),
            original_context=original,
            low_freq_factor=float(given["low_freq_factor"]),
            high_freq_factor=float(given["high_freq_factor"]),
        )
    factor = float(given["factor"])
    attention_factor = given.get("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor, given.get("mscale"), given.get("mscale_all_dim"))
    return RopeConfig(
        rope_type=kind,
        theta=theta,
        factor=factor,
        original_context=original,
        attention_factor=float(attention_factor),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        truncate=bool(given.get("truncate", True)),
    )


def _max_positions(config: Any, rope: RopeConfig) -> int:
    """Configs with linear or yarn scaling usually still name the length before it; llama3's name the one after."""
    stretched = {"linear": config.max_position_embeddings * rope.factor, "yarn": rope.original_context * rope.factor}
    return max(config.max_position_embeddings, int(stretched.get(rope.rope_type, 0)))


def _dtype(config: Any, wanted: str) -> torch.dtype:
    if wanted != "auto":
        return DTYPES[wanted]
    own = config.dtype
    if own in DTYPES.values():
        return own
    if own not in (None, torch.float16):
        raise ValueError(f"dtype='auto': the config's dtype is {own}; pass one of {', '.join(DTYPES)}")
    logger.info("the config's dtype is %s: weights are loaded as float32", own)
    return torch.float32


def _eos_token_ids(folder: Path, config: Any) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = config.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
