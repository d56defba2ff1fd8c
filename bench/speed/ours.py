"""s1engine as it is measured, and the variations of it that it is compared with in the same run."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch

from s1engine import LLM, SamplingParams, ThinkingBudget, ThinkingFormat
from s1engine.bench.speed import machine
from s1engine.bench.speed.floor import Sizes
from s1engine.bench.speed.workloads import Workload
from s1engine.thinking import Trigger

BLOCK_SIZE = 16
NANO_MODEL_LEN = 4096
WARM_UP_TOKENS = 17  # a first token, and decode steps that may follow each other unseen

# Thinking that the prompt opens and that never ends: an end is replaced, so that the machine counts every token.
OPENED, END = 1, 2
FORMAT = ThinkingFormat(start=(OPENED,), triggers=(Trigger((END,), (END,)),), forced_close=(END,))
BUDGET = ThinkingBudget(max_tokens=2**30, min_tokens=2**30, extensions=((OPENED,),), format=FORMAT)

Engine = Callable[[Workload], None]


def load_ours(
    args: argparse.Namespace, model: str, sizes: Sizes, device: torch.device, workloads: list[Workload]
) -> Iterator[tuple[str, Engine, int]]:
    """s1engine, then the variations that `args` ask for: name, engine, and the bytes that loading it took.

    The KV cache has room for all requests of a workload, and for no more.
    """
    blocks = max(sum(-(-(p + 1 + n) // BLOCK_SIZE) + 1 for p, n in workload.lengths) for workload in workloads)
    longest = max(p + 1 + n for workload in workloads for p, n in workload.lengths)
    if args.workload == "nano":
        longest = NANO_MODEL_LEN

    def load(deterministic: bool) -> LLM:
        return LLM(
            model,
            dtype=args.dtype,
            device=device.type,
            max_model_len=longest,
            max_num_seqs=max(len(workload.prompts) for workload in workloads),
            block_size=BLOCK_SIZE,
            kv_cache_memory=max(blocks, -(-longest // BLOCK_SIZE))
            * BLOCK_SIZE
            * sizes.kv
            * getattr(torch, args.dtype).itemsize,
            enable_prefix_caching=False,
            attention_backend=args.attention_backend,
            deterministic=deterministic,
        )

    before = loaded_bytes(device)
    llm = load(False)
    yield "s1engine", lambda workload: run_ours(llm, workload), loaded_bytes(device) - before
    if args.budget:
        yield "s1engine, budget", lambda workload: run_ours(llm, workload, budget=True), 0
    if args.deterministic:
        before = loaded_bytes(device)
        other = load(True)
        yield "s1engine, deterministic", lambda workload: run_ours(other, workload), loaded_bytes(device) - before


def warm_up(engine: Engine, workloads: list[Workload], device: torch.device) -> float:
    """Compile and allocate what the workloads need. Returns seconds.

    On a GPU it is a whole run, whose time is worth knowing where nothing else comes to an end.
    """
    start = time.perf_counter()
    for workload in workloads:
        engine(workload if device.type == "cuda" else workload.warm_up(WARM_UP_TOKENS))
    return time.perf_counter() - start


def run_ours(llm: LLM, workload: Workload, budget: bool = False) -> None:
    """Generate the workload; with a budget the prompts are opened by a token more, and every token is counted.

    Raises RuntimeError where a request has other than its tokens.
    """
    prompts = [[*prompt, OPENED] for prompt in workload.prompts] if budget else workload.prompts
    params = [
        SamplingParams(
            temperature=workload.temperature, max_tokens=new, ignore_eos=True, thinking=BUDGET if budget else None
        )
        for new in workload.new_tokens
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, new in zip(outputs, workload.new_tokens, strict=True):
        completion = output.outputs[0]
        if len(completion.token_ids) != new:
            raise RuntimeError(f"a request of {new} tokens has {len(completion.token_ids)}")
        if budget and (completion.thinking is None or completion.thinking.num_tokens != new):
            raise RuntimeError(f"a request of {new} thinking tokens has {completion.thinking}")


def loaded_bytes(device: torch.device) -> int:
    """Bytes that this process holds on the device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else machine.resident_memory()
