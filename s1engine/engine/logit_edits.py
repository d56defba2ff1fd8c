"""What is done to logits before sampling, for the few requests that ask for it."""

from __future__ import annotations

import torch
from torch import Tensor

from s1engine.engine.request import Sequence
from s1engine.kernels.penalties import apply_penalties

BANNED = float("-inf")


def edit_logits(logits: Tensor, rows: list[int], seqs: list[Sequence]) -> list[bool]:
    """Apply bias, bans and penalties of `seqs` to their `rows` of float32 logits [R, vocab], in place.

    Returns, for each of `rows`, whether anything was banned.
    """
    banned = []
    for row, seq in zip(rows, seqs, strict=True):
        params = seq.request.params
        for token, bias in (params.logit_bias or {}).items():
            logits[row, token] += bias
        ids = banned_tokens(seq)
        if ids:
            logits[row, ids] = BANNED
        banned.append(bool(ids))
    penalised = [(row, seq) for row, seq in zip(rows, seqs, strict=True) if seq.request.params.has_penalties]
    if penalised:
        _penalise(logits, penalised)
    return banned


def banned_tokens(seq: Sequence) -> list[int]:
    """Ids that a sequence's parameters ban at its next position."""
    request = seq.request
    ids = list(request.min_tokens_banned) if seq.num_output < request.params.min_tokens else []
    for word in request.bad_words:
        # A word of several tokens is avoided at its last one; it is matched on generated tokens only.
        head = list(word[:-1])
        if len(head) <= seq.num_output and seq.tokens[seq.known - len(head) :] == head:
            ids.append(word[-1])
    return ids


def _penalise(logits: Tensor, penalised: list[tuple[int, Sequence]]) -> None:
    vocab = logits.shape[1]
    for _, seq in penalised:
        if seq.output_counts is None:
            output = torch.tensor(seq.tokens[seq.num_prompt :], dtype=torch.int64)
            seq.output_counts = torch.bincount(output, minlength=vocab).to(torch.int32)
        if seq.request.prompt_mask is None:
            mask = torch.zeros(vocab, dtype=torch.bool)
            mask[torch.tensor(seq.request.prompt_token_ids)] = True
            seq.request.prompt_mask = mask
    index = torch.tensor([row for row, _ in penalised])
    params = [seq.request.params for _, seq in penalised]
    chosen = logits[index]
    occurrences = (
        torch.stack([seq.request.prompt_mask for _, seq in penalised if seq.request.prompt_mask is not None]),
        torch.stack([seq.output_counts for _, seq in penalised if seq.output_counts is not None]),
    )
    strengths = (
        torch.tensor([p.repetition_penalty for p in params]),
        torch.tensor([p.presence_penalty for p in params]),
        torch.tensor([p.frequency_penalty for p in params]),
    )
    apply_penalties(chosen, *(tensor.to(logits.device) for tensor in (*occurrences, *strengths)))
    logits[index] = chosen
