"""The engine's settings, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from s1engine.thinking import FORMAT_NAMES, ThinkingFormat

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
QUANTIZATIONS = (None, "int8")
ATTENTION_BACKENDS = ("auto", "torch", "triton", "flash-attn")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    max_model_len            tokens of prompt and output together; None: what the model was made for
    max_num_seqs             sequences that run at once (slots)
    max_num_batched_tokens   tokens of one step, decodes and prefill chunks together
    block_size               tokens a KV block holds
    kv_cache_memory          bytes for the KV cache; None: enough for max_num_seqs full contexts, at most
                             `gpu_memory_utilization` of the memory that is free and, on a CPU, at most 4 GiB
    attention_backend        "auto"; on a GPU "triton", or "flash-attn" for prompts (needs block_size % 256 == 0; "auto"
                             takes it where it can); on a CPU "torch", or "triton": the GPU's path, to test it
    quantization             "int8": the model's matrices are held in 8 bits (CPUs only); None: in the model's dtype
    deterministic            a request gives the same tokens whatever else is in the batch and however it is chunked

    Raises ValueError that names the field, the value and what would be valid.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    attention_backend: str = "auto"
    tensor_parallel_size: int = 1
    quantization: str | None = None
    deterministic: bool = False
    thinking_format: str | ThinkingFormat = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_model_len", "kv_cache_memory"):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "kv_cache_memory"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be an integer >= 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r}: must be a 64-bit integer")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
            raise ValueError(f"gpu_memory_utilization={share!r}: must be a number in (0, 1]")
        for name in ("enable_prefix_caching", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.attention_backend not in ATTENTION_BACKENDS:
            raise ValueError(f"attention_backend={self.attention_backend!r}: one of {', '.join(ATTENTION_BACKENDS)}")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization={self.quantization!r}: must be None or 'int8'")
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size!r}: this engine runs on one device, so it must be 1"
            )
        if not isinstance(self.thinking_format, ThinkingFormat) and self.thinking_format not in FORMAT_NAMES:
            names = ", ".join(FORMAT_NAMES)
            raise ValueError(f"thinking_format={self.thinking_format!r}: must be one of {names}, or a ThinkingFormat")


def check_choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `valid`."""
    if value not in valid:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(valid)}")
