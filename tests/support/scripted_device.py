"""A model for a device that says what it is told, step by step, so that budgets run through the whole decode step."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from thinking_cases import Case

from s1engine import SamplingParams
from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.models.batch import SlotBatch
from s1engine.thinking import Machine

VOCAB = 1024
AFTER, INSTEAD = 1000, 1001  # said when the script is over, and where what it says is banned


class ScriptedDevice:
    """In step i of slot s it says scripts[s][i], whatever came before. Nothing in it asks the host."""

    def __init__(self, scripts: list[list[int]], steps: int, device: torch.device) -> None:
        self.config = SimpleNamespace(
            vocab_size=VOCAB,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=16,
            hidden_size=1,
            intermediate_size=1,
            dtype=torch.float32,
            max_position_embeddings=512,
            eos_token_ids=(),
        )
        padded = [script[:steps] + [AFTER] * (steps - len(script)) for script in [*scripts, []]]
        self._script = torch.tensor(padded, device=device)
        self._said = torch.zeros(len(padded), dtype=torch.int64, device=device)

    def __call__(self, token_ids: torch.Tensor, batch: SlotBatch, kv_cache: torch.Tensor) -> torch.Tensor:
        rows = batch.rows
        if batch.prefill is not None:
            rows = rows.repeat_interleave(batch.prefill[0].diff())
        return torch.where(rows < 0, len(self._said) - 1, rows).unsqueeze(1)

    def lm_head(self, hidden: torch.Tensor) -> torch.Tensor:
        slots = hidden[:, 0].long()
        said = self._script[slots, self._said[slots].clamp_max(self._script.size(1) - 1)]
        self._said.index_add_(0, slots, torch.ones_like(slots))
        logits = torch.zeros(len(slots), VOCAB, device=hidden.device)
        logits[:, INSTEAD] = 20.0
        return logits.scatter_(1, said.unsqueeze(1), 30.0)


def run_cases(cases: list[Case], num_tokens: int, device: str, **settings: Any) -> list[Any]:
    """The completions of an engine that is told each case's samples, all at once, of up to `num_tokens` tokens."""
    model = ScriptedDevice([list(case.sampled) for case in cases], 4 * num_tokens, torch.device(device))
    config = EngineConfig(
        attention_backend="triton",
        max_num_seqs=len(cases),
        enable_prefix_caching=False,
        kv_cache_memory=2**25,
        **settings,
    )
    engine = LLMEngine(model, device=device, config=config)
    # Captures have called the model; and the slots are given out in order.
    model._said.zero_()
    for number, case in enumerate(cases):
        params = SamplingParams(temperature=0, max_tokens=num_tokens, thinking=replace(case.budget, format=case.format))
        engine.add_request(str(number), {"prompt_token_ids": list(case.prompt)}, params)
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0] for output in engine.step()}
    return [done[str(number)] for number in range(len(cases))]


def by_reference(case: Case, num_tokens: int) -> tuple[list[int], list[bool], int]:
    """(tokens, forced, thinking tokens) of the same, by the reference machine."""
    machine = Machine(case.format, case.budget, case.prompt)
    step = 0
    while not machine.finished and len(machine.output) < num_tokens:
        x = case.sampled[step] if step < len(case.sampled) else AFTER
        machine.step(INSTEAD if x in machine.banned else x)
        step += 1
    return machine.output, [bool(f) for f in machine.forced], machine.thinking_tokens
