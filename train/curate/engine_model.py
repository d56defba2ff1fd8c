"""A model that answers the questions of a stage through this engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from s1engine import LLM, CompletionOutput, SamplingParams, ThinkingBudget
from s1engine.train.curate.replies import TOO_LONG, Conversation, Reply

OPEN_THINKING = "<think>\n"
"""Put before a text that ends while the model thinks, since the opener may stand in the prompt: no answer is in it."""


class EngineModel:
    """A model through s1engine.LLM, deterministic: a reply does not depend on what else is in the batch.

    thinking: its budget, or None. answer_only: a reply is what follows the thinking, without special tokens;
    otherwise all that the model wrote, special tokens included.
    settings: further arguments of LLM (device, dtype, quantization, max_model_len, max_num_seqs).
    """

    def __init__(
        self,
        model: str,
        *,
        max_tokens: int,
        thinking: ThinkingBudget | None = None,
        answer_only: bool = False,
        **settings: Any,
    ) -> None:
        gc.collect()  # a model before this one goes, and so does the memory that this one's cache is measured against
        torch.cuda.empty_cache()
        self.llm = LLM(model, deterministic=True, **settings)
        self.max_tokens, self.thinking, self.answer_only = max_tokens, thinking, answer_only
        self.tokenizer = self.llm.get_tokenizer()
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError(f"{model}: its tokenizer has no chat template to put a question in; use a chat model")

    def __call__(
        self, conversations: Sequence[Conversation], seeds: Sequence[int], temperature: float
    ) -> Iterator[tuple[int, Reply]]:
        engine = self.llm.engine
        waiting = iter(enumerate(zip(conversations, seeds, strict=True)))
        running: dict[str, int] = {}
        exhausted = False
        try:
            while running or not exhausted:
                room = 2 * engine.config.max_num_seqs - len(running)  # one that ends is followed at once
                batch = list(islice(waiting, room))
                exhausted = len(batch) < room
                for index, (conversation, seed) in batch:
                    prompt = self.tokenizer.apply_chat_template(
                        conversation, tokenize=False, add_generation_prompt=True
                    )
                    ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
                    if len(ids) >= engine.max_model_len:
                        yield index, Reply("", 0, TOO_LONG)
                        continue
                    params = self._params(temperature, seed)
                    running[engine.add_request(f"curate-{index}", {"prompt_token_ids": ids}, params)] = index
                for output in engine.step() if running else ():
                    yield running.pop(output.request_id), self._reply(output.outputs[0])
        finally:
            for request_id in running:
                engine.abort_request(request_id)

    def _params(self, temperature: float, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=self.max_tokens,
            thinking=self.thinking,
            skip_special_tokens=self.answer_only,
        )

    def _reply(self, output: CompletionOutput) -> Reply:
        text, thinking = output.answer if self.answer_only else output.text, output.thinking
        if not self.answer_only and thinking is not None and thinking.stop_reason is None and not output.answer:
            text = OPEN_THINKING + text
        return Reply(text, len(output.token_ids), output.finish_reason or "")
