"""All layers of one token in one kernel: the order of its chunks here, its results in ``tests/generation``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("chunks", "programs"), [(576, 132), (288, 132), (96, 132), (576, 114), (6, 3), (30, 6)]
)
def test_the_order_of_the_values(chunks: int, programs: int) -> None:
    from tokenformer.ops.decode_layers import values_order

    order = values_order(chunks, programs)
    assert order.sort().values.tolist() == list(range(chunks))
    projections = order // (chunks // 3)
    vectors = [projections[program::programs].unique().numel() for program in range(programs)]
    assert max(vectors) <= 2  # a program makes one vector, or one more at the end
    whole = chunks // programs * programs
    assert all(projections[:whole][program::programs].unique().numel() <= 1 for program in range(programs))


def test_which_shapes_are_served() -> None:
    from tokenformer.ops.decode_layers import Shape

    assert Shape(1536, 16, 1536, 1536, 6144).is_served()
    assert Shape(768, 12, 3072, 3072, 6144).is_served()
    assert not Shape(1024, 16, 1792, 1792, 7168).is_served()
    assert not Shape(1000, 10, 1000, 1000, 4000).is_served()
    assert Shape(1536, 16, 1536, 1536, 6144).phases() == [576, 576, 192, 192, 768, 768]


def test_what_is_on_its_way_fits_a_multiprocessor() -> None:
    from tokenformer.ops.decode_layers import ROWS, pieces_and_stages

    assert pieces_and_stages(1536, 2) == (256, 8)
    assert pieces_and_stages(768, 2) == (256, 16)
    for hidden in (16, 80, 1024, 2048, 4096):
        piece, stages = pieces_and_stages(hidden, 2)
        assert hidden % piece == 0
        assert 2 <= stages <= 16
        assert (stages - 1) * ROWS * hidden * 2 < 227 * 1024


COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenformer.ops.decode_layers import pieces_and_stages
from tokenformer.ops.decode_layers_triton import layers
piece, stages = pieces_and_stages(1536, 2)
constants = dict(KIND=1, TANH=False, EXACT=False, SPLITS=8, ROTARY=24, FEATURES=128, BLOCK=64)
constants |= dict(ROWS=8, PIECE=piece, PIECES=1536 // piece, STAGES=stages, TURNS=None, PART=0, MEET=True)
types = dict.fromkeys(("stream", "key_cache", "value_cache"), "*bf16")
types |= dict.fromkeys(("space", "cosine", "sine"), "*fp32") | {"counters": "*i32"}
types |= dict.fromkeys(("lengths", "starts", "positions"), "*i64") | dict.fromkeys(constants, "constexpr")
floats = ("scale", "layer_norm_eps", "tau_qkv", "tau_proj", "tau_ffn", "norm_eps")
types |= dict.fromkeys(floats, "fp32")
names = layers.arg_names
pointers = [name for name in names if types.get(name, "").startswith("*")]
divisible = [names.index(name) for name in (*pointers, "capacity", "d", "head_size")]
source = ASTSource(
    layers, {name: types.get(name, "i32") for name in names}, constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
)
options = dict(num_warps=8, launch_cooperative_grid=True)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
copies = re.findall(r"ttg.async_copy_global_to_local.*tensor<(\\w+)x!tt.ptr<(\\w+)>", made.asm["ttgir"])
print(len(copies), set(copies))
print(made.metadata.shared)
"""


def test_compiled_for_a_gpu_weights_alone_are_pipelined() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run(
        [sys.executable, "-"], input=COMPILED, capture_output=True, text=True, env=environment, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    # of six pieces: seven chunks before the loop, and one in it
    assert made.stdout.splitlines() == ["48 {('8x256', 'bf16')}", made.stdout.splitlines()[1]]
    assert int(made.stdout.splitlines()[1]) < 227 * 1024
