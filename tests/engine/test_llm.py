"""The front door: every way to ask, every field of SamplingParams, and what comes back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from s1engine import LLM, SamplingParams, ThinkingBudget, ThinkingFormat
from s1engine.thinking import Trigger

OUTSIDE = ThinkingFormat(start=[5], triggers=[Trigger([6], [6])], forced_close=[6, 9999])
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def llm(model_folder: Callable[..., Path]) -> LLM:
    return LLM(str(model_folder("qwen2")), max_num_seqs=64, kv_cache_memory=2**24)


@pytest.fixture(scope="module")
def peer(model_folder: Callable[..., Path]) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model_folder("qwen2")).eval()


def peer_logprobs(peer: torch.nn.Module, llm: LLM, ids: list[int]) -> torch.Tensor:
    """Log-softmax [len(ids), vocab] by transformers, with the vocabulary's padding masked."""
    with torch.no_grad():
        logits = peer(torch.tensor([ids])).logits[0].float()
    logits[:, len(llm.get_tokenizer()) :] = -torch.inf
    return torch.log_softmax(logits, -1)


def test_forms_of_prompts(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("The answer is")
    forms = ["The answer is", ids, {"prompt_token_ids": ids}]
    outputs = [llm.generate(form, GREEDY, use_tqdm=False)[0] for form in forms] + llm.generate(forms, GREEDY)
    assert len({tuple(o.outputs[0].token_ids) for o in outputs}) == 1
    assert outputs[0].prompt == "The answer is" and outputs[1].prompt is None
    assert all(o.prompt_token_ids == ids for o in outputs)
    assert outputs[0].outputs[0].text == tokenizer.decode(outputs[0].outputs[0].token_ids, skip_special_tokens=True)


def test_one_params_a_prompt(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 5, 3]
    with pytest.raises(ValueError, match="2 for 3 prompts"):
        llm.generate(["a", "b", "c"], params[:2])


def test_vllm_s_defaults(llm: LLM) -> None:
    assert len(llm.generate("a", SamplingParams(ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids) == 16


def test_padding_of_the_vocabulary_is_never_sampled(llm: LLM) -> None:
    size = len(llm.get_tokenizer())
    assert llm.engine.model.config.vocab_size > size
    params = SamplingParams(temperature=50.0, max_tokens=100, seed=0, ignore_eos=True, n=8)
    sampled = [i for o in llm.generate("a", params, use_tqdm=False)[0].outputs for i in o.token_ids]
    assert len(set(sampled)) > 200, "hot enough to sample anything"
    assert max(sampled) < size


def test_a_bad_prompt_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"prompt 2 of 3: prompt: its \d+ tokens leave no room"):
        llm.generate(["a", "b", "c" * 600], GREEDY)
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.kv.num_free_blocks == llm.engine.kv.num_blocks


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "it has no token"),
        ([5, 9999], {}, "token id 9999 is outside the vocabulary of 416"),
        (3.5, {}, "prompt=3.5"),
        ("a", {"stop_token_ids": [416]}, "stop_token_ids: token id 416"),
        ("a", {"logit_bias": {500: 1.0}}, "logit_bias: token id 500"),
        ("a", {"logprobs": 417}, "logprobs=417"),
        ("a", {"thinking": ThinkingBudget(format="nonsense")}, "nonsense"),
        ("a", {"thinking": ThinkingBudget(ignore_end=1, extensions=[[5000]])}, "thinking.extensions: token id 5000"),
        ("a", {"thinking": ThinkingBudget(format=OUTSIDE)}, "ThinkingFormat.forced_close: token id 9999"),
        ([True, False], {}, "must be a string"),
        ({"prompt_token_ids": [5], "multi_modal_data": 3}, {}, "must be a string"),
        ({"prompt_token_ids": "x"}, {}, "must be a string"),
    ],
)
def test_errors_name_the_field(llm: LLM, prompt: object, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate([prompt], SamplingParams(**params))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 2),
        ("max_tokens", 0),
        ("min_tokens", 17),
        ("seed", 2**64),
        ("stop", [""]),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("logprobs", -1),
        ("logprobs_mode", "raw"),
        ("bad_words", "word"),
        ("thinking", 5),
        ("temperature", 1e39),
        ("top_k", 2**63),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("bad_words", 5),
        ("logit_bias", 5),
        ("logit_bias", {5: 1e39}),
        ("ignore_eos", "no"),
        ("thinking_token_budget", -1),
    ],
)
def test_bad_parameters(field: str, value: object) -> None:
    name = "max_tokens" if field == "thinking_token_budget" else field
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{field: value})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="device='cuda': torch sees no GPU"):
        LLM(str(model_folder("qwen2")), device="cuda")


