"""The ready-made formats, by name, and the choice among them.

s1: Muennighoff et al. 2025, arXiv 2501.19393, section 3.1 and the evaluation harness of its authors. deepseek-r1: Guo
et al. 2025, arXiv 2501.12948; Qwen3 writes its thinking in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from s1engine.thinking.formats import ThinkingFormat
from s1engine.thinking.text import holds

logger = logging.getLogger(__name__)

_THINK_TAGS: dict[str, Any] = {
    "start": "<think>",
    "triggers": [("</think>", "</think>")],  # and EOS, which from_strings adds
    "forced_close": "</think>\n\nFinal Answer:",
}
_DELIMITERS: dict[str, dict[str, Any]] = {
    "s1": {
        "start": "<|im_start|>think",
        "triggers": [("<|im_start|>", "<|im_start|>answer"), ("<|im_end|>", "<|im_start|>answer")],
        "forced_close": "<|im_start|>answer\nFinal Answer:",
    },
    "deepseek-r1": _THINK_TAGS,
    "qwen3": _THINK_TAGS,
}
FORMAT_NAMES = ("auto", *_DELIMITERS)


def resolve_format(
    format: str | ThinkingFormat, tokenizer: Any = None, *, eos_ids: Sequence[int] | None = None
) -> ThinkingFormat:
    """The format of a name, for a tokenizer.

    "auto" is the `<think>` format where `<think>` is among the tokenizer's special or added tokens, else "s1" where
    `<|im_start|>` is, and logs which it picked.

    Args:
        format: one of `FORMAT_NAMES`; a `ThinkingFormat` is returned as it is.
        tokenizer: a Hugging Face tokenizer; needed for names only.
        eos_ids: all ids that end a request, e.g. of the model's generation config; None for the tokenizer's own.

    Raises:
        ValueError: for another name, and for "auto" where no ready-made format fits.
    """
    if isinstance(format, ThinkingFormat):
        return format
    if format not in FORMAT_NAMES:
        raise ValueError(
            f"thinking format {format!r} is not known: give one of {', '.join(map(repr, FORMAT_NAMES))}, "
            "or a ThinkingFormat"
        )
    name = _detect(tokenizer) if format == "auto" else format
    return ThinkingFormat.from_strings(tokenizer, **_DELIMITERS[name], eos_ids=eos_ids)


def _detect(tokenizer: Any) -> str:
    if holds(tokenizer, "<think>"):
        # The two are the same delimiters; the chat tokens beside them tell the families apart in the log.
        name, why = ("qwen3" if holds(tokenizer, "<|im_start|>") else "deepseek-r1"), "<think>"
    elif holds(tokenizer, "<|im_start|>"):
        name, why = "s1", "<|im_start|>, but no <think>,"
    else:
        raise ValueError(
            'thinking format "auto" fits no tokenizer without <think> or <|im_start|> among its special and added '
            "tokens: give the name of a format, or a ThinkingFormat (ThinkingFormat.from_strings)"
        )
    logger.info("thinking format: auto picked %r, since %s is among the tokenizer's added tokens", name, why)
    return name
