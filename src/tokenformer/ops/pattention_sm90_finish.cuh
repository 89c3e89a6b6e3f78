// What the finishing warps do with a tile of the product. Fourth part of pattention_sm90.cu.

__device__ __forceinline__ uint4 load_shared(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

__device__ __forceinline__ void store_shared(u32 to, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

struct Chunks { uint4 of[PIECES]; };
__device__ __forceinline__ u32* pairs_of(Chunks& chunks) { return reinterpret_cast<u32*>(chunks.of); }

// Finishing a tile. A warp has 4 rows at a time, eight threads each; rounds of 4 rows go to the warps in turn.
struct Place {
    const Arguments& args;
    u32 halves, scores, rows_of_tile;   // shared memory; scores: of this thread alone
    u32 lane, column;                   // column: of this thread's first piece in the projection
    u64 tile_row, offset, padded_rows;  // offset: of the tile's first row and this thread's first column
    u64* partials;                      // of the tile's first row, as the statistics
    float2* statistics;
    u32 index, tiles;                   // of the tiles that share the row
    bool last;

    __device__ u32 row_in_tile(u32 round) const { return 4 * round + lane / 8; }
    __device__ bool has_row(u32 round) const { return tile_row + row_in_tile(round) < args.rows; }
    __device__ bool has(u32 round, int piece) const { return has_row(round) && column + 64 * piece < args.n; }
    __device__ u32 shared(u32 round, int piece) const {
        const u32 r = row_in_tile(round);
        return halves + r * (TILE_N * 2) + (((lane & 7) + 8 * piece) ^ (r & 7)) * 16;
    }
    __device__ uint4* at(unsigned short* matrix, u32 round, int piece) const {
        return reinterpret_cast<uint4*>(matrix + offset + row_in_tile(round) * args.row_stride + 64 * piece);
    }
    __device__ void give_part_of_row(u32 round, float2 part) const {
        if ((lane & 7) == 0) give_part(partials + index * padded_rows + row_in_tile(round), part);
    }
    __device__ Chunks load_tile(u32 round) const {
        Chunks chunks;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) chunks.of[piece] = load_shared(shared(round, piece));
        return chunks;
    }
    __device__ void store_tile(u32 round, const Chunks& chunks) const {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) store_shared(shared(round, piece), chunks.of[piece]);
    }
    __device__ Chunks load_scores(u32 round) const {
        Chunks chunks;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
            chunks.of[piece] = has(round, piece) ? *at(args.scores, round, piece) : make_uint4(0, 0, 0, 0);
        return chunks;
    }
    __device__ u32 waiting(u32 round, int piece) const { return scores + (round * PIECES + piece) * (32 * 16); }
    __device__ void ask_for_scores(u32 round) const {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            const bool there = has(round, piece);
            const void* from = there ? static_cast<const void*>(at(args.scores, round, piece)) : args.scores;
            copy_begin(waiting(round, piece), from, there);
        }
    }
    __device__ Chunks scores_that_wait(u32 round) const {
        Chunks chunks;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) chunks.of[piece] = load_shared(waiting(round, piece));
        return chunks;
    }
    __device__ void store(unsigned short* matrix, u32 round, const Chunks& chunks) const {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
            if (has(round, piece)) *at(matrix, round, piece) = chunks.of[piece];
    }
    __device__ void set_row(u32 row, float2 figures, float along) const {
        const float factor = row_factor(args.scale, figures.x, figures.y);
        along = along_row(args.scale, along, figures.y, factor);
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(rows_of_tile + row * 16), "f"(figures.x), "f"(factor), "f"(along), "f"(0.0f) : "memory");
    }
    __device__ Row row(u32 round) const {
        if (!NEEDS_ROW) return {1.0f, 1.0f, 0.0f};
        float first, factor, along, unused;
        asm volatile(
            "ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
            : "=f"(first), "=f"(factor), "=f"(along), "=f"(unused)
            : "r"(rows_of_tile + row_in_tile(round) * 16)
            : "memory");
        return {first, factor, along};
    }
};

constexpr int ROUNDS = TILE_M / 4, OWN_ROUNDS = (ROUNDS + FINISHING_WARPS - 1) / FINISHING_WARPS;
// By their second round all warps are within the first half tile or at the start of the second, so they ask for that then.
constexpr int SECOND_HALF = 2;
static_assert(FINISHING_WARPS * SECOND_HALF <= ROUNDS / 2 && FINISHING_WARPS * (SECOND_HALF + 1) >= ROUNDS / 2, "");

__device__ __forceinline__ u32 finishing_thread() { return threadIdx.x - MULTIPLYING; }
__device__ __forceinline__ u32 own_round(int turn) { return finishing_thread() / 32 + FINISHING_WARPS * turn; }

__device__ __forceinline__ void wait_for_half(int turn) {
    if (turn == 0) meet(1, AT_HALF);
    if (turn == SECOND_HALF) meet(2, AT_HALF);
}
// A finished tile has been read: the next may come. After the last there is none.
__device__ __forceinline__ void free_half(int turn, bool last) {
    if (turn == SECOND_HALF && !last) signal(3, AT_HALF);
    if (turn == OWN_ROUNDS - 1 && !last) signal(4, AT_HALF);
}

