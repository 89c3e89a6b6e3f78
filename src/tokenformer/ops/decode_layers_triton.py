"""All layers of one token in a single Triton kernel, for one sequence, through which the weights stream evenly.

One program runs on each multiprocessor. The weights are cut into chunks of ROWS x d numbers in the order of use, and
chunk g belongs to program g modulo their number: so each program reads a stream of its own that does not depend on
anything computed, and the loop over it, pipelined by Triton, has STAGES chunks on the way at all times. What depends
on other programs is only the vector that a chunk is multiplied with. A layer has six phases (keys and values of the
projections, of attention's output and of the feed-forward layer); before its first chunk of a phase a program waits
until all chunks of the phase before are counted as done. Meanwhile its memory requests go on.

That nobody waits for a program that does not run is guaranteed by a cooperative launch. Should a wait have no end
nevertheless, the residual stream becomes NaN and all pass.

Axis letters: d hidden, h heads, e head size, n parameter tokens, T capacity of the cache, s splits of it, L layers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenformer.ops.decode_attention_triton import _attend_part, _cached
from tokenformer.ops.decode_layers_vectors_triton import _normed, _spread, _weights
from tokenformer.ops.decode_vectors_triton import _joined_attention
from tokenformer.ops.pattention_triton_math import GELU, GELU_L2_NORM, before_statistics

WHOLE = tl.constexpr(0)  # what one launch computes
ATTENTION = tl.constexpr(1)
PRODUCTS = tl.constexpr(2)


@triton.jit
def _wait(counter, target, poisoned):
    """Until ``counter`` has reached ``target``; what others wrote before they counted can then be read. After some
    20 ms NaN goes into ``poisoned``, and the counter becomes so large that all pass."""
    tl.inline_asm_elementwise(
        """{ .reg .pred stop; .reg .b32 thread, seen, left;
        mov.u32 thread, %tid.x;
        setp.ne.u32 stop, thread, 0;
        @stop bra DONE;
        mov.u32 left, 40000;
        AGAIN:
        ld.acquire.gpu.global.u32 seen, [$1];
        setp.ge.s32 stop, seen, $2;
        @stop bra DONE;
        sub.u32 left, left, 1;
        setp.ne.u32 stop, left, 0;
        @stop bra AGAIN;
        mov.u32 left, 0x7FC00000;
        st.global.u32 [$3], left;
        atom.release.gpu.global.max.s32 left, [$1], 1073741824;
        DONE:
        bar.sync 0;
        mov.u32 $0, 0; }""",
        "=r,l,r,l",
        [counter.to(tl.int64), target, poisoned.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _count(counter, number):
    """Add ``number`` to ``counter`` when all threads have written what they had to; others may then read it."""
    tl.inline_asm_elementwise(
        """{ .reg .pred first; .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        bar.sync 0;
        @first red.release.gpu.global.add.s32 [$1], $2;
        mov.u32 $0, 0; }""",
        "=r,l,r",
        [counter.to(tl.int64), number],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["begin", "end", "turns"])
def layers(
    stream,
    space,
    counters,
    key_cache,
    value_cache,
    cosine,
    sine,
    lengths,
    starts,
    positions,
    begin,
    end,
    turns,
    capacity,
    d,
    more_qkv,
    more_proj,
    more_ffn,
    head_size,
    scale,
    layer_norm_eps,
    tau_qkv,
    tau_proj,
    tau_ffn,
    norm_eps,
    KIND: tl.constexpr,
    TANH: tl.constexpr,
    EXACT: tl.constexpr,
    SPLITS: tl.constexpr,
    ROTARY: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
    TURNS: tl.constexpr,
    PART: tl.constexpr,
    MEET: tl.constexpr,
):
    """Chunks ``begin`` to ``end`` of the stream.

    ``stream`` [chunks, ROWS, d]: of each layer the keys [3, n, d] and values [3, d, n] of the projections (these in the
    order of :func:`~tokenformer.ops.decode_layers.values_order`), keys [n, d] and values [d, n] of attention's output
    and of the feed-forward layer. Every n is d times two to the power of
    ``more``, up to ROWS; d is PIECE times PIECES. ``space``,
    float32, holds one after another: the residual stream [d], queries, keys and values [3, d], the scores of the three
    Pattentions, attention's parts [s, h, e] and their statistics [s, h]. ``counters`` [2] int32, zero: chunks done,
    parts of attention done. The caches are [L, h, T, e]; the rest is as for
    :func:`~tokenformer.ops.decode_attention_triton.attend`.

    ``turns``: chunks of a program (TURNS in the interpreter, which takes no other bounds of a range). MEET: programs
    wait for each other. Without it a launch takes chunks of one phase, and attention (PART) is one of its own.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    heads = d // head_size
    n_qkv, n_proj, n_ffn = d << more_qkv, d << more_proj, d << more_ffn
    first = 3 * n_qkv // ROWS  # chunks of a layer up to the end of each phase
    second = first + 3 * n_qkv // ROWS
    third = second + n_proj // ROWS
    fourth = third + n_proj // ROWS
    fifth = fourth + n_ffn // ROWS
    chunks = fifth + n_ffn // ROWS
    qkv = d  # places in space
    qkv_scores = qkv + 3 * d
    proj_scores = qkv_scores + 3 * n_qkv
    ffn_scores = proj_scores + n_proj
    attended = ffn_scores + n_ffn
    statistics = attended + SPLITS * d
    # a third of the programs has one projection's values, and of the chunks left after full turns
    share = programs // 3
    full = (second - first) // programs
    left = first // 3 - full * share
    row, column = tl.arange(0, ROWS), tl.arange(0, PIECE)
    offsets = row[:, None] * d + column[None, :]
    vector = ()
    for _ in tl.static_range(PIECES):
        vector = vector + (tl.zeros((ROWS, PIECE), tl.float32),)  # noqa: RUF005
    begin_turn = begin // programs
    layer = (begin_turn * programs + program) // chunks
    inner = (begin_turn * programs + program) % chunks
    turn_of_phase = 0
    for turn in tl.range(0, turns if TURNS is None else TURNS, num_stages=STAGES):
        chunk = (begin_turn + turn) * programs + program
        is_there = (chunk >= begin) & (chunk < end)
        base = stream + chunk.to(tl.int64) * (ROWS * PIECE * PIECES)
        tiles = ()
        for j in tl.static_range(PIECES):
            tiles = tiles + (tl.load(base + offsets + j * PIECE, mask=is_there),)  # noqa: RUF005
        phase = (inner >= first).to(tl.int32) + (inner >= second) + (inner >= third)
        phase += (inner >= fourth).to(tl.int32) + (inner >= fifth)
        start, stop = 0, first
        more, tau = 0, tau_qkv  # a row of the matrix is 2 to the power of ``more`` rows of chunks
        source, target = 0, qkv_scores
        if phase == 1:
            start, stop, source, target, more = first, second, qkv_scores, qkv, more_qkv
        elif phase == 2:
            start, stop, source, target = second, third, attended, proj_scores
        elif phase == 3:
            start, stop, source, target, more, tau = third, fourth, proj_scores, 0, more_proj, tau_proj
        elif phase == 4:
            start, stop, target = fourth, fifth, ffn_scores
        elif phase == 5:
            start, stop, source, target, more, tau = fifth, chunks, ffn_scores, 0, more_ffn, tau_ffn
        is_keys = phase % 2 == 0
        number = inner - start  # of this chunk in its phase
        rows = ROWS >> more
        out_row = number * rows
        is_new = number < programs
        turn_of_phase = tl.where(is_new, 0, turn_of_phase + 1)
        if phase == 1:
            rank = number - turn_of_phase * programs
            projection = (rank >= share).to(tl.int32) + (rank >= 2 * share)
            within = turn_of_phase * share + rank - projection * share
            if turn_of_phase == full:
                last = (rank >= left).to(tl.int32) + (rank >= 2 * left)
                is_new = is_new | (last != projection)
                projection = last
                within = full * share + rank - last * left
            out_row = projection * d + within * rows
            source += projection * n_qkv
        if is_new & is_there:
            if phase == 2:
                if PART != 2:
                    sharers = tl.minimum(programs, stop - start)
                    item = number
                    items = heads * SPLITS
                    taken = 0
                    feature = tl.arange(0, FEATURES)
                    length = tl.load(lengths)
                    position = tl.load(positions)
                    cos = tl.load(cosine + position * ROTARY + feature, mask=feature < ROTARY, other=1.0)
                    sin = tl.load(sine + position * ROTARY + feature, mask=feature < ROTARY, other=0.0)
                    while item < items:
                        head, split = item % heads, item // heads
                        cache = (layer * heads + head).to(tl.int64) * capacity * head_size
                        block = tl.load(starts) + split * BLOCK
                        keys = _cached(key_cache + cache, block, length, head_size, FEATURES, BLOCK)
                        values = _cached(value_cache + cache, block, length, head_size, FEATURES, BLOCK)
                        if MEET:
                            _wait(counters, chunk - number, space)
                        _attend_part(
                            space + qkv + head * head_size,
                            d,
                            key_cache + cache,
                            value_cache + cache,
                            keys,
                            values,
                            cos,
                            sin,
                            length,
                            block,
                            split,
                            SPLITS,
                            head_size,
                            scale,
                            space + attended + (split * heads + head) * head_size,
                            space + statistics + split * heads + head,
                            ROTARY,
                            FEATURES,
                            BLOCK,
                        )
                        item += sharers
                        taken += 1
                    if MEET:
                        _count(counters + 1, taken)
                        _wait(counters + 1, (layer + 1) * items, space)
                parts = ()
                for j in tl.static_range(PIECES):
                    part = _joined_attention(
                        space + attended,
                        space + statistics,
                        0,
                        j * PIECE + column[None, :],
                        d,
                        head_size,
                        SPLITS,
                    )
                    parts = parts + (part,)  # noqa: RUF005
                vector = _spread(parts, ROWS, PIECE, PIECES)
            else:
                if MEET:
                    _wait(counters, chunk - number, space)
                if more > 0:
                    wide = ()
                    place = space + source + (row & ((1 << more) - 1))[:, None] * d + column[None, :]
                    for j in tl.static_range(PIECES):
                        wide = wide + (tl.load(place + j * PIECE),)  # noqa: RUF005
                    vector = _weights(wide, rows, tau, norm_eps, KIND, TANH, EXACT, PIECES)
                else:
                    parts = ()
                    for j in tl.static_range(PIECES):
                        parts = parts + (tl.load(space + source + j * PIECE + column[None, :]),)  # noqa: RUF005
                    if is_keys:
                        parts = _normed(parts, d, layer_norm_eps, PIECES)
                    else:
                        parts = _weights(parts, 1, tau, norm_eps, KIND, TANH, EXACT, PIECES)
                    vector = _spread(parts, ROWS, PIECE, PIECES)
        if PART != 1:
            there = (row < rows) & is_there
            place = space + target + out_row + row
            before = tl.zeros((ROWS,), tl.float32)
            if (phase == 3) | (phase == 5):  # in a branch, as every load that must not be pipelined
                before = tl.load(place, mask=there, other=0.0)
            products = tiles[0].to(tl.float32) * vector[0]
            for j in tl.static_range(1, PIECES):
                products += tiles[j].to(tl.float32) * vector[j]
            total = tl.sum(products, axis=1)
            if more > 0:
                same = row[None, :] >> more == row[:, None]
                total = tl.sum(tl.where(same, total[None, :], 0.0), axis=1)
            if KIND == GELU or KIND == GELU_L2_NORM:  # noqa: SIM102, SIM109 (Triton knows the first at once only)
                if is_keys:
                    total = before_statistics(total, GELU_L2_NORM, TANH, EXACT)
            tl.store(place, total + before, mask=there)
            if MEET:  # noqa: SIM102
                if is_there & (number + programs >= stop - start):
                    _count(counters, turn_of_phase + 1)
        inner += programs % chunks
        is_next = (inner >= chunks).to(tl.int32)
        layer += programs // chunks + is_next
        inner -= is_next * chunks
