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
// Compiled with -DBACKWARD=, -DKIND= (position in NORM_ACTIVATIONS) and -DTANH= (the form of GELU).

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int GELU = 0, L2_NORM_GELU = 1, GELU_L2_NORM = 2, SOFTMAX = 3;
constexpr bool NEEDS_ROW = KIND != GELU;

constexpr int BLOCKS = BLOCKS_OF_CLUSTER;
constexpr int TILE_M = 128, TILE_N = 192, TILE_K = 64, STAGES = 4;
constexpr int BYTES_A = TILE_M * TILE_K * 2, BYTES_B = TILE_N * TILE_K * 2;
constexpr int HALF_BYTES = 64 * TILE_N * 2;  // a finished half tile, between two warpgroups
constexpr int OFFSET_B = STAGES * BYTES_A;
constexpr int OFFSET_HALVES = OFFSET_B + STAGES * BYTES_B;
constexpr int OFFSET_ROWS = OFFSET_HALVES + 2 * HALF_BYTES;  // figures of the rows, of two tiles in turn
constexpr int OFFSET_BARRIERS = OFFSET_ROWS + 2 * TILE_M * 16;
// 1024 for alignment; the host asks for this much
constexpr int SHARED_BYTES = OFFSET_BARRIERS + 2 * STAGES * 8 + 1024;
static_assert(SHARED_BYTES == SHARED_BYTES_OF_HOST, "keep in step with pattention_sm90.py");

struct alignas(64) TensorMap { u64 opaque[16]; };

struct Arguments {
    unsigned short* scores;   // [rows, row_stride], column proj * n + token: written by the forward, read by the backward
    unsigned short* weights;  // as scores
    unsigned short* grads;    // as scores, of the backward alone
    float2* statistics;       // [rows, statistics_stride]: two figures of a row and projection
    u64* partials;            // [projections, tiles, padded rows], all bits ones at the start
    u64 row_stride;
    u32 statistics_stride;
    u32 rows, n, inner, projections;
    float root, tau, eps;
};

// ---- instructions ----

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive_in_cluster(u32 barrier, u32 block) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(barrier), "r"(block) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier), "r"(phase) : "memory");
}

constexpr int MULTIPLYING = 256, FINISHING_WARPS = 7, FINISHING = 32 * FINISHING_WARPS;
constexpr int THREADS = MULTIPLYING + FINISHING + 32;

// Named barriers: 1, 2 a half tile is full; 3, 4 it is empty; 5 among the threads that finish them.
constexpr int AT_HALF = 128 + FINISHING;

__device__ __forceinline__ void meet(int name, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void signal(int name, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

__device__ __forceinline__ void meet_cluster() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void load_a(u32 to, const TensorMap* map, u32 barrier, int k, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(k), "r"(row) : "memory");
}

// The same address and barrier in all blocks of the cluster.
__device__ __forceinline__ void load_b_for_all(u32 to, const TensorMap* map, u32 barrier, int k, int token, int proj) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
        "l"(map), "r"(barrier), "r"(k), "r"(token), "r"(proj), "h"(static_cast<unsigned short>((1 << BLOCKS) - 1)) : "memory");
}

// A tile whose rows of 64 bfloat16 (128 bytes) lie as the copy engine's 128-byte swizzle puts them.
__device__ __forceinline__ u64 matrix_descriptor(u32 address) {
    return static_cast<u64>((address & 0x3FFFF) >> 4) | (static_cast<u64>(1) << 16) | (static_cast<u64>(64) << 32) |
           (static_cast<u64>(1) << 62);
}

#define SUMS_8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS_32(d, i) SUMS_8(d, i), SUMS_8(d, i + 8), SUMS_8(d, i + 16), SUMS_8(d, i + 24)

