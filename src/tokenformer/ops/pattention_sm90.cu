// Scores and weights of Pattention in one kernel, for Hopper GPUs (sm_90a), bfloat16 with float32 sums.
//
// BACKWARD 0: scores = a b^T, and the weights of the scores:   a = x [rows, d_in],     b = keys [p, n, d_in].
// BACKWARD 1: weight gradients = a b^T, the weights again, and the gradients of the scores:
//             a = output gradients [rows, d_out],              b = values [1, n, d_out].
//
// The product is the usual one: tiles of 128 x 192, loaded by the copy engine, 64 of the inner axis at a time, into a
// ring of shared memory; the blocks of a cluster take rows below each other and share the tokens' tile. What is new
// stands beside it: the two warpgroups that multiply hand a finished tile, rounded to bfloat16, to seven other warps,
// which compute weights and gradients and write everything out while the next tile is multiplied. So the activation
// costs neither a pass through memory nor time in which nothing is multiplied.
//
// A row norm needs the whole row, which ceil(n / 192) tiles share. Their blocks run at the same time (tiles of
// one row follow each other in the static order, and every block is resident), so each writes its part of the row's
// sum, waits for those of the others, and adds up all parts in the same order: results do not depend on timing.
//
// Compiled behind pattention_sm90_math.cuh, _instructions.cuh and _rows.cuh, with -DBACKWARD=, -DKIND= (position in
// NORM_ACTIVATIONS) and -DTANH= (the form of GELU).

struct Tile { u32 row, projection, token, index; };

struct Schedule {
    u32 tiles_per_row, tiles_per_panel, total;
    __device__ explicit Schedule(const Arguments& args) {
        tiles_per_row = (args.n + TILE_N - 1) / TILE_N;
        tiles_per_panel = tiles_per_row * args.projections;
        total = (args.rows + BLOCKS * TILE_M - 1) / (BLOCKS * TILE_M) * tiles_per_panel;
    }
    __device__ Tile operator()(u32 number, u32 block) const {
        const u32 panel = number / tiles_per_panel, within = number % tiles_per_panel;
        const u32 projection = within / tiles_per_row, index = within % tiles_per_row;
        return {panel * (BLOCKS * TILE_M) + block * TILE_M, projection, index * TILE_N, index};
    }
};

struct Ring {
    u32 base, full, empty, stage, phase;
    __device__ void advance() { if (++stage == STAGES) stage = 0, phase ^= 1; }
    __device__ u32 a() const { return base + stage * BYTES_A; }
    __device__ u32 b() const { return base + OFFSET_B + stage * BYTES_B; }
};

__device__ __forceinline__ void load_tiles(
    const TensorMap* map_a, const TensorMap* map_b, const Arguments& args, Ring ring, u32 block) {
    const Schedule schedule(args);
    const u32 steps = (args.inner + TILE_K - 1) / TILE_K;
    for (u32 number = blockIdx.x / BLOCKS; number < schedule.total; number += gridDim.x / BLOCKS) {
        const Tile tile = schedule(number, block);
        for (u32 step = 0; step < steps; ++step, ring.advance()) {
            barrier_wait(ring.empty + 8 * ring.stage, ring.phase ^ 1);
            const u32 ready = ring.full + 8 * ring.stage;
            barrier_expect(ready, BYTES_A + BYTES_B);
            load_a(ring.a(), map_a, ready, step * TILE_K, tile.row);
            load_b_for_all(
                ring.b() + block * (BYTES_B / BLOCKS), map_b, ready, step * TILE_K, tile.token + block * (TILE_N / BLOCKS),
                tile.projection);
        }
    }
}

// A thread holds rows lane / 4 and + 8 of its warp's 16, columns 8 i + 2 (lane % 4) and + 1. Pieces of 8 columns (16 bytes)
// of a row change places by the row's last three bits, so that neither side meets bank conflicts.
__device__ __forceinline__ void give_half(const float (&sums)[96], u32 half) {
    const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const u32 row = warp * 16 + ((lane >> 3) & 1) * 8 + (lane & 7);
    const u32 to = half + row * (TILE_N * 2);
#pragma unroll
    for (int i = 0; i < TILE_N / 8; i += 2) {
        const u32 piece = (i + (lane >> 4)) ^ (row & 7);
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + piece * 16),
            "r"(rounded_pair(sums[4 * i], sums[4 * i + 1])), "r"(rounded_pair(sums[4 * i + 2], sums[4 * i + 3])),
            "r"(rounded_pair(sums[4 * i + 4], sums[4 * i + 5])), "r"(rounded_pair(sums[4 * i + 6], sums[4 * i + 7]))
            : "memory");
    }
}

