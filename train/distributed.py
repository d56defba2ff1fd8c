"""Processes, model and optimizer of a training run, on DeepSpeed.

Started by `deepspeed`, by `torchrun` or plainly (then as the only process). Under ZeRO 3 no process ever holds the
whole model: it is built in parts, and every parameter that is filled is gathered for that moment only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn

from s1engine.models import CausalLM
from s1engine.models.weights import checkpoint_places, load_model, open_checkpoint, resolve_model_path

INSTALL = "training needs DeepSpeed: pip install 's1engine[train]'"


@contextmanager
def processes() -> Iterator[tuple[int, int, torch.device]]:
    """Joins the run's processes. Yields (rank, number of ranks, device of this one), and leaves in good order."""
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(INSTALL) from error
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        # DeepSpeed looks for MPI where it finds none of these.
        os.environ.update(alone | {"MASTER_PORT": str(_free_port())})
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif "DS_ACCELERATOR" not in os.environ:
        os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cuda" if cuda else "cpu")
        # Without it processes that leave early have been seen to abort the others.
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def load_for_training(path_or_id: str, dtype: str, device: torch.device, deepspeed_config: dict[str, Any]) -> CausalLM:
    """The model with gradients, its parameters plain; under ZeRO 3 partitioned over the ranks.

    Raises ValueError as load_model does; an architecture that only transformers has is refused by name.
    """
    if deepspeed_config["zero_optimization"].get("stage", 0) < 3:
        model = load_model(path_or_id, dtype=dtype, device=device, packed=False)
    else:
        model = _load_partitioned(path_or_id, dtype, device, deepspeed_config)
    return model.requires_grad_(True).train()


class PartitionedLM(CausalLM):
    """A model whose parameters ZeRO 3 divides over the ranks."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Around a module's call DeepSpeed gathers its parameters, by all ranks in the same order. How often logits are
        computed differs from rank to rank, so this is no such call; the caller's own has the head's weight gathered,
        which DeepSpeed notes at the first access."""
        return self.lm_head.forward(hidden)


def _load_partitioned(path_or_id: str, dtype: str, device: torch.device, config: dict[str, Any]) -> CausalLM:
    import deepspeed

    with open_checkpoint(resolve_model_path(path_or_id), dtype) as (checkpoint, model_config):
        # The dtype is left to the config: one that is given is ignored where the device has no float16 (0.19.8).
        with deepspeed.zero.Init(config_dict_or_path=config, mem_efficient_linear=False):
            model = PartitionedLM(model_config)
        model.planner.allocate(device)
        for _, places in groupby(checkpoint_places(model), key=lambda pair: id(pair[1].parameter)):
            same = list(places)
            with deepspeed.zero.GatheredParameters([same[0][1].parameter], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    for name, place in same:
                        place.target().copy_(checkpoint.tensor(name))
    return model


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether ZeRO 3 has divided them over the ranks."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """The whole values of parameters, on every rank, while it lasts."""
    if is_partitioned(parameters):
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(parameters))
    return nullcontext()


def adamw(model: nn.Module, config: Any, settings: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW, of which only matrices decay; DeepSpeed's for CPUs where its state is offloaded to one."""
    parameters = list(model.parameters())
    # Partitioned parameters are flat; DeepSpeed keeps the shape they had.
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    common = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.epsilon}
    if settings["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return cast(torch.optim.Optimizer, DeepSpeedCPUAdam(groups, adamw_mode=True, **common))
    return torch.optim.AdamW(groups, fused=True, **common)