// sums [64, 192] (+)= a [64, 16] b [192, 16]^T; what a thread holds: see give_half.
__device__ __forceinline__ void multiply(float (&d)[96], u64 a, u64 b, int add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "
        "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, %96, %97, add, 1, 1, 0, 0;\n"
        "}"
        : SUMS_32(d, 0), SUMS_32(d, 32), SUMS_32(d, 64)
        : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Nothing that reads the sums moves above this.
__device__ __forceinline__ void hold(float (&d)[96]) {
    asm volatile("" : SUMS_8(d, 0), SUMS_8(d, 8), SUMS_8(d, 16)::"memory");
    asm volatile("" : SUMS_8(d, 24), SUMS_8(d, 32), SUMS_8(d, 40)::"memory");
    asm volatile("" : SUMS_8(d, 48), SUMS_8(d, 56), SUMS_8(d, 64)::"memory");
    asm volatile("" : SUMS_8(d, 72), SUMS_8(d, 80), SUMS_8(d, 88)::"memory");
}

__device__ __forceinline__ u32 rounded_pair(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- what happens to a score: as in pattention_triton_math.py ----

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Activation { float value, slope; };

// gelu(z) = z sigmoid(y), y = z factor(z z) in units of ln 2.
__device__ __forceinline__ Activation gelu(float z) {
    float factor, slope;
    if (TANH) {
        const float t = fminf(z * z, 900.0f);
        constexpr float c0 = 2 * 0.7978845608028654f * LOG2_E, c1 = 0.044715f * c0;
        factor = fmaf(c1, t, c0);
        slope = fmaf(3 * c1 * LN_2, t, c0 * LN_2);
    } else {
        const float t = fminf(z * z, 36.0f);
        constexpr float c0 = 1.59501317f * LOG2_E, c1 = 0.07401365f * LOG2_E, c2 = -0.00070341728f * LOG2_E;
        factor = fmaf(fmaf(c2, t, c1), t, c0);
        slope = fmaf(fmaf(5 * c2 * LN_2, t, 3 * c1 * LN_2), t, c0 * LN_2);
    }
    const float sigmoid = reciprocal(1.0f + power_of_two(-(z * factor)));
    const float value = z * sigmoid;
    return {value, fmaf(value * (1.0f - sigmoid), slope, sigmoid)};  // no slope wanted: the compiler drops it
}

__device__ __forceinline__ float exponential(float x) { return power_of_two(x * LOG2_E); }

struct Row { float first, factor, along; };  // along: as the gradient takes it

__device__ __forceinline__ float row_factor(const Arguments& args, float first, float second) {
    return KIND == SOFTMAX ? args.tau / second : args.root / (second + args.eps * first);
}

// What the row's figures are of.
__device__ __forceinline__ float counted(float score) { return KIND == GELU_L2_NORM ? gelu(score).value : score; }

__device__ __forceinline__ float weight_of(float score, const Row& row) {
    if (KIND == GELU) return gelu(score).value;
    if (KIND == L2_NORM_GELU) return gelu(score * row.first * row.factor).value;
    if (KIND == GELU_L2_NORM) return gelu(score).value * row.first * row.factor;
    return exponential(score - row.first) * row.factor;
}

struct Terms { float weight, kept, along; };

// First look of the backward: the weight, what the second look needs of the gradient, and the term of the row's sum.
__device__ __forceinline__ Terms backward_terms(float score, float grad, const Row& row) {
    if (KIND == GELU) {
        const Activation a = gelu(score);
        return {a.value, grad * a.slope, 0.0f};
    }
    if (KIND == L2_NORM_GELU) {
        const float y = score * row.first * row.factor;
        const Activation a = gelu(y);
        const float through = grad * a.slope;
        return {a.value, through, y * through};
    }
    const float weight = weight_of(score, row);
    return {weight, grad, weight * grad};
}

// Second look: through y = c s / (r + eps), r = |s|: ds = c dy / (r + eps) - y (y . dy) / (c r).
__device__ __forceinline__ float score_gradient(float score, float kept, const Row& row) {
    if (KIND == SOFTMAX) return (kept - row.along) * (exponential(score - row.first) * row.factor);
    if (KIND == L2_NORM_GELU) return (kept * row.factor - row.along * (score * row.first * row.factor)) * row.first;
    const Activation a = gelu(score);
    return (kept * row.factor - row.along * (a.value * row.first * row.factor)) * row.first * a.slope;
}

// ---- figures of a row ----

constexpr int PIECES = TILE_N / 64;  // of 8 neighbouring columns that a thread has of a row, 64 apart

// Eight neighbouring threads share a row.
__device__ __forceinline__ float sum_of_eight(float x) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ __forceinline__ float largest_of_eight(float x) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

__device__ __forceinline__ bool safe(float squares) { return squares > 1e-30f && squares < 1e36f; }
__device__ __forceinline__ float scale_of(float largest) {
    return largest > 0 ? 1.0f / fmaxf(largest, 1.2e-38f) : 1.0f;
}

// Rare: zero rows, and squares that leave float32.
__device__ __noinline__ float2 scaled_part(uint4 first, uint4 second, uint4 third) {
    const u32 pairs[4 * PIECES] = {
        first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w, third.x, third.y, third.z, third.w};
    float largest = 0.0f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * PIECES; ++i)
        largest = fmaxf(largest, fmaxf(fabsf(counted(low_of(pairs[i]))), fabsf(counted(high_of(pairs[i])))));
    largest = largest_of_eight(largest);
    const float scale = scale_of(largest);
#pragma unroll
    for (int i = 0; i < 4 * PIECES; ++i) {
        const float low = counted(low_of(pairs[i])) * scale, high = counted(high_of(pairs[i])) * scale;
        total = fmaf(low, low, fmaf(high, high, total));
    }
    return make_float2(scale, sum_of_eight(total));
}

// (scale, sum of scaled squares) or (largest, sum of exponentials below it) over the eight threads' 24 scores each.
__device__ __forceinline__ float2 part_of_row(const uint4 (&chunks)[PIECES], u32 first_column, u32 n) {
    const u32* pairs = reinterpret_cast<const u32*>(chunks);
    if (KIND == SOFTMAX) {
        float largest = -3.4e38f, total = 0.0f;
#pragma unroll
        for (int i = 0; i < 4 * PIECES; ++i)
            if (first_column + (i / 4) * 64 < n) largest = fmaxf(largest, fmaxf(low_of(pairs[i]), high_of(pairs[i])));
        largest = largest_of_eight(largest);
#pragma unroll
        for (int i = 0; i < 4 * PIECES; ++i)
            if (first_column + (i / 4) * 64 < n)
                total += exponential(low_of(pairs[i]) - largest) + exponential(high_of(pairs[i]) - largest);
        return make_float2(largest, sum_of_eight(total));
    }
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * PIECES; ++i) {
        const float low = counted(low_of(pairs[i])), high = counted(high_of(pairs[i]));
        total = fmaf(low, low, fmaf(high, high, total));
    }
    total = sum_of_eight(total);
    float2 part = make_float2(1.0f, total);
    if (__any_sync(0xFFFFFFFFu, !safe(total))) {
        const float2 scaled = scaled_part(chunks[0], chunks[1], chunks[2]);
        if (!safe(total)) part = scaled;
    }
    return part;
}

