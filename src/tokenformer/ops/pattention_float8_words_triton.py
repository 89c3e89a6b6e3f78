"""Float8 (e4m3) four at a time, in the words of 32 bits that hold them; Triton's own conversions take them one by one.

The instructions are the same for every GPU with float8; the interpreter, which has none, gets the arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenformer.ops.pattention_triton_math import INTERPRETED

_RESCALE = tl.constexpr("""
{
.reg .b16 low, high;
.reg .b32 first, second;
mov.b32 {low, high}, $1;
cvt.rn.f16x2.e4m3x2 first, low;
cvt.rn.f16x2.e4m3x2 second, high;
mul.rn.f16x2 first, first, $2;
mul.rn.f16x2 second, second, $2;
cvt.rn.satfinite.e4m3x2.f16x2 low, first;
cvt.rn.satfinite.e4m3x2.f16x2 high, second;
mov.b32 $0, {low, high};
}
""")

_ROUND = tl.constexpr("""
{
.reg .b16 low, high;
.reg .b32 first, second, a, b, c, d;
mov.b64 {first, second}, $1;
shl.b32 a, first, 16;
and.b32 b, first, 0xffff0000;
shl.b32 c, second, 16;
and.b32 d, second, 0xffff0000;
mul.f32 a, a, $2;
mul.f32 b, b, $2;
mul.f32 c, c, $2;
mul.f32 d, d, $2;
cvt.rn.satfinite.e4m3x2.f32 low, b, a;
cvt.rn.satfinite.e4m3x2.f32 high, d, c;
mov.b32 $0, {low, high};
}
""")


@triton.jit
def rounded(value, FLOAT8: tl.constexpr):
    """To the nearest float8. The interpreter loses a carry there (31.9 becomes 16), so it gets numbers of four bits."""
    if INTERPRETED:
        shifted = value * 1048577.0  # 2^20 + 1 (Veltkamp)
        value = shifted - (shifted - value)
    return value.to(FLOAT8)


@triton.jit
def rescaled(word, factor):
    """Words of four float8 times ``factor``, powers of two of at most 1, rounded once: by way of float16, which has all
    products but those below 2^-24, and these become zeros as they should."""
    factor = factor.to(tl.float16)
    if INTERPRETED:
        result = tl.zeros_like(word)
        for place in tl.static_range(4):
            byte = ((word >> (8 * place)) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            product = rounded(byte.to(tl.float32) * factor.to(tl.float32), tl.float8e4nv)
            result |= product.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * place)
        return result
    twice = factor.to(tl.uint16, bitcast=True).to(tl.int32) * 0x10001
    return tl.inline_asm_elementwise(_RESCALE, "=r,r,r", [word, twice], tl.int32, is_pure=True, pack=1)


@triton.jit
def four_rounded(four, factor):
    """Words of 64 bits that hold four bfloat16, times ``factor``, as words of four float8."""
    if INTERPRETED:
        result = tl.zeros_like(four).to(tl.int32)
        for place in tl.static_range(4):
            value = ((four >> (16 * place)) & 65535).to(tl.uint16).to(tl.bfloat16, bitcast=True)
            product = rounded(value.to(tl.float32) * factor, tl.float8e4nv)
            result |= product.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * place)
        return result
    bits = factor.to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(_ROUND, "=r,l,r", [four, bits], tl.int32, is_pure=True, pack=1)


@triton.jit
def _bytes_of(a, b, SELECT: tl.constexpr):
    """Four of the eight bytes of ``a`` and ``b``: a hexadecimal digit, 0 to 7, for each, the first one last."""
    if INTERPRETED:
        result = tl.zeros_like(a)
        for place in tl.static_range(4):
            chosen: tl.constexpr = (SELECT >> (4 * place)) & 7
            source = a if chosen < 4 else b
            result |= ((source >> (8 * (chosen % 4))) & 255) << (8 * place)
        return result
    return tl.inline_asm_elementwise(
        f"prmt.b32 $0, $1, $2, {SELECT};", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def columns_of(a, b, c, d):
    """Words of four columns [rows, words] of four rows a, b, c, d to words of these rows [rows, 4 * words]."""
    ab, cd = _bytes_of(a, b, 0x5140), _bytes_of(c, d, 0x5140)  # a0 b0 a1 b1, c0 d0 c1 d1
    first, second = _bytes_of(ab, cd, 0x5410), _bytes_of(ab, cd, 0x7632)
    ab, cd = _bytes_of(a, b, 0x7362), _bytes_of(c, d, 0x7362)  # a2 b2 a3 b3, c2 d2 c3 d3
    third, fourth = _bytes_of(ab, cd, 0x5410), _bytes_of(ab, cd, 0x7632)
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
