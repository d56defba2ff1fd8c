"""The host's hand in a device's sampling, for the few requests that need it: see `device_slots.needs_host`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from s1engine.engine.device_slots import DeviceSlotTable
from s1engine.engine.logit_edits import BANNED, edit_logits
from s1engine.engine.request import Sequence
from s1engine.engine.runner import record_logprobs, wants
from s1engine.kernels.sampler import SamplingBatch, processed_logits
from s1engine.kernels.slot_layout import Result
from s1engine.outputs import Logprob
from s1engine.thinking.layout import State
from s1engine.thinking.program import banned_ids


@dataclass(slots=True)
class Kept:
    """What has to be known after sampling: whether the host banned anything, and logits that logprobs come from."""

    banned: list[bool]
    raw: list[int]
    raw_logits: Tensor | None
    processed: list[int]
    processed_logits: Tensor | None


class HostSampling:
    """Edits logits before sampling, and records log probabilities after it. Both wait for the device."""

    def __init__(self, slots: DeviceSlotTable) -> None:
        self._slots = slots

    def edit(self, logits: Tensor, seqs: list[Sequence]) -> Kept:
        """logits float32 [R, vocab], edited in place; seqs [R], of which those that need the host are dealt with."""
        chosen = [i for i, seq in enumerate(seqs) if seq.needs_host]
        raw = [i for i in chosen if wants(seqs[i], "raw_logprobs")]
        processed = [i for i in chosen if wants(seqs[i], "processed_logprobs")]
        raw_logits = logits[torch.tensor(raw)] if raw else None
        edited = [i for i in chosen if seqs[i].request.edits_logits]
        banned = [False] * len(seqs)
        if edited:
            for i, was in zip(edited, edit_logits(logits, edited, [seqs[i] for i in edited]), strict=True):
                banned[i] = was
        kept = None
        if processed:
            index = torch.tensor(processed)
            kept = logits[index]
            self._ban(kept, [seqs[i] for i in processed])
            kept = processed_logits(kept, self._sampling_batch([seqs[i] for i in processed]))
        return Kept(banned, raw, raw_logits, processed, kept)

    def record(self, kept: Kept, seqs: list[Sequence], rows: list[list[int]]) -> list[dict[int, Logprob] | None]:
        """Complete the results `rows` [R] and return their log probabilities."""
        logprobs: dict[int, dict[int, Logprob]] = {}
        for row, banned in zip(rows, kept.banned, strict=True):
            row[Result.BANNED] |= banned
        for index, logits in ((kept.raw, kept.raw_logits), (kept.processed, kept.processed_logits)):
            if logits is not None:
                logprobs |= record_logprobs(seqs, index, logits, rows)
        return [logprobs.get(i) for i in range(len(seqs))]

    def _ban(self, logits: Tensor, seqs: list[Sequence]) -> None:
        """The thinking machine's bans, which the sampler applies itself, in logits that it will not see."""
        for row, seq in enumerate(seqs):
            if seq.thinking is not None:
                ids = banned_ids(seq.thinking.program, int(self._slots.read_state(seq.slot)[State.BAN]))
                logits[row, list(ids)] = BANNED

    def _sampling_batch(self, seqs: list[Sequence]) -> SamplingBatch:
        batch = self._slots.sampling_batch(np.array([seq.slot for seq in seqs]))
        names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
        return replace(batch, **{name: getattr(batch, name).to(self._slots.device) for name in names})
