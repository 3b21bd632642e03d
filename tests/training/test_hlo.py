"""Counts read from the text of a program: against numbers worked out by hand, and XLA's own where it has no loops."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from audiozoo.training import hlo
from audiozoo.training.hlo import Collective


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arguments).compile()


def test_a_loop_counts_as_often_as_it_turns():
    def deep(x, layers):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]
        return jnp.mean(x)

    program = hlo.read(compiled(jax.grad(deep, argnums=1), (8, 32), (6, 32, 32)).as_text())
    assert program.flops == 6 * 3 * 2 * 8 * 32 * 32  # forward, and two products backward
    assert program.unknown_loops == 0

    def nested(x, layers):
        return lax.fori_loop(0, 5, lambda _, x: lax.scan(lambda x, w: (x @ w, None), x, layers)[0], x)

    assert hlo.read(compiled(nested, (8, 32), (6, 32, 32)).as_text()).flops == 5 * 6 * 2 * 8 * 32 * 32


def test_a_loop_of_unknown_length_is_told():
    def until(x, w):
        return lax.while_loop(lambda x: jnp.sum(x) < 1e3, lambda x: x @ w, x)

    program = hlo.read(compiled(until, (8, 32), (32, 32)).as_text())
    assert program.unknown_loops == 1
    assert program.flops == 2 * 8 * 32 * 32


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1,), "padding": "SAME"},
        {"window_strides": (3,), "padding": [(2, 5)]},
        {"window_strides": (1,), "padding": [(4, 4)], "lhs_dilation": (3,)},
        {"window_strides": (2,), "padding": [(0, 9)], "rhs_dilation": (4,)},
        {"window_strides": (1,), "padding": "VALID", "feature_group_count": 4},
    ],
    ids=str,
)
def test_convolutions_count_as_in_xla(options):
    """What meets padding, or the holes of a dilated input, is no operation."""
    inputs = 8 // options.get("feature_group_count", 1)

    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=("NWC", "WIO", "NWC"), **options)

    program = compiled(convolve, (2, 50, 8), (5, inputs, 12))
    assert hlo.read(program.as_text()).flops == pytest.approx(program.cost_analysis()["flops"], rel=1e-6)


LINES = """
HloModule one, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%scatter (p: f32[64,8]) -> f32[8,8] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[64,8]{1,0} all-reduce(%p), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%sum
  ROOT %slice = f32[8,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,8}
}

%body (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %p = (s32[], f32[16,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %moved = f32[16,8]{1,0:T(8,128)S(1)} collective-permute(%x), channel_id=4, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[16,8]{1,0:T(8,128)S(1)}) tuple(%next, %moved)
}

%test (p: (s32[], f32[16,8])) -> pred[] {
  %p = (s32[], f32[16,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[64,8], y: f32[16,8]) -> f32[8,8] {
  %x = f32[64,8]{1,0:T(8,128)} parameter(0)
  %y = f32[16,8]{1,0:T(8,128)} parameter(1)
  %all-gather-start = (f32[16,8], f32[64,8]) all-gather-start(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %all-gather-done = f32[64,8] all-gather-done(%all-gather-start)
  %two = s32[] constant(2)
  %begin = (s32[], f32[16,8]{1,0}) tuple(%two, %y)
  %loop = (s32[], f32[16,8]{1,0}) while(%begin), condition=%test, body=%body
  ROOT %part = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%scatter
}
"""


def test_collectives_by_kind_size_and_number_of_devices():
    """As a TPU's compiler writes them: begun and done apart, inside loops, and a reduce-scatter inside a fusion."""
    found = set(hlo.read(LINES).collectives)
    assert found == {
        Collective("reduce-scatter", 8, 64 * 8 * 4, 1),
        Collective("all-gather", 4, 64 * 8 * 4, 1),
        Collective("collective-permute", 2, 16 * 8 * 4, 5),
    }
    assert Collective("all-reduce", 4, 1000, 2).sent == 2 * 2 * 750
    assert Collective("all-gather", 4, 1000, 2).sent == 2 * 750


def test_bytes_are_those_of_main_memory():
    def shifted(x, y):
        return lax.dynamic_slice(x, (3, 0), (2, 64)) + y

    moved = hlo.read(compiled(shifted, (4096, 64), (2, 64)).as_text()).bytes
    assert 3 * 2 * 64 * 4 <= moved <= 6 * 2 * 64 * 4  # of the 4096 rows two are read
    # On a TPU what lies in the chip's own memory is free: of the program above, x and its part are left, and y.
    assert hlo.read(LINES).bytes == (64 * 8 + 8 * 8) * 4 + (16 * 8 + 64 * 8 + 16 * 8) * 4 + 5 * 3 * 4