__device__ __forceinline__ void multiply_tiles(const Arguments& args, Ring ring, u32 which) {
    const Schedule schedule(args);
    const u32 steps = (args.inner + TILE_K - 1) / TILE_K;
    const u32 half = ring.base + OFFSET_HALVES + which * HALF_BYTES;
    float sums[96];
    for (u32 number = blockIdx.x / BLOCKS; number < schedule.total; number += gridDim.x / BLOCKS) {
        u32 previous = 0;
        for (u32 step = 0; step < steps; ++step, ring.advance()) {
            barrier_wait(ring.full + 8 * ring.stage, ring.phase);
            const u64 a = matrix_descriptor(ring.a() + which * (BYTES_A / 2)), b = matrix_descriptor(ring.b());
            multiply_begin();
#pragma unroll
            for (int k = 0; k < TILE_K / 16; ++k) multiply(sums, a + 2 * k, b + 2 * k, (step | k) != 0);
            multiply_commit();
            if (step > 0) {
                multiply_wait<1>();
                if ((threadIdx.x & 127) < BLOCKS) barrier_arrive_in_cluster(previous, threadIdx.x & 127);
            }
            previous = ring.empty + 8 * ring.stage;
        }
        multiply_wait<0>();
        hold(sums);
        if ((threadIdx.x & 127) < BLOCKS) barrier_arrive_in_cluster(previous, threadIdx.x & 127);
        meet(3 + which, AT_HALF);
        give_half(sums, half);
        signal(1 + which, AT_HALF);
    }
}

__device__ __forceinline__ uint4 load_shared(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
    return v;
}

struct Chunks { uint4 of[PIECES]; };
__device__ __forceinline__ u32* pairs_of(Chunks& chunks) { return reinterpret_cast<u32*>(chunks.of); }

// Finishing a tile. A warp has 4 rows at a time, eight threads each; rounds of 4 rows go to the warps in turn.
struct Place {
    const Arguments& args;
    u32 halves, rows_of_tile;           // shared memory
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
    __device__ Chunks load_scores(u32 round) const {
        Chunks chunks;
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
            chunks.of[piece] = has(round, piece) ? *at(args.scores, round, piece) : make_uint4(0, 0, 0, 0);
        return chunks;
    }
    __device__ void store(unsigned short* matrix, u32 round, const Chunks& chunks) const {
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece)
            if (has(round, piece)) *at(matrix, round, piece) = chunks.of[piece];
    }
    __device__ void set_row(u32 row, float2 figures, float along) const {
        const float factor = row_factor(args.scale, figures.x, figures.y);
        along = along_row(args.scale, along, figures.y);
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(rows_of_tile + row * 16), "f"(figures.x), "f"(factor), "f"(along), "f"(0.0f) : "memory");
    }
    __device__ Row row(u32 round) const {
        if (!NEEDS_ROW) return {1.0f, 1.0f, 0.0f};
        float first, factor, along, unused;
        asm volatile(
            "ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
            : "=f"(first), "=f"(factor), "=f"(along), "=f"(unused) : "r"(rows_of_tile + row_in_tile(round) * 16) : "memory");
        (void)unused;
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

__device__ __forceinline__ void finish_forward(const Place& place) {
    Chunks held[NEEDS_ROW ? OWN_ROUNDS : 1];
#pragma unroll
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) {
        const u32 round = own_round(turn);
        wait_for_half(turn);
        if (round < ROUNDS) {
            Chunks& scores = held[NEEDS_ROW ? turn : 0];
            scores = place.load_tile(round);
            place.store(place.args.scores, round, scores);
            if (NEEDS_ROW) place.give_part_of_row(round, part_of_row(scores.of, place.column, place.args.n));
            else store_weights(place, round, scores);
        }
        free_half(turn, place.last);
    }
    if (!NEEDS_ROW) return;
    if (const u32 row = finishing_thread(); row < TILE_M) {
        const float2 figures = whole_row(place.partials + row, place.tiles, place.padded_rows);
        place.set_row(row, figures, 0.0f);
        if (place.index == 0 && place.tile_row + row < place.args.rows)
            place.statistics[row * static_cast<u64>(place.args.statistics_stride)] = figures;
    }
    meet(5, FINISHING);
#pragma unroll
    for (int turn = 0; turn < OWN_ROUNDS; ++turn)
        if (own_round(turn) < ROUNDS) store_weights(place, own_round(turn), held[NEEDS_ROW ? turn : 0]);
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

__device__ __forceinline__ void finish_backward(const Place& place) {
    const u32 own_row = finishing_thread();
    Chunks held[OWN_ROUNDS];  // the scores, asked for while their tile is still multiplied
#pragma unroll
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) held[turn] = place.load_scores(own_round(turn));
    float2 figures = make_float2(1.0f, 1.0f);
    if (NEEDS_ROW && own_row < TILE_M) {
        if (place.tile_row + own_row < place.args.rows)
            figures = place.statistics[own_row * static_cast<u64>(place.args.statistics_stride)];
        place.set_row(own_row, figures, 0.0f);
    }
    if (NEEDS_ROW) meet(5, FINISHING);
#pragma unroll
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) {
        const u32 round = own_round(turn);
        wait_for_half(turn);
        if (round < ROUNDS) {
            const float along = look_first(place, round, held[turn]);
            if (NEEDS_ROW) place.give_part_of_row(round, make_float2(sum_of_eight(along), 0.0f));
            else place.store(place.args.grads, round, held[turn]);
        }
        free_half(turn, place.last);
    }
    if (!NEEDS_ROW) return;
    Chunks scores = place.load_scores(own_round(0));  // again: registers are short
    meet(5, FINISHING);                               // the rows' figures of the first look have been read
    if (own_row < TILE_M)
        place.set_row(own_row, figures, whole_sum(place.partials + own_row, place.tiles, place.padded_rows));
    meet(5, FINISHING);
