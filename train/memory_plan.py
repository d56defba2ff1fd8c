"""What a training run needs of memory, worked out from the model's shape: `s1engine sft --dry-run`.

The model is built on the meta device, so parameters are counted, not estimated. Bytes a parameter are those of
DeepSpeed's mixed precision (Rajbhandari et al., 2020, section 3.1): 2 of weight, 2 of gradient, 12 of float32 master
weight and two moments; each ZeRO stage divides one more of the three by the number of ranks. Activations are the
tensors that autograd keeps; a test compares them with what it really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s1engine.kernels.linear_cross_entropy import PIECE_BYTES
from s1engine.models import CausalLM, ModelConfig, resolve_model_path
from s1engine.models.config import read_config as read_model_config
from s1engine.train.sft_config import SftConfig, deepspeed_config

GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """Bytes on one device and, where something is offloaded, of host memory a device."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_total(self) -> float:
        return sum(self.device.values())


def parameter_count(config: ModelConfig) -> int:
    """Of a model built on the meta device; a tied embedding counts once."""
    with torch.device("meta"):
        model = CausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


def layer_bytes(config: ModelConfig, tokens: int) -> float:
    """What autograd keeps of one layer while its backward pass runs, the layer's input included."""
    size, heads, kv_heads = config.dtype.itemsize, config.num_heads, config.num_kv_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    stream = 2 * 4 * hidden  # the float32 stream before each norm
    normed = 2 * size * hidden
    fused = size * config.head_dim * (heads + 2 * kv_heads)  # of the projection: the values lie in it
    turned = size * config.head_dim * (heads + kv_heads)
    attended = size * config.head_dim * heads + 4 * heads  # with the logarithms of the softmax's sums
    feed_forward = 3 * size * inner  # gate, up, their product
    return tokens * (stream + normed + fused + turned + attended + feed_forward)


def plan(config: SftConfig, model: ModelConfig, ranks: int) -> Plan:
    """At the fullest moment of a step, with one row of row_tokens."""
    zero = deepspeed_config(config)["zero_optimization"]
    stage = zero.get("stage", 0)

    def offloaded(part: str) -> bool:
        return bool(zero.get(part, {}).get("device", "none") != "none")

    count, size, tokens = parameter_count(model), model.dtype.itemsize, config.row_tokens
    mixed = model.dtype == torch.bfloat16
    share = {
        name: count / (ranks if stage >= least else 1)
        for name, least in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    layer = (count - model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)) / model.num_layers
    head = model.vocab_size * model.hidden_size
    kept = 4.0 * tokens * model.hidden_size * model.num_layers
    states = {
        "weights": size * share["weights"],
        "gradients": size * share["gradients"],
        "optimizer": (12 if mixed else 8) * share["optimizer"],
    }
    host = {}
    if offloaded("offload_optimizer"):
        host["optimizer"] = states.pop("optimizer")
    if offloaded("offload_param"):
        host["weights"] = states.pop("weights")
    if stage >= 3:
        # Of the layer at work and the next, or of the head.
        states["gathered weights"] = size * max(2 * layer, head)
    elif stage:
        states["reduction bucket"] = size * min(count, float(zero.get("reduce_bucket_size", 5e8)))
    working = layer_bytes(model, tokens)
    if config.checkpointing:
        # While a layer's gradients are made: those of the gate and up projections, and of their product.
        working += 3 * size * model.intermediate_size * tokens
        if config.offload_layers:
            host["layer inputs"] = kept
        else:
            states["layer inputs"] = kept
    else:
        working *= model.num_layers
    # The head's own moment: one piece's logits in three forms, and its gradient summed in float32.
    at_head = 2.5 * PIECE_BYTES + (4 + 2 * size) * head + 2 * size * tokens * model.hidden_size
    states["layer at work, or head"] = max(working, at_head)
    return Plan(states, host)


def print_plan(config: SftConfig, ranks: int) -> None:
    """The plan of this run, and beside it what each ZeRO stage would leave."""
    model = read_model_config(resolve_model_path(config.model), config.dtype)
    print(f"{config.model}: {parameter_count(model) / 1e9:.2f} billion parameters, {config.dtype}, {ranks} devices")
    print(f"rows of {config.row_tokens:,} tokens; a step is {config.batch_size} samples")
    found = plan(config, model, ranks)
    print("\nGiB on each device, at the fullest moment")
    for name, size in found.device.items():
        print(f"  {name:<28}{size / GIB:8.1f}")
    print(f"  {'together':<28}{found.device_total / GIB:8.1f}")
    if found.host:
        print("GiB of host memory for each device")
        for name, size in found.host.items():
            print(f"  {name:<28}{size / GIB:8.1f}")
    if torch.cuda.is_available():
        capacity = torch.cuda.get_device_properties(0).total_memory
        print(f"this machine's devices have {capacity / GIB:.1f} GiB each")
    count, size = parameter_count(model), model.dtype.itemsize
    optimizer = 12 if model.dtype == torch.bfloat16 else 8
    print(f"\nweights + gradients + optimizer states, GiB a device, on {ranks} devices")
    for stage in range(4):
        parts = [
            size / (ranks if stage >= 3 else 1),
            size / (ranks if stage >= 2 else 1),
            optimizer / (ranks if stage >= 1 else 1),
        ]
        print(
            f"  ZeRO {stage}  "
            + " + ".join(f"{part * count / GIB:.1f}" for part in parts)
            + f" = {sum(parts) * count / GIB:.1f}"
        )