// A part of a row's figures goes to the tiles of that row by one store of 64 bits, which nobody can see half of. It
// stands for itself: until then all bits are ones, which no figures are. So nothing has to wait for other stores.
__device__ __forceinline__ void give_part(u64* to, float2 part) {
    const u64 bits = static_cast<u64>(__float_as_uint(part.y)) << 32 | __float_as_uint(part.x);
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(bits) : "memory");
}

__device__ __forceinline__ u64 look_at(const u64* from) {
    u64 bits;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(from) : "memory");
    return bits;
}

// Eight parts at a time, so that their ways to the second-level cache overlap; `nothing` in place of those beyond the last.
template <typename Use>
__device__ __forceinline__ void for_all_parts(
    const u64* parts, u32 tiles, u64 padded_rows, float2 nothing, Use use) {
#pragma unroll 1
    for (u32 first = 0; first < tiles; first += 8) {
        u64 bits[8];
        float2 found[8];
        bool missing = true;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) bits[i] = first + i < tiles ? look_at(parts + (first + i) * padded_rows) : 0;
        for (u32 tries = 0; missing; ++tries) {
            missing = false;
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                if (bits[i] == ~0ull) bits[i] = look_at(parts + (first + i) * padded_rows), missing = true;
            if (tries > (1u << 24)) __trap();  // seconds: an error in place of a hang
        }
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            found[i] = first + i < tiles
                ? make_float2(__uint_as_float(static_cast<u32>(bits[i])), __uint_as_float(bits[i] >> 32)) : nothing;
        use(found);
    }
}

