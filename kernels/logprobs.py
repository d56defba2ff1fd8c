"""Log probabilities of given tokens and of the most likely ones."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens beyond the wanted ones that are looked at for ties.
_SPARE = 16


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
    if not top_n:
        return chosen.squeeze(1), rank, logprobs[:, :0], tokens.new_empty(len(tokens), 0)
    # topk alone picks any of the tokens that are equal at the border: with some more, all of them are there, mostly.
    values, ids = logprobs.topk(min(top_n + _SPARE, logits.size(1)))
    ids, order = ids.sort(dim=1)
    values, by_value = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    if values.size(1) < logits.size(1):
        for row in torch.nonzero(values[:, top_n - 1] == values[:, -1]).flatten().tolist():
            candidates = torch.nonzero(logprobs[row] >= values[row, -1]).flatten()
            ordered, order = logprobs[row, candidates].sort(descending=True, stable=True)
            values[row, :top_n], ids[row, :top_n] = ordered[:top_n], candidates[order[:top_n]]
    return chosen.squeeze(1), rank, values[:, :top_n], ids[:, :top_n]
