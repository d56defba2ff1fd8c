"""What is generated in a measurement: prompts, and how many tokens after each."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

NANO_REQUESTS, NANO_TEMPERATURE = 256, 0.6


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are there at once. prompts and new_tokens run parallel; an EOS ends none of them."""

    prompts: list[list[int]]
    new_tokens: list[int]
    temperature: float

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt tokens, new tokens) of each request."""
        return [(len(prompt), new) for prompt, new in zip(self.prompts, self.new_tokens, strict=True)]

    @property
    def total_new(self) -> int:
        return sum(self.new_tokens)

    def warm_up(self, new_tokens: int) -> Workload:
        """The same prompts, with at most so many tokens after each."""
        return Workload(
            prompts=self.prompts,
            new_tokens=[min(new, new_tokens) for new in self.new_tokens],
            temperature=self.temperature,
        )


def uniform(batch: int, prompt_len: int, new_tokens: int, vocab: int, seed: int) -> Workload:
    """`batch` random prompts of one length, greedy."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(0, min(vocab, 100_000), (batch, prompt_len), generator=generator).tolist()
    return Workload(prompts=prompts, new_tokens=[new_tokens] * batch, temperature=0.0)


def nano(scale: float = 1.0, shortest: int = 100, longest: int = 1024) -> Workload:
    """The workload of nano-vllm's bench.py, number for number; of it the first `scale` of the requests.

    256 requests of 142,827 prompt tokens and 133,966 new ones. With other bounds of the lengths it is another workload,
    drawn in the same way.
    """
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(shortest, longest))] for _ in range(NANO_REQUESTS)]
    new_tokens = [rng.randint(shortest, longest) for _ in range(NANO_REQUESTS)]
    count = max(1, round(scale * NANO_REQUESTS))
    return Workload(prompts=prompts[:count], new_tokens=new_tokens[:count], temperature=NANO_TEMPERATURE)
