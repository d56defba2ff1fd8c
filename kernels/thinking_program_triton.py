"""Reading a program row of the thinking state machine on a GPU, over a block of rows: searches and automata.

Every function takes the mask of the rows that it concerns; a load outside of it costs no memory access. What
`s1engine/thinking/table_step.py` has too has the same name here.
"""

import triton
import triton.language as tl

from s1engine.kernels.triton_build import Build, ModelShape
from s1engine.thinking.layout import PROGRAM_WIDTH, Header, TriggerRecord

SEGMENT = tl.constexpr(int(Header.SEGMENT))
TRUNCATE = tl.constexpr(int(Header.TRUNCATE))
ALPHABET_AT = tl.constexpr(int(Header.ALPHABET_AT))
ALPHABET_SIZE = tl.constexpr(int(Header.ALPHABET_SIZE))
SYMBOL_COUNT = tl.constexpr(int(Header.SYMBOL_COUNT))
TRIGGER_NEXT_AT = tl.constexpr(int(Header.TRIGGER_NEXT_AT))
TRIGGER_DEPTH_AT = tl.constexpr(int(Header.TRIGGER_DEPTH_AT))
TRIGGERS_AT = tl.constexpr(int(Header.TRIGGERS_AT))
START_AT = tl.constexpr(int(Header.START_AT))
START_SIZE = tl.constexpr(int(Header.START_SIZE))
SEPARATOR_SIZE = tl.constexpr(int(Header.SEPARATOR_SIZE))
FORCED_CLOSE_AT = tl.constexpr(int(Header.FORCED_CLOSE_AT))
FORCED_CLOSE_SIZE = tl.constexpr(int(Header.FORCED_CLOSE_SIZE))
SECOND_CLOSE_AT = tl.constexpr(int(Header.SECOND_CLOSE_AT))
SECOND_CLOSE_SIZE = tl.constexpr(int(Header.SECOND_CLOSE_SIZE))
EXTENSIONS_AT = tl.constexpr(int(Header.EXTENSIONS_AT))
EXTENSION_COUNT = tl.constexpr(int(Header.EXTENSION_COUNT))
NEWLINE_PAGES_AT = tl.constexpr(int(Header.NEWLINE_PAGES_AT))
NEWLINE_PAGES = tl.constexpr(int(Header.NEWLINE_PAGES))
NEWLINE_BYTES_AT = tl.constexpr(int(Header.NEWLINE_BYTES_AT))
EOS_AT = tl.constexpr(int(Header.EOS_AT))
EOS_SIZE = tl.constexpr(int(Header.EOS_SIZE))

TRIGGER_WIDTH = tl.constexpr(int(TriggerRecord.WIDTH))
TRIGGER_LENGTH = tl.constexpr(int(TriggerRecord.LENGTH))
TRIGGER_IGNORABLE = tl.constexpr(int(TriggerRecord.IGNORABLE))
TRIGGER_COMMON = tl.constexpr(int(TriggerRecord.COMMON))
TRIGGER_REST_AT = tl.constexpr(int(TriggerRecord.REST_AT))
TRIGGER_REST_SIZE = tl.constexpr(int(TriggerRecord.REST_SIZE))

LIST_STEPS = tl.constexpr((PROGRAM_WIDTH - 1).bit_length())  # halvings that a list in a program row needs at most
PAGE_STEPS = tl.constexpr((256).bit_length())  # the same for the ids of a page


@triton.jit
def header(program, field, mask):
    """A column of the header; 0 outside `mask`."""
    return tl.load(program + field, mask=mask, other=0)


@triton.jit
def next_node(program, trigger_state, x, mask):
    """The node of the trigger automaton after `x`, or -(record + 1) where a trigger is complete; 0 outside `mask`."""
    alphabet_at = header(program, ALPHABET_AT, mask)
    alphabet_size = header(program, ALPHABET_SIZE, mask)
    place = find(program, alphabet_at, alphabet_size, x, mask)
    symbol = tl.load(program + alphabet_at + alphabet_size + place, mask=mask & (place >= 0), other=0)
    transitions = program + header(program, TRIGGER_NEXT_AT, mask)
    return tl.load(transitions + trigger_state * header(program, SYMBOL_COUNT, mask) + symbol, mask=mask, other=0)


