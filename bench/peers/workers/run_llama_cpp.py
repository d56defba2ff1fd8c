"""llama.cpp by llama-cpp-python's low-level interface: one llama_decode a step for all sequences, greedy by argmax.

Settings: the threads for single tokens and for batches, flash attention, micro-batches of its default 512 tokens, a KV
cache in its default float16 for exactly the sequences of a case, each in a stream of its own. Other defaults of its own
hold, such as repacked weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np


class Context:
    """Room for `batch` sequences of `length` tokens."""

    def __init__(self, model: Any, batch: int, length: int, threads: int) -> None:
        self.batch, self.length = batch, length
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * -(-length // 256) * 256  # it pads each sequence to that
        params.n_batch = batch * length
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"no context of {batch} sequences of {length} tokens")
        self._tokens = llama_cpp.llama_batch_init(batch * length, 0, 1)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._tokens)
        llama_cpp.llama_free(self._context)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        made = [[token] for token in self._step(prompts, 0)]
        length = len(prompts[0])
        for position in range(length, length + new_tokens - 1):
            for ids, token in zip(made, self._step([ids[-1:] for ids in made], position), strict=True):
                ids.append(token)
        return made

    def _step(self, rows: list[list[int]], start: int) -> list[int]:
        """Tokens of each sequence from position `start` on. Returns the likeliest next token of each."""
        tokens, count = self._tokens, 0
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                tokens.token[count] = token
                tokens.pos[count] = start + offset
                tokens.n_seq_id[count] = 1
                tokens.seq_id[count][0] = sequence
                tokens.logits[count] = offset == len(row) - 1
                count += 1
        tokens.n_tokens = count
        status = llama_cpp.llama_decode(self._context, tokens)
        if status:
            raise RuntimeError(f"llama_decode of {len(rows)} sequences gives {status}")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (len(rows), self._vocab))
        return [int(token) for token in logits.argmax(axis=1)]


def load(
    model: str, threads: int, cases: list[list[int]], options: dict[str, Any]
) -> tuple[Callable[[list[list[int]], int], list[list[int]]], dict[str, str]]:
    llama_cpp.llama_backend_init()
    net = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    if not net:
        raise RuntimeError(f"{model}: it does not load")
    # Contexts are made in the warm-up of a case, one at a time: a KV cache of several cases would not be a case's size.
    kept: list[Context] = []

    def generate(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        batch, length = len(prompts), len(prompts[0]) + new_tokens
        if not kept or kept[0].batch != batch or kept[0].length < length:
            if kept:
                kept.pop().close()
            longest = max([prompt + new for size, prompt, new in cases if size == batch] + [length])
            kept.append(Context(net, batch, longest, threads))
        return kept[0].generate(prompts, new_tokens)

    features = llama_cpp.llama_print_system_info().decode().strip()
    return generate, {"llama-cpp-python": llama_cpp.__version__, "build": features}
