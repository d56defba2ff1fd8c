"""Models: configuration, one decoder definition over packed rows, checkpoint loading."""

from s1engine.models.batch import PackedBatch
from s1engine.models.causal_lm import CausalLM
from s1engine.models.config import ModelConfig
from s1engine.models.weights import load_model, resolve_model_path

__all__ = ["CausalLM", "ModelConfig", "PackedBatch", "load_model", "resolve_model_path"]
