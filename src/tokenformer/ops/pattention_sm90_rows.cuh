// Figures of a row that several blocks work on: each block's part, and the whole. Third part of pattention_sm90.cu.

constexpr int PIECES = TILE_N / 64;  // of 8 neighbouring columns that a thread has of a row, 64 apart

// Eight neighbouring threads share a row.
__device__ __forceinline__ float sum_of_eight(float x) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

// Four neighbouring threads share a row of the product.
__device__ __forceinline__ float sum_of_four(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

__device__ __forceinline__ float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

__device__ __forceinline__ bool safe(float squares) { return squares > 1e-30f && squares < 1e36f; }
__device__ __forceinline__ float scale_of(float largest) {
    return largest > 0 ? 1.0f / fmaxf(largest, 1.2e-38f) : 1.0f;
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

// (scale, sum of scaled squares) of the product's rows, from where it was summed up: of a thread's row FIRST / 2 of two.
template <int FIRST>
__device__ __forceinline__ float2 squares_of_row(const float (&sums)[96]) {
    float even = 0.0f, odd = 0.0f;  // two chains, as each waits for itself
#pragma unroll
    for (int i = FIRST; i < 96; i += 4) even = fmaf(sums[i], sums[i], even), odd = fmaf(sums[i + 1], sums[i + 1], odd);
    float2 part = make_float2(1.0f, sum_of_four(even + odd));
    if (__any_sync(0xFFFFFFFFu, !safe(part.y))) {  // rare: rows of zeros, and squares that leave float32
        float largest = 0.0f, total = 0.0f;
#pragma unroll
        for (int i = FIRST; i < 96; i += 4) largest = fmaxf(largest, fmaxf(fabsf(sums[i]), fabsf(sums[i + 1])));
        const float scale = scale_of(largest_of_four(largest));
#pragma unroll
        for (int i = FIRST; i < 96; i += 4) {
            const float a = sums[i] * scale, b = sums[i + 1] * scale;
            total = fmaf(a, a, fmaf(b, b, total));
        }
        total = sum_of_four(total);
        if (!safe(part.y)) part = make_float2(scale, total);
    }
    return part;
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

// The two figures of a whole row, a scale and the norm of what it scales, from those of its tiles.
__device__ __forceinline__ float2 whole_norm(const u64* parts, u32 tiles, u64 padded_rows) {
    float total = 0.0f;
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
