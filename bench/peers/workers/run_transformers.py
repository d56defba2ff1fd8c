"""transformers' `generate`: one padded batch, its default attention (SDPA) and dynamic cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers


def load(
    model: str, threads: int, cases: list[list[int]], options: dict[str, Any]
) -> tuple[Callable[[list[list[int]], int], list[list[int]]], dict[str, str]]:
    torch.set_num_threads(threads)
    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            made: list[list[int]] = net.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )[:, ids.shape[1] :].tolist()
        return made

    return generate, {"transformers": transformers.__version__, "torch": torch.__version__}
