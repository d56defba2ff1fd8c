"""Log probabilities of given tokens and of the most likely ones."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, tokens: Tensor, top_n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log probabilities under softmax(logits), in float32.

    logits  float32 [R, V]
    tokens  int64 [R], one a row
    top_n   how many of the most likely tokens to return, at most V

    Returns (chosen, rank, top_values, top_ids):
    chosen      float32 [R], of `tokens`
    rank        int64 [R], 1 + the number of tokens that are strictly more likely
    top_values  float32 [R, top_n], descending
    top_ids     int64 [R, top_n], the lower id first among equals
    """
    logprobs = logits.float().log_softmax(1)
    chosen = logprobs.gather(1, tokens.unsqueeze(1))
    rank = torch.count_nonzero(logprobs > chosen, dim=1) + 1
    top_n = min(top_n, logits.size(1))
    top_values = logprobs.new_empty(len(tokens), top_n)
    top_ids = tokens.new_empty(len(tokens), top_n)
    if top_n:
        for row, values, ids in zip(logprobs, top_values, top_ids, strict=True):
            # topk alone picks any of the tokens that are equal at the border.
            # (Not `>=`: a row of NaN has to give some tokens, not none.)
            candidates = torch.nonzero(~(row < row.topk(top_n).values[-1])).flatten()
            ordered, order = row[candidates].sort(descending=True, stable=True)
            values.copy_(ordered[:top_n])
            ids.copy_(candidates[order[:top_n]])
    return chosen.squeeze(1), rank, top_values, top_ids
