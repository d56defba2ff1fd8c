"""The budget-forcing script in the s1 authors' README, its import line, model path and tensor_parallel_size changed.

The script's calls are kept (simplescaling/s1, Apache-2.0): a generate up to the end of thinking, `NUM_IGNORE` times
more with "Wait" appended to the text, and a last one for the answer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from s1engine import LLM, SamplingParams, ThinkingBudget

MAX_TOKENS_THINKING = 200
SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"


def script(model: LLM, tok: Any, question: str, num_ignore: int) -> tuple[str, str]:
    """Prompt and everything after it, as the script leaves them."""
    start = SYSTEM + "<|im_start|>user\n" + question + "<|im_end|>\n<|im_start|>assistant\n<|im_start|>think"
    prompt = start
    stop_token_ids = tok("<|im_start|><|im_end|>")["input_ids"]
    sampling_params = SamplingParams(
        max_tokens=MAX_TOKENS_THINKING,
        min_tokens=0,
        stop_token_ids=stop_token_ids,
        skip_special_tokens=False,
        temperature=0.0,
    )
    o = model.generate(prompt, sampling_params=sampling_params)
    ignore_str = "Wait"
    max_tokens_thinking_tmp = MAX_TOKENS_THINKING
    for _ in range(num_ignore):
        max_tokens_thinking_tmp -= len(o[0].outputs[0].token_ids)
        if max_tokens_thinking_tmp > 0:
            prompt += o[0].outputs[0].text + ignore_str
            sampling_params = SamplingParams(
                max_tokens=max_tokens_thinking_tmp,
                min_tokens=1,
                stop_token_ids=stop_token_ids,
                skip_special_tokens=False,
                temperature=0.0,
            )
            o = model.generate(prompt, sampling_params=sampling_params)
    prompt += o[0].outputs[0].text
    stop_token_ids = tok("<|im_end|>")["input_ids"]
    sampling_params = SamplingParams(
        max_tokens=300, min_tokens=0, stop_token_ids=stop_token_ids, skip_special_tokens=False, temperature=0.0
    )
    o = model.generate(prompt, sampling_params=sampling_params)
    return start, prompt[len(start) :] + o[0].outputs[0].text


@pytest.fixture(scope="module")
def tiny() -> LLM:
    from s1engine.train.tiny import MODEL_DIR

    return LLM(str(MODEL_DIR), kv_cache_memory=2**26)


@pytest.mark.parametrize("num_ignore", [0, 1, 2])
def test_the_script_and_the_native_form_agree(tiny: LLM, num_ignore: int) -> None:
    """Where re-tokenising changes nothing and the cap does not bind, one call gives the script's token ids.

    The delimiter of a natural end, forced natively, is sampled again by the script's answer call. What remains
    different is listed in docs/budgets.md.
    """
    from s1engine.train.tiny import MODEL_DIR, problems

    tok = AutoTokenizer.from_pretrained(MODEL_DIR)
    compared = 0
    for problem in problems("validation", 12):
        start, text = script(tiny, tok, problem.question, num_ignore)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=400,
            skip_special_tokens=False,
            thinking=ThinkingBudget(ignore_end=num_ignore, extensions=("Wait",), format="s1"),
        )
        native = tiny.generate(start, params, use_tqdm=False)[0].outputs[0]
        script_ids = tok(text)["input_ids"]
        if tok.decode(script_ids) != text or len(script_ids) >= MAX_TOKENS_THINKING:
            continue
        end = native.thinking.events[-1]
        if native.forced_mask[end.position]:
            # Thinking ended by <|im_end|>. Natively an answer follows; the script's last call says it once more.
            assert end.kind == "natural" and script_ids == native.token_ids[: end.position]
            continue
        ids = native.token_ids[:-1] if native.finish_reason == "stop" else native.token_ids
        assert script_ids == ids
        compared += 1
    assert compared >= 6


def test_the_script_runs_on_a_model_that_never_stops(model_folder: Callable[..., Path]) -> None:
    """A random model thinks to the cap: the script's budget arithmetic and the context limit still hold."""
    folder = model_folder("qwen2")
    llm = LLM(str(folder))
    _, text = script(llm, AutoTokenizer.from_pretrained(folder), "How many r in raspberry", 1)
    assert text
