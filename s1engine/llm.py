"""The front door: LLM.generate, chat, stream, sweep, score. Names are vLLM's, so that its offline scripts run here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from tqdm import tqdm

from s1engine.config import EngineConfig
from s1engine.engine.llm_engine import LLMEngine
from s1engine.engine.request import Request
from s1engine.models import CausalLM
from s1engine.outputs import RequestOutput, SweepOutput
from s1engine.params import SamplingParams
from s1engine.thinking import ThinkingBudget, ThinkingFormat


class LLM:
    """A model to generate with.

    model: a local folder or a hub id of a Qwen2/2.5, Qwen3 or Llama model, or one that is loaded already. Parameters of
    the latter may be changed in place between calls, as a trainer does; update_weights({}) then forgets what was cached
    with the old ones. The settings are those of EngineConfig; dtype "auto" is the checkpoint's, device "auto" the best
    that this machine has.

        llm = LLM("path/to/model")
        llm.generate("1 + 1 =", SamplingParams(temperature=0, thinking=ThinkingBudget(max_tokens=100)))
    """

    def __init__(
        self,
        model: str | CausalLM,
        *,
        tokenizer: Any = None,
        dtype: str = "auto",
        device: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        block_size: int = 16,
        kv_cache_memory: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        attention_backend: str = "auto",
        tensor_parallel_size: int = 1,
        quantization: str | None = None,
        deterministic: bool = False,
        thinking_format: str | ThinkingFormat = "auto",
        seed: int = 0,
    ) -> None:
        config = EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            kv_cache_memory=kv_cache_memory,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            attention_backend=attention_backend,
            tensor_parallel_size=tensor_parallel_size,
            quantization=quantization,
            deterministic=deterministic,
            thinking_format=thinking_format,
            seed=seed,
        )
        self.engine = LLMEngine(model, tokenizer=tokenizer, dtype=dtype, device=device, config=config)
        self._count = 0
        self._streams: dict[str, RequestOutput | None] = {}  # open streams, and the newest that they have not yielded

    def get_tokenizer(self) -> Any:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate from one prompt or several, in the order given.

        prompts: a string, a list of token ids, {"prompt_token_ids": [...]}, or a list of those.
        sampling_params: one for all, or one a prompt. A ValueError for any of them leaves nothing running.
        """
        return self._run(_as_prompts(prompts), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate the next turn of a conversation (a list of {"role", "content"}) or of several (a list of lists)."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ValueError("chat: the model has no tokenizer; pass tokenizer=...")
        if tokenizer.chat_template is None:
            raise ValueError("chat: the tokenizer has no chat template; build the prompt and call generate")
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        options = {"add_generation_prompt": True, **(chat_template_kwargs or {})}
        texts = [tokenizer.apply_chat_template(turns, tokenize=False, **options) for turns in conversations]
        # The template writes what has to stand at the beginning of a text: nothing may be added to it.
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        prompts = [{"prompt": text, "prompt_token_ids": i} for text, i in zip(texts, ids, strict=True)]
        return self._run(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """The request as it grows: cumulative, one output a step that shows something new; the last one is finished.

        Tokens that a rewind may take back are held back. Closing the iterator aborts the request. Bad input raises
        ValueError here, before the first output is asked for.
        """
        params = sampling_params or SamplingParams()
        return self._stream(self.engine.admission.request(prompt, params, self._next_id(), stream=True))

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        request_id = request.request_id
        self.engine.core.add(request)
        self._streams[request_id] = None
        shown: list[tuple[int, str | None]] = []
        finished = False
        try:
            while not finished:
                output = self._streams[request_id]
                self._streams[request_id] = None
                if output is None:
                    self._step()
                    continue
                finished = output.finished
                now = [(len(o.token_ids), o.finish_reason) for o in output.outputs]
                if now != shown or finished:
                    shown = now
                    yield output
        finally:
            self.engine.abort_request(request_id)
            del self._streams[request_id]

    def sweep(
        self,
        prompts: Any,
        *,
        budgets: Sequence[int | None] = (),
        ignore_ends: Sequence[int] = (),
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[SweepOutput]:
        """What each prompt gives under several thinking budgets, which share all that they have in common.

        budgets: caps on thinking tokens (None: no cap). ignore_ends: how many ends of thinking to ignore. Each is a
        branch that differs from sampling_params.thinking (default: ThinkingBudget()) in that number alone, the caps
        first; and gives, token for token, what `generate` with that budget and seed gives if deterministic=True.

        One sequence a sample decodes for all branches until one of them would write another token, which then goes on
        by itself, sharing the keys and values so far (s1, arXiv 2501.19393, section 3.1: both directions of budget
        forcing from one trace). Raises ValueError as generate does.
        """
        if not budgets and not ignore_ends:
            raise ValueError("sweep: it has no branch; give budgets (caps on thinking tokens) or ignore_ends")
        prompts = _as_prompts(prompts)
        params = _one_a_prompt(prompts, sampling_params)
        sweeps = []
        for one in params:
            if one.prompt_logprobs is not None:
                raise ValueError(f"prompt_logprobs={one.prompt_logprobs}: a sweep has none; ask score or generate")
            base = one.thinking or ThinkingBudget()
            branches = [replace(base, max_tokens=cap) for cap in budgets]
            sweeps.append((*branches, *(replace(base, ignore_end=ends) for ends in ignore_ends)))
        return cast(list[SweepOutput], self._run(prompts, params, use_tqdm, sweeps=sweeps))

    def update_weights(self, named_tensors: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        """Overwrite the model's parameters in place, for a trainer in the same process; cached prefixes are forgotten.

        named_tensors: a state dict, or pairs of a checkpoint's names and tensors; what is not named stays as it is.
        Raises ValueError, having changed nothing, for names or shapes that do not fit, and while streams are open.
        """
        self.engine.update_weights(dict(named_tensors))

    def sleep(self) -> int:
        """Give the KV cache's memory back, as between two rounds of rollouts; `wake_up` before the next request.

        Returns the cache's bytes. Cached prefixes are forgotten. Raises ValueError while streams are open.
        """
        return self.engine.sleep()

    def wake_up(self) -> None:
        """Take the memory again that `sleep` gave back."""
        self.engine.wake_up()

    def score(self, prompts: Any, completions: Any) -> list[list[float]]:
        """Log-probabilities (natural, of the raw distribution) of each completion's tokens after its prompt.

        prompts, completions: as many of one as of the other, each a string or a list of token ids; a completion's text
        is tokenised by itself.
        """
        prompts, completions = _as_prompts(prompts), _as_prompts(completions)
        if len(prompts) != len(completions):
            raise ValueError(f"completions: {len(completions)} for {len(prompts)} prompts; give one a prompt")
        tokenize = self.engine.admission.tokenize
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        starts, whole = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt_ids = tokenize(prompt)[1]
            if isinstance(completion, str) and self.engine.tokenizer is not None:
                completion_ids = self.engine.tokenizer.encode(completion, add_special_tokens=False)
            else:
                completion_ids = tokenize(completion, "completion")[1]
            if not prompt_ids or not completion_ids:
                raise ValueError("score: every prompt and every completion needs at least one token")
            starts.append(len(prompt_ids))
            whole.append(prompt_ids + completion_ids)
        scores = []
        for start, output in zip(starts, self._run(whole, params, use_tqdm=False, score_only=True), strict=True):
            entries = output.prompt_logprobs or []
            ids = output.prompt_token_ids
            scores.append([entry[i].logprob for i, entry in zip(ids[start:], entries[start:], strict=True) if entry])
        return scores

    def _run(
        self,
        prompts: list[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        score_only: bool = False,
        sweeps: Sequence[tuple[ThinkingBudget, ...] | None] | None = None,
    ) -> list[RequestOutput]:
        all_params = _one_a_prompt(prompts, sampling_params)
        all_sweeps = sweeps or [None] * len(prompts)
        ids: list[str] = []
        outputs: dict[str, RequestOutput] = {}
        try:
            for number, (prompt, params, sweep) in enumerate(zip(prompts, all_params, all_sweeps, strict=True)):
                try:
                    name = self._next_id()
                    ids.append(self.engine.add_request(name, prompt, params, score_only=score_only, sweep=sweep))
                except ValueError as error:
                    where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
                    raise ValueError(f"{where}{error}") from None
            with tqdm(total=len(ids), desc="generate", unit="req", disable=not use_tqdm, leave=False) as bar:
                tokens = 0
                while len(outputs) < len(ids):
                    for output in self._step():
                        outputs[output.request_id] = output
                        if isinstance(output, SweepOutput):
                            tokens += output.num_generated_tokens
                        else:
                            tokens += sum(len(o.token_ids) for o in output.outputs)
                        bar.set_postfix_str(
                            f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s", refresh=False
                        )
                        bar.update()
        finally:
            # After an error (or an interrupt) nothing of this call may go on in the next one.
            for request_id in ids:
                self.engine.abort_request(request_id)
        return [outputs[request_id] for request_id in ids]

    def _step(self) -> list[RequestOutput]:
        """One step for everything that runs; what belongs to open streams goes to them, the rest is returned."""
        rest = []
        for output in self.engine.step():
            if output.request_id in self._streams:
                self._streams[output.request_id] = output
            else:
                rest.append(output)
        return rest

    def _next_id(self) -> str:
        self._count += 1
        return f"llm-{self._count}"


def _one_a_prompt(
    prompts: list[Any], params: SamplingParams | Sequence[SamplingParams] | None
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise ValueError(f"sampling_params: {len(params)} for {len(prompts)} prompts; one, or one a prompt")
    return params


def _as_prompts(prompts: Any) -> list[Any]:
    """One prompt or several, as a list."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts={prompts!r}: must be a string, a list of token ids, or a list of those")
    prompts = list(prompts)
    if prompts and all(isinstance(i, int) for i in prompts):
        return [prompts]
    return prompts
