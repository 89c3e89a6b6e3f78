// Scores and weights of Pattention in one kernel, for Hopper GPUs (sm_90a), bfloat16 with float32 sums.
//
// BACKWARD 0: scores = a b^T, and the weights of the scores:   a = x [rows, d_in],     b = keys [p, n, d_in].
// BACKWARD 1: weight gradients = a b^T, the weights again, and the gradients of the scores:
//             a = p output gradients [rows, d_out],            b = values [p, n, d_out].
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
// The warpgroups that multiply take the forward's part, of the scores before they are rounded, so that nobody waits for long.
// The forward serves gelu and l2_norm_gelu; what the others need of a whole row is too much for that.
//
// Compiled behind pattention_sm90_math.cuh, _instructions.cuh, _rows.cuh and _finish.cuh, with -DBACKWARD=, -DKIND= (position in
// NORM_ACTIVATIONS) and -DTANH= (the form of GELU).

static_assert(BACKWARD || KIND == GELU || KIND == L2_NORM_GELU, "the forward does not serve the others");

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
    const TensorMaps* maps_a, const TensorMap* map_b, const Arguments& args, Ring ring, u32 block) {
    const Schedule schedule(args);
    const u32 steps = (args.inner + TILE_K - 1) / TILE_K;
    for (u32 number = blockIdx.x / BLOCKS; number < schedule.total; number += gridDim.x / BLOCKS) {
        const Tile tile = schedule(number, block);
        const TensorMap* map_a = maps_a->of + (BACKWARD ? tile.projection : 0);
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

__device__ __forceinline__ u64 padded_rows_of(const Arguments& args) {
    return static_cast<u64>((args.rows + BLOCKS * TILE_M - 1) / (BLOCKS * TILE_M)) * (BLOCKS * TILE_M);
}

// Where the parts of the tile's rows are, its first row and the projection's first tile.
__device__ __forceinline__ u64* partials_of(const Arguments& args, const Schedule& schedule, const Tile& tile) {
    return args.partials + static_cast<u64>(tile.projection) * schedule.tiles_per_row * padded_rows_of(args) + tile.row;
}

// As the product's sums lie, see give_half.
__device__ __forceinline__ void give_squares(const float (&sums)[96], u64* parts) {
    const u32 lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3;
    const float2 upper = squares_of_row<0>(sums), lower = squares_of_row<2>(sums);
    if ((lane & 3) != 0) return;
    parts += warp * 16 + lane / 4;
    give_part(parts, upper);
    give_part(parts + 8, lower);
}

__device__ __forceinline__ void multiply_tiles(const Arguments& args, Ring ring, u32 which, u32 block) {
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
        if (!BACKWARD && NEEDS_ROW) {
            const Tile tile = schedule(number, block);
            give_squares(sums, partials_of(args, schedule, tile) + tile.index * padded_rows_of(args) + 64 * which);
        }
        meet(3 + which, AT_HALF);
        give_half(sums, half);
        signal(1 + which, AT_HALF);
    }
}

__device__ __forceinline__ Place place_of(const Arguments& args, const Schedule& schedule, u32 base, u32 number, u32 block, u32 turn) {
    const u32 lane = threadIdx.x & 31;
    const Tile tile = schedule(number, block);
    const u32 column = tile.token + (lane & 7) * 8;
    return {
        args, base + OFFSET_HALVES, base + OFFSET_SCORES + lane * 16,
        base + OFFSET_ROWS + turn * (TILE_M * 16), lane, column, tile.row,
        tile.row * args.row_stride + static_cast<u64>(tile.projection) * args.n + column, padded_rows_of(args),
        partials_of(args, schedule, tile),
        args.statistics + static_cast<u64>(tile.row) * args.statistics_stride + tile.projection,
        tile.index, schedule.tiles_per_row, number + gridDim.x / BLOCKS >= schedule.total};
}

__device__ __forceinline__ void finish_tiles(const Arguments& args, u32 base, u32 block) {
    const Schedule schedule(args);
    const u32 first = blockIdx.x / BLOCKS, stride = gridDim.x / BLOCKS;
    u32 turn = 0;
    signal(3, AT_HALF);
    signal(4, AT_HALF);
    if (SCORES_WAIT && first < schedule.total) ask_for_scores(place_of(args, schedule, base, first, block, turn));
    for (u32 number = first; number < schedule.total; number += stride, turn ^= 1) {
        const Place place = place_of(args, schedule, base, number, block, turn);
        if (!BACKWARD) finish_forward(place);
        else if (!NEEDS_ROW) finish_backward_alone(place);
        else finish_backward_of_rows(place, place_of(args, schedule, base, min(number + stride, schedule.total - 1), block, turn));
    }
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1) pattention(
    const __grid_constant__ TensorMaps maps_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ Arguments args) {
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
        multiply_tiles(args, ring, warp / 4, block);
    } else if (warp < (MULTIPLYING + FINISHING) / 32) {
        finish_tiles(args, base, block);
    } else {
        if (threadIdx.x % 32 == 0) load_tiles(&maps_a, &map_b, args, ring, block);
        __syncwarp();
    }
    meet_cluster();  // nothing may still be on its way to a block that has ended
}