def test_bad_settings(model_folder: Callable[..., Path]) -> None:
    folder = str(model_folder("qwen2"))
    for field, value in {
        "tensor_parallel_size": 2,
        "block_size": 0,
        "dtype": "int8",
        "device": "cuda:7",
        "attention_backend": "magic",
        "gpu_memory_utilization": 0.0,
        "max_model_len": 10**6,
        "kv_cache_memory": 10,
        "deterministic": "no",
        "thinking_format": "nonsense",
    }.items():
        with pytest.raises(ValueError, match=field):
            LLM(folder, **{field: value})
    for backend in ("flash-attn", "magic"):
        with pytest.raises(ValueError, match=f"attention_backend='{backend}'"):
            LLM(folder, device="cpu", attention_backend=backend)
    with pytest.raises(ValueError, match="max_model_len=400: the KV cache holds"):
        LLM(folder, max_model_len=400, kv_cache_memory=2**16)
    with pytest.raises(TypeError, match="swap_space"):
        LLM(folder, swap_space=4)


def test_stop_strings_across_tokens(llm: LLM) -> None:
    text = llm.generate("The answer", SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0].outputs[0].text
    stop = text[9:14]
    for include in (False, True):
        params = SamplingParams(temperature=0, max_tokens=40, stop=[stop, "\0"], include_stop_str_in_output=include)
        output = llm.generate("The answer", params, use_tqdm=False)[0].outputs[0]
        cut = text.index(stop)
        assert output.text == text[: cut + (len(stop) if include else 0)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert len(llm.get_tokenizer().decode(output.token_ids)) >= cut + len(stop)


def test_stop_tokens_and_min_tokens(llm: LLM) -> None:
    free = llm.generate("The", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)[
        0
    ].outputs[0]
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=[stop], ignore_eos=True)
    output = llm.generate("The", params, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == free.token_ids[: first + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    tokenizer = llm.get_tokenizer()
    assert output.text == tokenizer.decode(output.token_ids[:-1], skip_special_tokens=True)
    params = SamplingParams(temperature=0, max_tokens=20, min_tokens=10, stop_token_ids=[stop], ignore_eos=True)
    output = llm.generate("The", params, use_tqdm=False)[0].outputs[0]
    assert stop not in output.token_ids[:10]
    assert output.banned_mask == [i < 10 for i in range(len(output.token_ids))]


def test_eos_ends_and_is_left_out_of_the_text(llm: LLM) -> None:
    eos = llm.get_tokenizer().eos_token_id
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={eos: 1000.0}, skip_special_tokens=False)
    output = llm.generate("The", params, use_tqdm=False)[0].outputs[0]
    assert (output.token_ids, output.text, output.finish_reason, output.stop_reason) == ([eos], "", "stop", None)
    on = SamplingParams(temperature=0, max_tokens=9, logit_bias={eos: 1000.0}, ignore_eos=True)
    assert llm.generate("The", on, use_tqdm=False)[0].outputs[0].token_ids == [eos] * 9


def test_bad_words(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    free = llm.generate("The", params, use_tqdm=False)[0].outputs[0]
    first = {t: i for i, t in reversed(list(enumerate(free.token_ids)))}
    # A token that is a word of its own, and a pair of tokens that is one.
    whole = next(t for t in first if tokenizer.encode(tokenizer.decode([t])) == [t] and first[t] > 0)
    output = _without(llm, tokenizer.decode([whole]))
    assert whole not in output.token_ids
    assert output.token_ids[: first[whole]] == free.token_ids[: first[whole]]
    assert all(output.banned_mask)
    pairs = list(zip(free.token_ids, free.token_ids[1:], strict=False))
    at = next(i for i, p in enumerate(pairs) if tokenizer.encode(tokenizer.decode(p).lstrip()) == list(p))
    output = _without(llm, tokenizer.decode(pairs[at]))
    assert output.token_ids[: at + 1] == free.token_ids[: at + 1] and output.token_ids[at + 1] != free.token_ids[at + 1]
    assert output.banned_mask[at + 1] and not all(output.banned_mask)
    assert pairs[at] not in list(zip(output.token_ids, output.token_ids[1:], strict=False))


def _without(llm: LLM, word: str) -> Any:
    params = SamplingParams(temperature=0, max_tokens=40, bad_words=[word], ignore_eos=True)
    return llm.generate("The", params, use_tqdm=False)[0].outputs[0]


def test_logprobs_equal_transformers(llm: LLM, peer: torch.nn.Module) -> None:
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=10, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    output = llm.generate("The answer is so", params, use_tqdm=False)[0]
    completion = output.outputs[0]
    prompt = output.prompt_token_ids
    want = peer_logprobs(peer, llm, prompt + completion.token_ids)
    assert output.prompt_logprobs is not None and completion.logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    entries = output.prompt_logprobs[1:] + completion.logprobs
    tokens = prompt[1:] + completion.token_ids
    for row, (entry, token) in enumerate(zip(entries, tokens, strict=True)):
        assert entry is not None
        top = 2 if row < len(prompt) - 1 else 3
        assert len(entry) in (top, top + 1)
        assert set(want[row].topk(top).indices.tolist()) | {token} == set(entry)
        for other, logprob in entry.items():
            assert logprob.logprob == pytest.approx(want[row, other].item(), abs=1e-4)
            assert logprob.rank == int((want[row] > want[row, other]).sum()) + 1
            assert logprob.decoded_token == llm.get_tokenizer().decode([other])
    total = sum(e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total)


def test_processed_logprobs(llm: LLM, peer: torch.nn.Module) -> None:
    params = SamplingParams(
        temperature=0.5, top_k=4, seed=4, max_tokens=6, logprobs=10, logprobs_mode="processed_logprobs", ignore_eos=True
    )
    output = llm.generate("The answer", params, use_tqdm=False)[0]
    completion = output.outputs[0]
    raw = peer_logprobs(peer, llm, output.prompt_token_ids + completion.token_ids)
    for i, entry in enumerate(completion.logprobs or []):
        row = raw[len(output.prompt_token_ids) - 1 + i]
        kept = row.topk(4)
        want = dict(zip(kept.indices.tolist(), torch.log_softmax(kept.values / 0.5, -1).tolist(), strict=True))
        finite = {t: e.logprob for t, e in entry.items() if e.logprob > -1e30}
        assert finite == pytest.approx(want, abs=1e-4)
        assert completion.token_ids[i] in want


def test_score(llm: LLM, peer: torch.nn.Module) -> None:
    tokenizer = llm.get_tokenizer()
    prompts, completions = (
        ["The answer is", tokenizer.encode("so")],
        [" 42.\n", tokenizer.encode("a long completion" * 9)],
    )
    scores = llm.score(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        p = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        c = tokenizer.encode(completion) if isinstance(completion, str) else completion
        want = peer_logprobs(peer, llm, p + c)[len(p) - 1 : -1].gather(1, torch.tensor(c)[:, None]).flatten()
        assert score == pytest.approx(want.tolist(), abs=1e-4)
    assert not llm.engine.has_unfinished_requests()
    with pytest.raises(ValueError, match="completions: 1 for 2 prompts"):
        llm.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="every prompt and every completion"):
        llm.score(["a"], [""])


def test_a_bad_stream_is_refused_at_once(llm: LLM) -> None:
    with pytest.raises(ValueError, match="leave no room"):
        llm.stream("c" * 600)
    llm.stream("never started")
    assert not llm.engine.has_unfinished_requests()


def test_prompt_logprobs_do_not_depend_on_chunks_or_cache(model_folder: Callable[..., Path]) -> None:
    prompt = "The answer is 42. Wait, let me think again."
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1)
    seen = []
    for chunk in (8192, 5):
        llm = LLM(str(model_folder("qwen2")), max_num_batched_tokens=chunk, block_size=4, max_num_seqs=4)
        for _ in range(2):
            output = llm.generate(prompt, params, use_tqdm=False)[0]
            assert output.num_cached_tokens == 0
            seen.append([next(iter(e.values())).logprob for e in output.prompt_logprobs[1:]])
    assert all(s == pytest.approx(seen[0], abs=1e-5) for s in seen)


def test_stream_grows_into_what_generate_gives(llm: LLM) -> None:
    params = SamplingParams(temperature=1.2, seed=9, max_tokens=60, ignore_eos=True, logprobs=0)
    want = llm.generate("Hmm", params, use_tqdm=False)[0].outputs[0]
    text, tokens = "", 0
    for output in llm.stream("Hmm", params):
        completion = output.outputs[0]
        assert completion.text.startswith(text)
        assert len(completion.token_ids) >= tokens
        assert "\ufffd" not in completion.text[:-1] or "\ufffd" in want.text
        text, tokens = completion.text, len(completion.token_ids)
    assert output.finished
    assert (completion.text, completion.token_ids) == (want.text, want.token_ids)
    # Seeds 1 to n of a stream differ no less than those of generate.
    *_, last = llm.stream("Hmm", SamplingParams(n=2, temperature=1.2, seed=9, max_tokens=60, ignore_eos=True))
    assert last.outputs[0].token_ids == want.token_ids != last.outputs[1].token_ids


def test_closing_a_stream_aborts(llm: LLM) -> None:
    stream = llm.stream("Hmm", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.kv.num_free_blocks == llm.engine.kv.num_blocks


def test_a_stream_goes_on_while_others_generate(llm: LLM) -> None:
    params = SamplingParams(temperature=1.2, seed=9, max_tokens=30, ignore_eos=True)
    want = llm.generate("Hmm", params, use_tqdm=False)[0].outputs[0].token_ids
    stream = llm.stream("Hmm", params)
    next(stream)
    longer = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    assert len(llm.generate(["a", "b"], longer, use_tqdm=False)) == 2
    *_, last = stream
    assert last.finished and last.outputs[0].token_ids == want


def test_chat(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    turns = [{"role": "user", "content": "so?"}]
    text = "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n"
    output = llm.chat(turns, GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids == tokenizer.encode(text)
    assert [o.prompt_token_ids for o in llm.chat([turns, turns], GREEDY)] == [output.prompt_token_ids] * 2
    without = llm.chat(turns, GREEDY, chat_template_kwargs={"add_generation_prompt": False})[0]
    assert without.prompt_token_ids == tokenizer.encode(text.removesuffix("<|im_start|>assistant\n"))


def test_thinking_is_told_apart_without_a_budget(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    output = llm.generate("<think>so", SamplingParams(temperature=0, max_tokens=10, ignore_eos=True), use_tqdm=False)[0]
    assert output.outputs[0].thinking is None  # the prompt does not end in the marker
    params = SamplingParams(
        temperature=0, max_tokens=10, ignore_eos=True, logit_bias={tokenizer.encode("</think>")[0]: 20}
    )
    closing = llm.generate("<think>", params, use_tqdm=False)[0].outputs[0]
    assert closing.thinking is not None and closing.thinking.stop_reason == "natural"
    assert closing.thinking.num_tokens == 0
    opened = llm.generate("<think>", GREEDY, use_tqdm=False)[0].outputs[0]
    assert opened.thinking is not None and opened.thinking.stop_reason is None and opened.answer == ""


def test_a_budget_end_to_end(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    budget = ThinkingBudget(max_tokens=20, ignore_end=1, min_answer_tokens=5)
    params = SamplingParams(temperature=0, max_tokens=60, thinking=budget, skip_special_tokens=False, ignore_eos=True)
    output = llm.generate("a <think>\n", params, use_tqdm=False)[0].outputs[0]
    thinking = output.thinking
    assert thinking is not None and thinking.num_tokens <= 20
    close = tokenizer.decode([t for t, f in zip(output.token_ids, output.forced_mask, strict=True) if f][-2:])
    assert output.text.endswith(output.answer) and close
    assert thinking.text + output.text[len(thinking.text) :] == output.text
    short = SamplingParams(temperature=0, max_tokens=60, thinking_token_budget=20, ignore_eos=True)
    assert llm.generate("a <think>\n", short, use_tqdm=False)[0].outputs[0].thinking is not None


def test_penalties_equal_a_loop(llm: LLM, peer: torch.nn.Module) -> None:
    params = SamplingParams(
        temperature=0,
        max_tokens=24,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
        ignore_eos=True,
    )
    output = llm.generate("The answer is so", params, use_tqdm=False)[0]
    ids = list(output.prompt_token_ids)
    prompt = set(ids)
    generated: list[int] = []
    for _ in range(24):
        with torch.no_grad():
            logits = peer(torch.tensor([ids])).logits[0, -1].double()
        logits[len(llm.get_tokenizer()) :] = -torch.inf
        for t in prompt | set(generated):
            logits[t] = logits[t] / 1.3 if logits[t] > 0 else logits[t] * 1.3
        for t in set(generated):
            logits[t] -= 0.6 + 0.4 * generated.count(t)
        generated.append(int(logits.argmax()))
        ids.append(generated[-1])
    assert output.outputs[0].token_ids == generated
