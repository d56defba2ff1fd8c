"""The kernels of a decode step, one by one: inputs of a model's shape, and what each must read, write and compute."""

from __future__ import annotations

import torch
from torch import Tensor

from s1engine.bench.speed.decode_step import BLOCK_SIZE, EPS, Case, Launch, Step
from s1engine.kernels import native
from s1engine.kernels.attention import paged_attention, plan_attention, workspace_rows
from s1engine.kernels.attention_cpu import paged_attention_cpu
from s1engine.kernels.kv_cache import store_kv
from s1engine.kernels.linear import linear
from s1engine.kernels.packed import PackedWeight, packed_linear, packed_shape
from s1engine.kernels.rope import rope, rope_store_kv
from s1engine.kernels.sampler import SamplingBatch, sample
from s1engine.kernels.slot_layout import MAX_BIASES, RESULT_WIDTH

# Standard deviation of the logits: large enough that some ten tokens hold 95 % of the probability, as in models.
SPREAD = 8
# Temperature, top-p and whether a thinking budget is held to, of the samplers that are measured.
SAMPLERS = {
    "sampler, greedy": (0.0, 1.0, False),
    "sampler, top-p": (1.0, 0.95, False),
    "sampler, top-p, budget": (1.0, 0.95, True),
}


def decode_cases(step: Step) -> list[Case]:
    """In the order of a step; of kernels that every layer runs, one."""
    norm, add_norm = _norms(step)
    qkv, o, gate_up, down, lm_head = _projections(step)
    # The C++ product of gates and what they gate leaves activated.
    activation = [] if _is_native(step) else [_activation(step)]
    layer = [norm, qkv, *_rope(step), _attention(step), o, add_norm, gate_up, *activation, down]
    inputs = [_inputs(step)] if step.triton else []
    # The torch operators sample only; the engine steps the budgets' machines by itself.
    samplers = [_sampler(step, name, *how) for name, how in SAMPLERS.items() if step.triton or not how[2]]
    return [*inputs, *layer, lm_head, *samplers]


def _is_native(step: Step) -> bool:
    return native.AVAILABLE and not step.triton