@triton.jit
def trigger_record(program, node, mask):
    """(length, ignorable, common, rest_at, rest_size) of the record that a negative `node` names."""
    record = program + header(program, TRIGGERS_AT, mask) + (-node - 1) * TRIGGER_WIDTH
    length = tl.load(record + TRIGGER_LENGTH, mask=mask, other=1)
    ignorable = tl.load(record + TRIGGER_IGNORABLE, mask=mask, other=0) != 0
    common = tl.load(record + TRIGGER_COMMON, mask=mask, other=0)
    rest_at = tl.load(record + TRIGGER_REST_AT, mask=mask, other=0)
    rest_size = tl.load(record + TRIGGER_REST_SIZE, mask=mask, other=0)
    return length, ignorable, common, rest_at, rest_size


@triton.jit
def next_extension(program, used, mask):
    """(at, size) of the extension whose turn it is after `used`; size 0 where the program has none."""
    count = header(program, EXTENSION_COUNT, mask)
    place = program + header(program, EXTENSIONS_AT, mask) + 2 * (used % tl.maximum(count, 1))
    return tl.load(place, mask=count > 0, other=0), tl.load(place + 1, mask=count > 0, other=0)


@triton.jit
def is_eos(program, token, mask):
    return find(program, header(program, EOS_AT, mask), header(program, EOS_SIZE, mask), token, mask) >= 0


@triton.jit
def advance(program, at, size, matched, token, mask):
    """Knuth, Morris and Pratt: `size` tokens lie at `at`, their fail table after them."""
    pattern = program + at
    fail = pattern + size
    expected = tl.load(pattern + matched, mask=mask, other=0)
    falls_back = mask & (matched > 0) & (expected != token)
    while tl.max(falls_back.to(tl.int32), axis=0) > 0:
        matched = tl.load(fail + matched, mask=falls_back, other=matched)
        expected = tl.load(pattern + matched, mask=falls_back, other=expected)
        falls_back = falls_back & (matched > 0) & (expected != token)
    return tl.where(expected == token, matched + 1, 0)


@triton.jit
def advance_close(program, at, size, matched, token, mask):
    """The same, where a complete match goes on as its longest proper part."""
    now = advance(program, at, size, matched, token, mask)
    return tl.load(program + at + size + size, mask=mask & (now == size), other=now)


@triton.jit
def ends_line(program, token, mask):
    """Whether `token` is a newline id; False outside `mask`."""
    page = token >> 8
    known = mask & (token >= 0) & (page < header(program, NEWLINE_PAGES, mask))
    pages = program + header(program, NEWLINE_PAGES_AT, mask)
    low_bytes = program + header(program, NEWLINE_BYTES_AT, mask)
    low = unpack(pages, page, 16, known)
    end = unpack(pages, page + 1, 16, known)
    high = end
    for _ in range(PAGE_STEPS):
        middle = (low + high) // 2
        searching = low < high
        less = unpack(low_bytes, middle, 8, searching) < (token & 255)
        low = tl.where(searching & less, middle + 1, low)
        high = tl.where(searching & (less == 0), middle, high)
    inside = low < end
    return inside & (unpack(low_bytes, low, 8, inside) == (token & 255))


@triton.jit
def unpack(words, i, bits: tl.constexpr, mask):
    """Entry i of unsigned numbers of `bits` bits each, from the lowest bits of 32-bit words up."""
    per_word: tl.constexpr = 32 // bits
    word = tl.load(words + i // per_word, mask=mask, other=0)
    return (word >> (bits * (i & (per_word - 1)))) & ((1 << bits) - 1)


@triton.jit
def find(program, at, size, token, mask):
    """The place of `token` in the ascending list of `size` at `at`, or -1; -1 outside `mask`."""
    low = tl.zeros_like(size)
    high = tl.where(mask, size, 0)
    for _ in range(LIST_STEPS):
        middle = (low + high) // 2
        searching = low < high
        less = tl.load(program + at + middle, mask=searching, other=0) < token
        low = tl.where(searching & less, middle + 1, low)
        high = tl.where(searching & (less == 0), middle, high)
    inside = mask & (low < size)
    return tl.where(inside & (tl.load(program + at + low, mask=inside, other=0) == token), low, -1)


def builds(shape: ModelShape) -> list[Build]:
    """None: these functions are part of the kernels that call them."""
    return []
