"""What every runner has: launches and their results, and what only the host can do around sampling.

A runner executes plans. `torch_runner` does it at once, on the CPU; `device_runner` queues work for a device, whose
results the host looks at later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from s1engine.engine.logit_edits import BANNED
from s1engine.engine.pages import clear_pages
from s1engine.engine.request import Sequence
from s1engine.engine.scheduler import Chunk, Plan
from s1engine.kernels.logprobs import token_logprobs
from s1engine.kernels.slot_layout import Result
from s1engine.models import CausalLM
from s1engine.outputs import Logprob

# Rows of prompt whose logits exist at a time, where prompt logprobs are asked for: a whole prompt's would not fit.
PROMPT_LOGIT_ROWS = 64


@dataclass(slots=True)
class Sampled:
    """What a launch did to its R sequences that sampled, in the order of `plan.sampling`.

    results   int32 [replays, R, RESULT_WIDTH], columns of `slot_layout.Result`
    logprobs  for each sequence, of its only replay; None where none were asked for
    """

    results: np.ndarray
    logprobs: list[dict[int, Logprob] | None]


class Launch(Protocol):
    """A plan that is being executed."""

    def collect(self) -> Sampled:
        """Wait for its results."""


class Runner(Protocol):
    """Executes plans in the order of their launches.

    depth         how many launches it gains from having unseen
    max_replays   how many steps a launch may have
    rows_may_end  whether it loses nothing by rows that end inside of a launch
    """

    depth: int
    max_replays: int
    rows_may_end: bool

    def needs_host(self, seq: Sequence) -> bool:
        """Whether the host must know the sequence's newest token before its next step is launched."""

    def launch(self, plan: Plan) -> Launch: ...

    def release_cache(self) -> int:
        """Give back the memory of keys and values while nothing runs. Returns its bytes."""

    def restore_cache(self) -> None:
        """Take it again, without values."""


def release_storage(kv_cache: Tensor) -> int:
    """Free what a tensor holds; it and its views stay, to be filled again by restore_storage. Returns its bytes."""
    storage = kv_cache.untyped_storage()
    size = storage.nbytes()
    if not clear_pages(kv_cache):
        storage.resize_(0)
    return size


def restore_storage(kv_cache: Tensor) -> None:
    """Zeros, not garbage: masked keys have weight 0, and 0 x NaN would still be NaN."""
    if not kv_cache.untyped_storage().nbytes():
        kv_cache.untyped_storage().resize_(kv_cache.numel() * kv_cache.element_size())
        kv_cache.zero_()


def copy_blocks(kv_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy blocks of kv_cache [layers, 2, blocks, ...], all sources read first; layer by layer, for the memory."""
    for layer in kv_cache.unbind(0):
        layer[:, target] = layer[:, source]


class PromptLogprobs:
    """Logits without ids that the tokenizer lacks, and the log probabilities of prompts."""

    def __init__(self, model: CausalLM, valid_tokens: Tensor | None, device: torch.device) -> None:
        self.model = model
        self._invalid_ids: Tensor | None = None
        if valid_tokens is not None and not bool(valid_tokens.all()):
            self._invalid_ids = torch.nonzero(~valid_tokens).flatten().to(device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [R, vocab] of hidden rows [R, hidden]."""
        return self.mask_invalid(self.model.compute_logits(hidden))

    def mask_invalid(self, logits: Tensor) -> Tensor:
        """Drop the ids that the tokenizer lacks, in place."""
        if self._invalid_ids is not None:
            logits.index_fill_(1, self._invalid_ids, BANNED)
        return logits

    def extend(self, chunk: Chunk, hidden: Tensor) -> None:
        """Extend the request's prompt logprobs by the rows of a chunk; row at position p predicts token p + 1."""
        request = chunk.seq.request
        record, prompt = request.prompt_logprobs, request.prompt_token_ids
        assert record is not None
        last = min(chunk.start + chunk.length, len(prompt) - 1)
        for low in range(max(chunk.start, len(record) - 1), last, PROMPT_LOGIT_ROWS):
            high = min(low + PROMPT_LOGIT_ROWS, last)
            logits = self.logits(hidden[low - chunk.start : high - chunk.start])
            top = request.params.prompt_logprobs or 0
            record += logprob_dicts(logits, prompt[low + 1 : high + 1], [top] * (high - low))


def record_logprobs(
    seqs: list[Sequence],
    index: list[int],
    logits: Tensor,
    results: list[list[int]],
) -> dict[int, dict[int, Logprob]]:
    """Logprobs of the tokens that were written, each from the logits of its own position; by i of `index`.

    logits   float32 [len(index), vocab], of seqs[i] for each i of `index`
    results  rows of slot_layout.Result of all of `seqs`
    A rewind puts its token at an earlier position, so the rows of tokens that may be taken back are kept.
    """
    rows = list(logits)
    for k, i in enumerate(index):
        seq, row = seqs[i], rows[k]
        rewind, held = results[i][Result.REWIND], results[i][Result.HELD]
        if rewind:
            rows[k] = seq.held_logits[-rewind]
        seq.last_held_logits = seq.held_logits
        # (A copy, lest one row keep the logits of the whole step.)
        seq.held_logits = [*seq.held_logits, row.clone()][-held:] if held else []
    tokens = [max(results[i][Result.TOKEN], 0) for i in index]
    tops = [seqs[i].request.params.logprobs or 0 for i in index]
    return dict(zip(index, logprob_dicts(torch.stack(rows), tokens, tops), strict=True))


def keeps_logits(seq: Sequence) -> bool:
    """Whether its log probabilities take more than those of the token just sampled: the most likely ones, or logits of
    positions gone by, since a rewind puts a token where its logits are gone. (A trigger of one token takes none back.)
    """
    record = seq.thinking
    may_rewind = record is not None and any(len(trigger.tokens) > 1 for trigger in record.format.triggers)
    return bool(seq.request.params.logprobs) or may_rewind


def wants(seq: Sequence, mode: str) -> bool:
    """Whether log probabilities of that mode are asked for."""
    params = seq.request.params
    return params.logprobs is not None and params.logprobs_mode == mode


def logprob_dicts(logits: Tensor, tokens: list[int], tops: list[int]) -> list[dict[int, Logprob]]:
    """For each row of logits [R, vocab]: its token and its `tops[r]` most likely ones."""
    targets = torch.tensor(tokens, device=logits.device)
    chosen, ranks, top_values, top_ids = token_logprobs(logits, targets, max(tops))
    result = []
    for token, value, rank, values, ids, top in zip(
        tokens, chosen.tolist(), ranks.tolist(), top_values.tolist(), top_ids.tolist(), tops, strict=True
    ):
        entry = {token: Logprob(value, rank)}
        for position, (other, its_value) in enumerate(zip(ids[:top], values[:top], strict=True)):
            entry.setdefault(other, Logprob(its_value, position + 1))
        result.append(entry)
    return result