def _inputs(step: Step) -> Case:
    module, split_keys = step.module("decode_inputs"), step.module("attention").SPLIT_KEYS
    splits = -(-step.context // split_keys)

    def make() -> Launch:
        inputs = module.allocate(step.batch, splits, step.device)
        rows, fields, tables = step.slots(), step.fields(), step.block_tables()
        tokens, counter = step.full(step.batch, step.context), step.full(1, value=-1)

        def launch() -> Tensor:
            module.build_decode_inputs(rows, fields, tokens, tables, BLOCK_SIZE, inputs, counter, split_keys)
            return inputs.positions

        return launch

    read, written = 5 * 4, 3 * 8 + 2 * 4 + splits * 8
    return Case(kernel="decode_inputs", num_bytes=step.batch * (read + written), operations=0, make=make)


def _norms(step: Step) -> tuple[Case, Case]:
    hidden, item = step.shape.hidden, step.dtype.itemsize
    module = step.module("rms_norm")

    def make() -> Launch:
        x, weight = step.normal(step.batch, hidden, dtype=torch.float32), step.normal(hidden)
        return lambda: module.rms_norm(x, weight, EPS)

    def make_add() -> Launch:
        residual, weight = step.normal(step.batch, hidden, dtype=torch.float32), step.normal(hidden)
        x = step.normal(step.batch, hidden)
        return lambda: module.add_rms_norm(residual, x, weight, EPS)

    elements = step.batch * hidden
    return (
        Case(kernel="rms_norm", num_bytes=elements * (4 + item) + hidden * item, operations=0, make=make),
        Case(kernel="add_rms_norm", num_bytes=elements * (8 + 2 * item) + hidden * item, operations=0, make=make_add),
    )


def _projections(step: Step) -> list[Case]:
    shape = step.shape
    heads = shape.heads * shape.head_dim
    sizes = {
        "qkv_proj": (shape.hidden, heads + 2 * shape.kv_heads * shape.head_dim),
        "o_proj": (heads, shape.hidden),
        "gate_up_proj": (shape.hidden, 2 * shape.intermediate),
        "down_proj": (shape.intermediate, shape.hidden),
        "lm_head": (shape.hidden, shape.vocab),
    }

    def case(name: str, inner: int, outer: int) -> Case:
        def make() -> Launch:
            x, weight = step.normal(step.batch, inner), step.normal(outer, inner)
            if not _is_native(step):
                return lambda: linear(x, weight, None, False)
            storage = torch.zeros(packed_shape(outer, inner, step.dtype), dtype=step.dtype)
            PackedWeight(storage, outer, inner).rows(0, outer).copy_(weight)
            return lambda: packed_linear(x, storage, None, outer, gated, name == "lm_head")

        gated = _is_native(step) and name == "gate_up_proj"
        item = step.dtype.itemsize
        written = (outer // 2 if gated else outer) * (4 if _is_native(step) and name == "lm_head" else item)
        num_bytes = inner * outer * item + step.batch * (inner * item + written)
        return Case(kernel=name, num_bytes=num_bytes, operations=2 * step.batch * inner * outer, make=make)

    return [case(name, *size) for name, size in sizes.items()]


def _rope(step: Step) -> list[Case]:
    """One kernel, or of the torch operators two. A cache with no more than what they write is enough."""
    shape, batch, item = step.shape, step.batch, step.dtype.itemsize
    rotated, stored = shape.heads + shape.kv_heads, 2 * shape.kv_heads

    def qkv() -> Tensor:
        return step.normal(batch, shape.heads + 2 * shape.kv_heads, shape.head_dim)

    def cache() -> tuple[Tensor, ...]:
        """Keys, values and the rows' places among them."""
        keys, values = step.normal(2, batch, 1, shape.kv_heads, shape.head_dim)
        return keys, values, torch.randperm(batch, device=step.device)

    def make_both() -> Launch:
        operator = rope_store_kv if _is_native(step) else step.module("rope").rope_store_kv
        x, where = qkv(), cache()
        rotary = step.normal(batch, 2, shape.head_dim // 2, dtype=torch.float32)
        positions = torch.randperm(batch, device=step.device)
        norms = (step.normal(shape.head_dim), step.normal(shape.head_dim)) if shape.qk_norm else (None, None)
        return lambda: operator(x, rotary, positions, *norms, EPS, *where)

    def make_rope() -> Launch:
        x, norm = qkv()[:, :rotated], step.normal(rotated, shape.head_dim) if shape.qk_norm else None
        cos, sin = step.normal(2, batch, shape.head_dim, dtype=torch.float32)
        return lambda: rope(x, cos, sin, norm, EPS)

    def make_store() -> Launch:
        x, where = qkv(), cache()
        k, v = x[:, shape.heads : rotated], x[:, rotated:]

        def launch() -> Tensor:
            store_kv(k, v, *where)
            return where[0]

        return launch

    elements = batch * shape.head_dim * item
    if step.triton or _is_native(step):
        angles = batch * (4 * shape.head_dim + 16)
        moved = 2 * elements * (rotated + shape.kv_heads) + angles
        return [Case(kernel="rope_store_kv", num_bytes=moved, operations=0, make=make_both)]
    angles = batch * 8 * shape.head_dim
    return [
        Case(kernel="rope", num_bytes=2 * elements * rotated + angles, operations=0, make=make_rope),
        Case(kernel="store_kv", num_bytes=2 * elements * stored + batch * 8, operations=0, make=make_store),
    ]


def _attention(step: Step) -> Case:
    shape, batch, context = step.shape, step.batch, step.context
    scale = shape.head_dim**-0.5

    def queries() -> Tensor:
        return step.normal(batch, shape.heads, shape.head_dim)

    def make_triton() -> Launch:
        module, inputs = step.module("attention"), step.module("decode_inputs")
        splits = -(-context // module.SPLIT_KEYS)
        q, caches, tables = queries(), step.caches(), step.block_tables()
        rows, fields, tokens, counter = step.slots(), step.fields(), step.full(batch, context), step.full(1)
        made = inputs.allocate(batch, splits, step.device)
        inputs.build_decode_inputs(rows, fields, tokens, tables, BLOCK_SIZE, made, counter, module.SPLIT_KEYS)
        workspace = module.decode_workspace(batch * splits, shape.heads, shape.head_dim, step.device)
        where = (tables, rows, made.context_lens, made.split_start, made.work, workspace)
        return lambda: module.paged_attention_decode(q, *caches, *where, scale)

    def make_torch() -> Launch:
        q, (k_cache, v_cache), tables = queries(), step.caches(), step.block_tables()
        starts, contexts = list(range(batch + 1)), [context] * batch
        plan = plan_attention(tables, starts, contexts, batch, k_cache)
        workspace = step.normal(2, workspace_rows(plan, BLOCK_SIZE), shape.kv_heads, shape.head_dim)
        where = (tables, torch.tensor(starts, dtype=torch.int32), torch.tensor(contexts, dtype=torch.int32))
        return lambda: paged_attention(q, k_cache, v_cache, *where, plan, workspace, scale)

    def make_native() -> Launch:
        q, caches, tables = queries(), step.caches(), step.block_tables()
        starts, contexts = torch.arange(batch + 1, dtype=torch.int32), step.full(batch, value=context)
        return lambda: paged_attention_cpu(q, *caches, tables, starts, contexts, scale)

    width, keys = shape.heads * shape.head_dim, context * shape.kv_heads * shape.head_dim
    return Case(
        kernel="attention",
        num_bytes=batch * (2 * (width + keys) * step.dtype.itemsize + 4 * step.blocks),
        operations=batch * 4 * width * context,
        make=make_triton if step.triton else make_native if _is_native(step) else make_torch,
    )


def _activation(step: Step) -> Case:
    size, silu_mul = step.shape.intermediate, step.module("activation").silu_mul

    def make() -> Launch:
        gate_up = step.normal(step.batch, 2 * size)
        return lambda: silu_mul(gate_up, False)

    return Case(kernel="silu_mul", num_bytes=3 * step.batch * size * step.dtype.itemsize, operations=0, make=make)


def _sampler(step: Step, name: str, temperature: float, top_p: float, budget: bool) -> Case:
    """The Triton kernels take the LM head's dtype and update the slots; the torch operator takes float32."""
    batch, vocab = step.batch, step.shape.vocab

    def make_triton() -> Launch:
        module = step.module("sampler")
        programs, states = step.machines()
        table = module.SlotTensors(
            fields=step.fields(temperature, top_p, budget),
            programs=programs,
            states=states,
            tokens=step.full(batch, step.context + step.launches + 1),
            bias_ids=step.full(batch, MAX_BIASES),
            bias_values=step.normal(batch, MAX_BIASES, dtype=torch.float32),
        )
        logits, rows, counter = SPREAD * step.normal(batch, vocab), step.slots(), step.full(1)
        workspace = module.sampler_workspace(batch, vocab, step.device)
        results = step.full(1, batch, RESULT_WIDTH)

        def launch() -> Tensor:
            module.sample_slots(logits, None, table, rows, workspace, results, counter)
            return results

        return launch

    def make_torch() -> Launch:
        logits = SPREAD * step.normal(batch, vocab, dtype=torch.float32)
        rows = torch.arange(batch)
        how = SamplingBatch(
            temperature=torch.full((batch,), temperature),
            top_k=torch.zeros(batch, dtype=torch.int64),
            top_p=torch.full((batch,), top_p),
            min_p=torch.zeros(batch),
            seeds=rows,
            positions=torch.full_like(rows, step.context),
            all_greedy=temperature == 0,
            any_top_k=False,
            any_top_p=top_p < 1,
            any_min_p=False,
        )
        return lambda: sample(logits, how)

    item = step.dtype.itemsize if step.triton else 4
    make = make_triton if step.triton else make_torch
    return Case(kernel=name, num_bytes=batch * vocab * item, operations=0, make=make)
