"""What a request asks of the sampler. Names and defaults are vLLM's wherever vLLM has the same thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from s1engine.thinking import ThinkingBudget

LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs")
MAX_SEED, MAX_INT32 = 2**63 - 1, 2**31 - 1
# What float32 can hold, with room for a logit beside it.
LARGE = 1e30


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request.

    n                   samples drawn from the prompt, each with its own seed, forked from one prefill
    temperature         0 is greedy
    top_p, top_k, min_p truncation, applied in the order min_p, top_k (0 or -1: off), top_p; ties at a border stay in
    seed                of sample 0; sample i uses hash(seed, i). None: drawn from the engine's seed
    max_tokens          tokens generated at most, forced ones included; clipped to the context. None: to its end
    min_tokens          until then EOS and the stop ids are banned
    stop                strings that end the request; a string or several
    stop_token_ids      ids that end the request, as EOS does
    ignore_eos          go on after EOS
    presence_penalty, frequency_penalty, repetition_penalty   as in vLLM: over generated tokens, the last over the
                        prompt's too
    logit_bias          {token id: added to its logit}
    bad_words           words that are never generated
    logprobs            None: none; k: the chosen token's and the k most likely ones' at each position
    prompt_logprobs     likewise for the prompt
    logprobs_mode       "raw_logprobs": the model's, before everything; "processed_logprobs": what was sampled from
    skip_special_tokens, include_stop_str_in_output   what the text shows
    thinking            a ThinkingBudget; `thinking_token_budget=N` is short for ThinkingBudget(max_tokens=N)

    Raises ValueError that names the field, the value and what would be valid.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: str = "raw_logprobs"
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    thinking: ThinkingBudget | None = None
    thinking_token_budget: InitVar[int | None] = None
    stop_strings: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self, thinking_token_budget: int | None) -> None:
        if thinking_token_budget is not None:
            if self.thinking is not None:
                raise ValueError("thinking_token_budget and thinking were both given: give one of them")
            object.__setattr__(self, "thinking", ThinkingBudget(max_tokens=thinking_token_budget))
        if self.thinking is not None and not isinstance(self.thinking, ThinkingBudget):
            raise ValueError(f"thinking={self.thinking!r}: must be a ThinkingBudget or None")
        self._check_int("n", self.n, 1)
        if self.max_tokens is not None:
            self._check_int("max_tokens", self.max_tokens, 1)
        self._check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must not exceed max_tokens={self.max_tokens}")
        self._check_int("top_k", self.top_k, -1, MAX_INT32)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, getattr(self, name), 0)
        if self.seed is not None:
            self._check_int("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        self._check_real("temperature", self.temperature, 0.0, LARGE)
        self._check_real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        self._check_real("min_p", self.min_p, 0.0, 1.0)
        self._check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self._check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._check_real("repetition_penalty", self.repetition_penalty, 0.0, LARGE, open_low=True)
        if self.logprobs_mode not in LOGPROBS_MODES:
            raise ValueError(f"logprobs_mode={self.logprobs_mode!r}: must be one of {', '.join(LOGPROBS_MODES)}")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop_strings", tuple(self._check_all("stop", stop, _is_text, "non-empty strings")))
        self._check_all("bad_words", self.bad_words, _is_text, "non-empty strings")
        self._check_all("stop_token_ids", self.stop_token_ids, _is_id, "token ids, integers >= 0")
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias={self.logit_bias!r}: must map token ids to numbers")
        for token, bias in (self.logit_bias or {}).items():
            if not _is_id(token):
                raise ValueError(f"logit_bias={self.logit_bias!r}: token ids must be integers >= 0")
            self._check_real(f"logit_bias[{token}]", bias, -LARGE, LARGE)

    @staticmethod
    def _check_all(name: str, values: Any, is_valid: Callable[[Any], bool], what: str) -> Sequence[Any]:
        if values is None:
            return ()
        if isinstance(values, str) or not isinstance(values, Iterable) or not all(map(is_valid, values)):
            raise ValueError(f"{name}={values!r}: must be a list of {what}")
        return tuple(values)

    @staticmethod
    def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            upper = "" if high is None else f" and <= {high}"
            raise ValueError(f"{name}={value!r}: must be an integer >= {low}{upper}")

    @staticmethod
    def _check_real(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError(f"{name}={value!r}: must be a number")
        if not low <= value <= high or (open_low and value == low) or math.isinf(value):
            raise ValueError(f"{name}={value!r}: must be finite and in {'(' if open_low else '['}{low:g}, {high:g}]")

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