#pragma unroll
    for (int turn = 0; turn < OWN_ROUNDS; ++turn) {
        const u32 round = own_round(turn);
        Chunks next;
        if (turn + 1 < OWN_ROUNDS) next = place.load_scores(own_round(turn + 1));
        if (round < ROUNDS) {
            const Row row = place.row(round);
#pragma unroll
            for (int i = 0; i < 4 * PIECES; ++i) {
                const u32 score = pairs_of(scores)[i], grad = pairs_of(held[turn])[i];
                pairs_of(held[turn])[i] = rounded_pair(
                    score_gradient(low_of(score), low_of(grad), row), score_gradient(high_of(score), high_of(grad), row));
            }
            place.store(place.args.grads, round, held[turn]);
        }
        scores = next;
    }
}

__device__ __forceinline__ void finish_tiles(const Arguments& args, u32 base, u32 block) {
    const Schedule schedule(args);
    const u32 lane = threadIdx.x & 31;
    const u64 padded_rows = static_cast<u64>((args.rows + BLOCKS * TILE_M - 1) / (BLOCKS * TILE_M)) * (BLOCKS * TILE_M);
    u32 turn = 0;
    signal(3, AT_HALF);
    signal(4, AT_HALF);
    for (u32 number = blockIdx.x / BLOCKS; number < schedule.total; number += gridDim.x / BLOCKS, turn ^= 1) {
        const Tile tile = schedule(number, block);
        const u32 column = tile.token + (lane & 7) * 8;
        const Place place = {
            args, base + OFFSET_HALVES, base + OFFSET_ROWS + turn * (TILE_M * 16), lane, column, tile.row,
            tile.row * args.row_stride + static_cast<u64>(tile.projection) * args.n + column, padded_rows,
            args.partials + static_cast<u64>(tile.projection) * schedule.tiles_per_row * padded_rows + tile.row,
            args.statistics + static_cast<u64>(tile.row) * args.statistics_stride + tile.projection,
            tile.index, schedule.tiles_per_row, number + gridDim.x / BLOCKS >= schedule.total};
        if (BACKWARD) finish_backward(place);
        else finish_forward(place);
    }
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1) pattention(
    const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ Arguments args) {
    extern __shared__ unsigned char memory[];
    const u32 base = (shared_address(memory) + 1023) & ~1023u;
    const Ring ring = {base, base + OFFSET_BARRIERS, base + OFFSET_BARRIERS + 8 * STAGES, 0, 0};
    const u32 block = blockIdx.x % BLOCKS, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(ring.full + 8 * stage, 1);
            barrier_init(ring.empty + 8 * stage, 2 * BLOCKS);  // two warpgroups in each block
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    meet_cluster();
    if (warp < MULTIPLYING / 32) {
        multiply_tiles(args, ring, warp / 4);
    } else if (warp < (MULTIPLYING + FINISHING) / 32) {
        finish_tiles(args, base, block);
    } else {
        if (threadIdx.x % 32 == 0) load_tiles(&map_a, &map_b, args, ring, block);
        __syncwarp();
    }
    meet_cluster();  // nothing may still be on its way to a block that has ended
}
