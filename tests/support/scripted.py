"""A model that says what it is told, so that the tokens a budget must give can be written down."""

from types import SimpleNamespace
from typing import Any

import torch

VOCAB, EOS = 300, 2


class Scripted:
    """Samples `script[output position]`, whatever came before; 200 + position where the script has ended."""

    def __init__(self, script: list[int], num_prompt: int, vocab_size: int = VOCAB) -> None:
        self.script, self.num_prompt = script, num_prompt
        self.num_rows = 0
        self.config = SimpleNamespace(
            vocab_size=vocab_size,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            dtype=torch.float32,
            max_position_embeddings=512,
            eos_token_ids=(EOS,),
        )

    def __call__(self, token_ids: torch.Tensor, batch: Any, kv_cache: torch.Tensor) -> torch.Tensor:
        self.num_rows += len(token_ids)
        return batch.positions.unsqueeze(1)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        for row, position in enumerate(hidden.flatten().tolist()):
            at = position + 1 - self.num_prompt
            logits[row, self.script[at] if at < len(self.script) else 200 + at] = 30.0
            logits[row, 299] = 20.0  # what is sampled where the script's token is banned
        return logits
