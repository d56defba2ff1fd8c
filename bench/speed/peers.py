"""transformers as the engine to compare with: its `generate`, and its continuous batching."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from s1engine.bench.speed.workloads import Workload


class TooSlow(RuntimeError):
    """The peer was given up at its time limit."""


class Generate:
    """One padded batch. It has one length for all, so every row runs to the longest request's."""

    name = "transformers"
    note = (
        "transformers: generate; prompts are padded on the left and all rows run to the longest request's end; only "
        "the tokens that were asked for count"
    )

    def __init__(self, net: Any, workloads: Sequence[Workload], limit: float | None, stack: ExitStack) -> None:
        self._net, self._limit = net, limit

    def __call__(self, workload: Workload) -> None:
        """Raises TooSlow after the time limit."""
        longest, new_tokens = max(map(len, workload.prompts)), max(workload.new_tokens)
        ids = torch.zeros(len(workload.prompts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(workload.prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if workload.temperature:
            sampling = {"do_sample": True, "temperature": workload.temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            made = self._net.generate(
                ids.to(self._net.device),
                attention_mask=mask.to(self._net.device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                max_time=self._limit,
                pad_token_id=0,
                **sampling,
            ).tolist()
        if len(made[0]) < longest + new_tokens:
            raise TooSlow(f"{len(made[0]) - longest} of {new_tokens} steps in {self._limit:.0f} s")


class Continuous:
    """Continuous batching: each request has its own length. One manager serves all calls, as a server's would."""

    name = "transformers CB"

    def __init__(self, net: Any, workloads: Sequence[Workload], limit: float | None, stack: ExitStack) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        self._limit, self._calls = limit, 0
        temperature = workloads[0].temperature
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        lengths = [length for workload in workloads for length in workload.lengths]
        # On a GPU it sizes its cache by the memory that is free; on a CPU that would be most of the machine's.
        memory: dict[str, Any] = {"max_memory_percent": 0.8}
        if net.device.type == "cpu":
            blocks = max(sum(-(-(p + n) // 256) + 1 for p, n in workload.lengths) for workload in workloads)
            memory = {"num_blocks": blocks, "max_batch_tokens": 2048}
        self._manager = stack.enter_context(
            net.continuous_batching_context_manager(
                generation_config=GenerationConfig(max_new_tokens=1, eos_token_id=-1, pad_token_id=0, **sampling),
                continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **memory),
                timeout=5,
                workload_hints=WorkloadHints(
                    max_prompt_length=max(prompt for prompt, _ in lengths),
                    max_generated_length=max(new for _, new in lengths),
                    num_requests=max(len(workload.prompts) for workload in workloads),
                ),
            )
        )
        attention = net.config._attn_implementation
        self.note = f"transformers CB: continuous batching with attention {attention!r}, each request of its own length"

    def __call__(self, workload: Workload) -> None:
        """Raises TooSlow after the time limit, and RuntimeError where a request comes to nothing."""
        deadline = None if self._limit is None else time.perf_counter() + self._limit
        self._calls += 1
        left = {}
        for number, (prompt, new) in enumerate(zip(workload.prompts, workload.new_tokens, strict=True)):
            request_id = f"{self._calls}-{number}"
            self._manager.add_request(prompt, request_id=request_id, max_new_tokens=new, eos_token_id=-1)
            left[request_id] = new
        while left:
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None or len(result.generated_tokens) != left.pop(result.request_id):
                    made = len(result.generated_tokens)
                    raise RuntimeError(f"request {result.request_id} has {made} tokens: {result.error}")
            elif not self._manager.is_running():
                raise RuntimeError("the generation thread has ended")
            if left and deadline is not None and time.perf_counter() > deadline:
                # Else it would go on beside the others.
                self._manager.stop(block=True, timeout=10)
                tokens, done = workload.total_new - sum(left.values()), len(workload.prompts) - len(left)
                raise TooSlow(f"{done} requests of {tokens} tokens were done in {self._limit:.0f} s")


PEERS: dict[str, type[Generate] | type[Continuous]] = {"generate": Generate, "continuous": Continuous}


def load_peer(
    name: str, model: str, dtype: torch.dtype, device: torch.device, workloads: Sequence[Workload], limit: float | None,
    stack: ExitStack,
) -> Generate | Continuous:  # fmt: skip
    """The peer of that name in PEERS, loaded. workloads: those that it will get; limit: seconds it may take for one.

    What it holds is given up where `stack` ends.
    """
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval().to(device)
    return PEERS[name](net, workloads, limit, stack)
