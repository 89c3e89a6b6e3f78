// What Pattention's kernel for Hopper GPUs does to one score: the weight, its gradient, the figures of the row. In float32;
// as pattention_triton_math.py. First part of the kernel, see pattention_sm90.cu; compiled with -DKIND= and -DTANH=.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int GELU = 0, L2_NORM_GELU = 1, GELU_L2_NORM = 2, SOFTMAX = 3;
constexpr bool NEEDS_ROW = KIND != GELU;

__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

#ifdef __CUDACC__
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
#else  // a processor, which the tests compile this part for
inline float power_of_two(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }
#endif

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
    return {value, fmaf(fmaf(-value, sigmoid, value), slope, sigmoid)};  // no slope wanted: the compiler drops it
}

__device__ __forceinline__ float exponential(float x) { return power_of_two(x * LOG2_E); }

// What a row's scores go through, and for the gradient `along`: its sum over the row, ready to be taken off.
struct Row { float first, factor, along; };

struct Scale { float root, tau, eps; };  // root: of tau; eps: added to norms

// From the two figures of a row: a scale and the norm of what it scales (softmax: the largest score and the sum of exponentials).
__device__ __forceinline__ float row_factor(const Scale& scale, float first, float second) {
    if (KIND == SOFTMAX) return scale.tau / second;
    return fminf(scale.root / (second + scale.eps * first) * first, 3e38f);
}

__device__ __forceinline__ float along_row(const Scale& scale, float sum, float second, float factor) {
    return KIND == SOFTMAX ? sum / scale.tau : sum / (scale.root * second) * factor;
}

__device__ __forceinline__ float weight_of(float score, const Row& row) {
    if (KIND == GELU) return gelu(score).value;
    if (KIND == L2_NORM_GELU) return gelu(score * row.factor).value;
    if (KIND == GELU_L2_NORM) return gelu(score).value * row.factor;
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
        const float y = score * row.factor;
        const Activation a = gelu(y);
        const float through = grad * a.slope;
        return {a.value, through, y * through};
    }
    const float weight = weight_of(score, row);
    return {weight, grad, weight * grad};
}

// Second look: through y = c s / (r + eps), r = |s|: ds = c dy / (r + eps) - y (y . dy) / (c r). A row that is scaled, because the
// squares leave float32, is so before it meets `along`.
__device__ __forceinline__ float score_gradient(float score, float kept, const Row& row) {
    if (KIND == SOFTMAX) return (kept - row.along) * weight_of(score, row);
    if (KIND == L2_NORM_GELU) return fmaf(-row.along, score * row.first, kept * row.factor);
    const Activation a = gelu(score);
    return fmaf(-row.along, a.value * row.first, kept * row.factor) * a.slope;
}
