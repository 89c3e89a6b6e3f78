// Instructions of Hopper GPUs, and how the kernel's shared memory is laid out. Second part of pattention_sm90.cu.

constexpr int BLOCKS = BLOCKS_OF_CLUSTER;
constexpr int MOST_PROJECTIONS = 4;  // whose gradients a backward takes at once
// A backward that needs whole rows has the scores of a tile in shared memory, too.
constexpr bool SCORES_WAIT = NEEDS_ROW && BACKWARD;
constexpr int TILE_M = 128, TILE_N = 192, TILE_K = 64, STAGES = SCORES_WAIT ? 3 : 4;
constexpr int BYTES_A = TILE_M * TILE_K * 2, BYTES_B = TILE_N * TILE_K * 2;
constexpr int HALF_BYTES = 64 * TILE_N * 2;  // a finished half tile, between two warpgroups
constexpr int OFFSET_B = STAGES * BYTES_A;
constexpr int OFFSET_HALVES = OFFSET_B + STAGES * BYTES_B;
constexpr int OFFSET_SCORES = OFFSET_HALVES + 2 * HALF_BYTES;
constexpr int OFFSET_ROWS = OFFSET_SCORES + SCORES_WAIT * 2 * HALF_BYTES;  // figures of the rows, of two tiles in turn
constexpr int OFFSET_BARRIERS = OFFSET_ROWS + 2 * TILE_M * 16;
// 1024 for alignment; the host asks for this much
constexpr int SHARED_BYTES = OFFSET_BARRIERS + 2 * STAGES * 8 + 1024;
static_assert(SHARED_BYTES <= SHARED_BYTES_OF_HOST, "keep in step with pattention_sm90_driver.py");

struct alignas(64) TensorMap { u64 opaque[16]; };
struct TensorMaps { TensorMap of[MOST_PROJECTIONS]; };

struct Arguments {
    unsigned short* scores;   // [rows, row_stride], column proj * n + token: written by the forward unless null, read by the backward
    unsigned short* weights;  // as scores
    unsigned short* grads;    // as scores, of the backward alone
    float2* statistics;       // [rows, statistics_stride]: two figures of a row and projection
    u64* partials;            // [projections, tiles, padded rows], all bits ones at the start
    u64 row_stride;
    u32 statistics_stride;
    u32 rows, n, inner, projections;
    Scale scale;
};

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

// 16 bytes into shared memory, zeros unless `there`; for the thread that asked, after copies_wait.
__device__ __forceinline__ void copy_begin(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

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
