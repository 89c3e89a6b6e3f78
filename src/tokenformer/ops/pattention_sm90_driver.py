"""The kernel for Hopper GPUs, ``pattention_sm90.cu``, compiled and loaded, and how it finds tiles of a matrix.

The compiler is NVRTC, launches go through the driver; both come with torch's CUDA builds (``cuda-bindings``). Compiled
kernels are kept in Triton's cache.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from tokenformer.ops.pattention import NORM_ACTIVATIONS

BLOCKS = 2
"""Of a cluster, one below the other."""
SHARED_BYTES = 226_352
"""Of a block, in the form that needs most."""
MAP_BYTES = 128
"""Of a tensor map."""
_PARTS = (
    "pattention_sm90_math.cuh",
    "pattention_sm90_instructions.cuh",
    "pattention_sm90_rows.cuh",
    "pattention_sm90_finish.cuh",
    "pattention_sm90.cu",
)


@functools.lru_cache(maxsize=4096)
def tensor_map(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> Any:
    """How the copy engine finds a tile: axes from the innermost on, strides in elements of the others."""
    from cuda.bindings import driver

    bfloat16 = driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    (tensor_map,) = check(
        driver.cuTensorMapEncodeTiled(
            bfloat16,
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(2 * stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(1) for _ in sizes],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return tensor_map


@functools.cache
def compiled_kernel(device: int, backward: bool, norm_activation: Any, gelu_approximate: str) -> Any:
    """The kernel in this device's context, which is current."""
    from cuda.bindings import driver

    defines = (
        f"-DBACKWARD={int(backward)}",
        f"-DKIND={NORM_ACTIVATIONS.index(norm_activation)}",
        f"-DTANH={int(gelu_approximate == 'tanh')}",
        f"-DSHARED_BYTES_OF_HOST={SHARED_BYTES}",
        f"-DBLOCKS_OF_CLUSTER={BLOCKS}",
    )
    (module,) = check(driver.cuModuleLoadData(_binary(defines)))
    (function,) = check(driver.cuModuleGetFunction(module, b"pattention"))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(driver.cuFuncSetAttribute(function, attribute, SHARED_BYTES))
    return function


def _binary(defines: tuple[str, ...]) -> bytes:
    """The kernel compiled with these defines, from Triton's cache where it is there."""
    from cuda.bindings import nvrtc
    from triton.runtime.cache import get_cache_manager

    source = b"".join((Path(__file__).parent / part).read_bytes() for part in _PARTS)
    options = ("--gpu-architecture=sm_90a", "--std=c++17", *defines)
    version = check(nvrtc.nvrtcVersion())
    key = hashlib.sha256(source + repr((options, version)).encode()).hexdigest()
    cache = get_cache_manager(key)
    if (path := cache.get_file("pattention_sm90.cubin")) is not None:
        return Path(path).read_bytes()
    (program,) = check(nvrtc.nvrtcCreateProgram(source, b"pattention_sm90.cu", 0, [], []))
    encoded = [option.encode() for option in options]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        (size,) = check(nvrtc.nvrtcGetProgramLogSize(program))
        log = b" " * size
        check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"pattention_sm90.cu does not compile with NVRTC {version}: {log.decode()}")
    (size,) = check(nvrtc.nvrtcGetCUBINSize(program))
    binary = b" " * size
    check(nvrtc.nvrtcGetCUBIN(program, binary))
    cache.put(binary, "pattention_sm90.cubin", binary=True)
    return binary


def check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver or the compiler returned beside its status.

    Raises:
        RuntimeError: the status is not success.
    """
    status, *values = result
    if status != type(status)(0):
        raise RuntimeError(f"pattention_sm90: {status!r}")
    return tuple(values)