// The sum of the squares of a row where those of some tiles had to be scaled, and the smallest scale.
__device__ __noinline__ float2 scaled_squares(const u64* parts, u32 tiles, u64 padded_rows) {
    float scale = 3.4e38f, total = 0.0f;
    for (u32 pass = 0; pass < 2; ++pass)
        for (u32 tile = 0; tile < tiles; ++tile) {
            const u64 bits = look_at(parts + tile * padded_rows);
            const float own = __uint_as_float(static_cast<u32>(bits)), squares = __uint_as_float(bits >> 32);
            const float ratio = scale / own;
            if (pass == 1) total += squares > 0 ? squares * (ratio * ratio) : 0.0f;
            else if (squares > 0) scale = fminf(scale, own);
        }
    return make_float2(total > 0 ? scale : 1.0f, total);
}

// The two figures of a whole row from those of its tiles.
__device__ __forceinline__ float2 whole_row(const u64* parts, u32 tiles, u64 padded_rows) {
    float total = 0.0f;
    if (KIND == SOFTMAX) {
        float largest = -3.4e38f;
        for_all_parts(parts, tiles, padded_rows, make_float2(-3.4e38f, 0.0f), [&](const float2 (&part)[8]) {
            float higher = largest;
#pragma unroll
            for (int i = 0; i < 8; ++i) higher = fmaxf(higher, part[i].x);
            total *= exponential(largest - higher);
#pragma unroll
            for (int i = 0; i < 8; ++i) total = fmaf(part[i].y, exponential(part[i].x - higher), total);
            largest = higher;
        });
        return make_float2(largest, fmaxf(total, 1.0f));
    }
    bool plain = true;
    for_all_parts(parts, tiles, padded_rows, make_float2(1.0f, 0.0f), [&](const float2 (&part)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) total += part[i].y, plain = plain && part[i].x == 1.0f;
    });
    float2 squares = make_float2(1.0f, total);
    if (!plain) squares = scaled_squares(parts, tiles, padded_rows);
    return make_float2(squares.x, squares.y > 0 ? sqrtf(squares.y) : __int_as_float(0x7F800000));
}

__device__ __forceinline__ float whole_sum(const u64* parts, u32 tiles, u64 padded_rows) {
    float total = 0.0f;
    for_all_parts(parts, tiles, padded_rows, make_float2(0.0f, 0.0f), [&](const float2 (&part)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) total += part[i].x;
    });
    return total;
}

// ---- the roles ----

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
        const float factor = row_factor(args, figures.x, figures.y);
        along /= KIND == SOFTMAX ? args.tau : args.root * figures.y;
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
#ifdef ONLY_PRODUCTS
        for (u32 half = 0; half < 2; ++half) { meet(1 + half, AT_HALF); if (!place.last) signal(3 + half, AT_HALF); }
#else
        if (BACKWARD) finish_backward(place);
        else finish_forward(place);
#endif
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