__device__ __forceinline__ void store_weights(const Place& place, u32 round, Chunks& scores) {
    const Row row = place.row(round);
    Chunks weights;
#pragma unroll
    for (int i = 0; i < 4 * PIECES; ++i) {
        const u32 pair = pairs_of(scores)[i];
        pairs_of(weights)[i] = rounded_pair(weight_of(low_of(pair), row), weight_of(high_of(pair), row));
    }
    place.store(place.args.weights, round, weights);
}

// The parts of a row's norm are on their way since before the tile was handed over, see multiply_tiles.
__device__ __forceinline__ void finish_forward(const Place& place) {
    if (NEEDS_ROW) {
        if (const u32 row = finishing_thread(); row < TILE_M) {
            const float2 figures = whole_norm(place.partials + row, place.tiles, place.padded_rows);
            place.set_row(row, figures, 0.0f);
            if (place.index == 0 && place.tile_row + row < place.args.rows)
                place.statistics[row * static_cast<u64>(place.args.statistics_stride)] = figures;
        }
        meet(5, FINISHING);
    }
#pragma unroll
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) {
        const u32 round = own_round(turn);
        wait_for_half(turn);
        if (round < ROUNDS) {
            Chunks scores = place.load_tile(round);
            if (place.args.scores != nullptr) place.store(place.args.scores, round, scores);
            store_weights(place, round, scores);
        }
        free_half(turn, place.last);
    }
}

// The first look at the gradients of the weights. In place of the scores it leaves what the second needs of the gradients.
__device__ __forceinline__ float look_first(const Place& place, u32 round, Chunks& scores) {
    const Row row = place.row(round);
    Chunks grads = place.load_tile(round), weights;
    float along = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * PIECES; ++i) {
        const u32 score = pairs_of(scores)[i], grad = pairs_of(grads)[i];
        const Terms low = backward_terms(low_of(score), low_of(grad), row);
        const Terms high = backward_terms(high_of(score), high_of(grad), row);
        pairs_of(weights)[i] = rounded_pair(low.weight, high.weight);
        pairs_of(scores)[i] = rounded_pair(low.kept, high.kept);
        along += low.along + high.along;  // the gradients of what is not there are zero
    }
    place.store(place.args.weights, round, weights);
    return along;
}

__device__ __forceinline__ void look_again(const Place& place, u32 round, Chunks& scores) {
    const Row row = place.row(round);
    Chunks kept = place.load_tile(round);
#pragma unroll
    for (int i = 0; i < 4 * PIECES; ++i) {
        const u32 score = pairs_of(scores)[i], grad = pairs_of(kept)[i];
        pairs_of(kept)[i] = rounded_pair(
            score_gradient(low_of(score), low_of(grad), row), score_gradient(high_of(score), high_of(grad), row));
    }
    place.store(place.args.grads, round, kept);
}

// Without row norms one look is enough; the scores are asked for while their tile is still multiplied.
__device__ __forceinline__ void finish_backward_alone(const Place& place) {
    Chunks held[OWN_ROUNDS];
#pragma unroll
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) held[turn] = place.load_scores(own_round(turn));
#pragma unroll
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) {
        const u32 round = own_round(turn);
        wait_for_half(turn);
        if (round < ROUNDS) {
            look_first(place, round, held[turn]);
            place.store(place.args.grads, round, held[turn]);
        }
        free_half(turn, place.last);
    }
}

__device__ __forceinline__ void ask_for_scores(const Place& place) {
#pragma unroll 1
    for (int turn = 0; turn < OWN_ROUNDS; ++turn)
        if (own_round(turn) < ROUNDS) place.ask_for_scores(own_round(turn));
}

// Between the two looks lies the sum over the row. What the second needs waits in shared memory: gradients in the finished tile's
// place, scores where they came to while the tile was multiplied; then those of the next tile are asked for.
__device__ __forceinline__ void finish_backward_of_rows(const Place& place, const Place& next) {
    const u32 own_row = finishing_thread();
    float2 figures = make_float2(1.0f, 1.0f);
    if (own_row < TILE_M) {
        if (place.tile_row + own_row < place.args.rows)
            figures = place.statistics[own_row * static_cast<u64>(place.args.statistics_stride)];
        place.set_row(own_row, figures, 0.0f);
    }
    copies_wait();
    meet(5, FINISHING);
#pragma unroll 1
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) {
        const u32 round = own_round(turn);
        wait_for_half(turn);
        if (round >= ROUNDS) continue;
        Chunks scores = place.scores_that_wait(round);
        const float along = look_first(place, round, scores);
        place.give_part_of_row(round, make_float2(sum_of_eight(along), 0.0f));
        place.store_tile(round, scores);
    }
    meet(5, FINISHING);  // the rows' figures of the first look have been read
    if (own_row < TILE_M)
        place.set_row(own_row, figures, whole_sum(place.partials + own_row, place.tiles, place.padded_rows));
    meet(5, FINISHING);
#pragma unroll 1
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) {
        const u32 round = own_round(turn);
        if (round < ROUNDS) {
            Chunks scores = place.scores_that_wait(round);
            look_again(place, round, scores);
            if (!place.last) next.ask_for_scores(round);
        }
        free_half(turn, place.last);
    }
}
