"""What is done to logits before sampling, on a GPU: valid ids, bias, bans and penalties, in registers as they are read.

Tokens are worked on in quads, the four ids that share one call of the random number generator.
"""

import triton
import triton.language as tl

from s1engine.kernels.slot_layout import FIELD_WIDTH, MAX_BIASES, Field
from s1engine.kernels.triton_build import Build, ModelShape
from s1engine.thinking.layout import PROGRAM_WIDTH, STATE_WIDTH, Ban, Header, State

_FIELD_WIDTH = tl.constexpr(FIELD_WIDTH)
_MAX_BIASES = tl.constexpr(MAX_BIASES)
_PROGRAM_WIDTH = tl.constexpr(PROGRAM_WIDTH)
_STATE_WIDTH = tl.constexpr(STATE_WIDTH)
_LENGTH = tl.constexpr(int(Field.LENGTH))
_ACTIVE = tl.constexpr(int(Field.ACTIVE))
_MIN_LENGTH = tl.constexpr(int(Field.MIN_LENGTH))
_HAS_MACHINE = tl.constexpr(int(Field.HAS_MACHINE))
_REPETITION = tl.constexpr(int(Field.REPETITION))
_PRESENCE = tl.constexpr(int(Field.PRESENCE))
_FREQUENCY = tl.constexpr(int(Field.FREQUENCY))
_HAS_PENALTIES = tl.constexpr(int(Field.HAS_PENALTIES))
_NUM_BIASES = tl.constexpr(int(Field.NUM_BIASES))
_NUM_STOPS = tl.constexpr(int(Field.NUM_STOPS))
_STOPS = tl.constexpr(int(Field.STOPS))
_BAN = tl.constexpr(int(State.BAN))
_BAN_TRIGGERS = tl.constexpr(int(Ban.TRIGGERS))
_BAN_EOS = tl.constexpr(int(Ban.EOS))
_BANNED_TRIGGERS_AT = tl.constexpr(int(Header.BANNED_TRIGGERS_AT))
_BANNED_TRIGGERS_SIZE = tl.constexpr(int(Header.BANNED_TRIGGERS_SIZE))
_EOS_AT = tl.constexpr(int(Header.EOS_AT))
_EOS_SIZE = tl.constexpr(int(Header.EOS_SIZE))


@triton.jit
def active_slot(rows, fields, row):
    """The slot of a row, int32; -1 for padding and for a slot that is not active."""
    slot = tl.load(rows + row)
    active = tl.load(fields + slot.to(tl.int64) * _FIELD_WIDTH + _ACTIVE, mask=slot >= 0, other=0)
    return tl.where(active != 0, slot, -1)


@triton.jit
def float_field(fields, slot, column: tl.constexpr):
    return tl.load(fields + slot.to(tl.int64) * _FIELD_WIDTH + column).to(tl.float32, bitcast=True)


@triton.jit
def token_ids(quads):
    """Ids int32 [Q, 4] of the tokens of quads int32 [Q]."""
    return quads[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def stop_bans(fields, slot):
    """How many of the row's stop ids are banned at its next position."""
    field = fields + slot.to(tl.int64) * _FIELD_WIDTH
    early = tl.load(field + _LENGTH) < tl.load(field + _MIN_LENGTH)
    return tl.where(early, tl.load(field + _NUM_STOPS), 0)


@triton.jit
def machine_bans(fields, programs, states, slot):
    """(where in the program row the ids lie that the thinking machine bans at the next position, how many)."""
    program = programs + slot.to(tl.int64) * _PROGRAM_WIDTH
    machine = tl.load(fields + slot.to(tl.int64) * _FIELD_WIDTH + _HAS_MACHINE) != 0
    ban = tl.load(states + slot.to(tl.int64) * _STATE_WIDTH + _BAN, mask=machine, other=0)
    triggers = ban == _BAN_TRIGGERS
    bans = triggers | (ban == _BAN_EOS)
    at = tl.load(program + tl.where(triggers, _BANNED_TRIGGERS_AT, _EOS_AT), mask=bans, other=0)
    size = tl.load(program + tl.where(triggers, _BANNED_TRIGGERS_SIZE, _EOS_SIZE), mask=bans, other=0)
    return at, size


@triton.jit
def raw_logits(logits, valid_words, vocab, row, quads):
    """Logits float32 [Q, 4] of quads [Q] of one row; -inf for ids that are not valid or not in the vocabulary."""
    ids = token_ids(quads)
    raw = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    if valid_words is not None:
        words = tl.load(valid_words + quads // 8, mask=quads * 4 < vocab, other=0)
        raw = tl.where(((words[:, None] >> (ids % 32)) & 1) != 0, raw, -float("inf"))
    return raw


@triton.jit
def penalised_logits(x, fields, prompt_mask, output_counts, vocab, slot, quads):
    """x [Q, 4] after repetition, frequency and presence penalty (penalties.py), where the slot has them."""
    wide = slot.to(tl.int64)
    if tl.load(fields + wide * _FIELD_WIDTH + _HAS_PENALTIES) != 0:
        ids = token_ids(quads)
        counts = tl.load(output_counts + wide * vocab + ids, mask=ids < vocab, other=0)
        words = tl.load(prompt_mask + wide * ((vocab + 31) // 32) + quads // 8, mask=quads * 4 < vocab, other=0)
        in_prompt = ((words[:, None] >> (ids % 32)) & 1) != 0
        factor = tl.where(in_prompt | (counts > 0), float_field(fields, slot, _REPETITION), 1.0)
        x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
        x -= float_field(fields, slot, _FREQUENCY) * counts.to(tl.float32)
        x -= tl.where(counts > 0, float_field(fields, slot, _PRESENCE), 0.0)
    return x


@triton.jit
def edited_logits(source, row, slot, quads):
    """Logits float32 [Q, 4] of quads [Q] of one row, after bias, bans and penalties.

    source  (logits, valid_words, fields, programs, states, bias_ids, bias_values, prompt_mask, output_counts, vocab)
    """
    return edit_logits(source, slot, quads, raw_logits(source[0], source[1], source[9], row, quads))


@triton.jit
def edit_logits(source, slot, quads, x):
    """The same of `raw_logits` x."""
    _, _, fields, programs, states, bias_ids, bias_values, prompt_mask, output_counts, vocab = source
    wide = slot.to(tl.int64)
    field = fields + wide * _FIELD_WIDTH
    ids = token_ids(quads)
    i = 0
    num_biases = tl.load(field + _NUM_BIASES)
    while i < num_biases:
        bias = tl.load(bias_values + wide * _MAX_BIASES + i)
        x = tl.where(ids == tl.load(bias_ids + wide * _MAX_BIASES + i), x + bias, x)
        i += 1
    i = 0
    num_stops = stop_bans(fields, slot)
    while i < num_stops:
        x = tl.where(ids == tl.load(field + _STOPS + i), -float("inf"), x)
        i += 1
    i = 0
    ban_at, num_bans = machine_bans(fields, programs, states, slot)
    while i < num_bans:
        x = tl.where(ids == tl.load(programs + wide * _PROGRAM_WIDTH + ban_at + i), -float("inf"), x)
        i += 1

    if output_counts is not None:
        x = penalised_logits(x, fields, prompt_mask, output_counts, vocab, slot, quads)
    return x


def logits_arguments(shape: ModelShape, penalties: bool) -> tuple[dict[str, str], dict[str, None]]:
    """(signature, constexprs) of the arguments from `rows` to `vocab` that all kernels of the sampler begin with."""
    signature = {
        "rows": "*i32",
        "logits": f"*{shape.dtype}",
        **dict.fromkeys(("valid_words", "fields", "programs", "states", "bias_ids"), "*i32"),
        "bias_values": "*fp32",
    }
    absent = ("prompt_mask", "output_counts")
    if penalties:
        signature |= dict.fromkeys(absent, "*i32")
    return {**signature, "vocab": "i32"}, {} if penalties else dict.fromkeys(absent)


def aligned_arguments(signature: dict[str, str], shape: ModelShape) -> frozenset[str]:
    pointers = {name for name, kind in signature.items() if kind.startswith("*")}
    return frozenset(pointers | ({"vocab"} if shape.vocab % 16 == 0 else set()))


def builds(shape: ModelShape) -> list[Build]:
    """None: these functions are part of the kernels that call them."""
    return []
