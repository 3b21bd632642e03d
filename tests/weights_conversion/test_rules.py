"""The rule engine: exact both ways, strict both ways, and one listing of everything that does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiozoo.errors import CheckpointError
from weights_conversion import labels_from_hugging_face, rules
from weights_conversion.readers import TensorSource
from weights_conversion.readers.tensors import Slab
from weights_conversion.rules import (
    Constant,
    Ignore,
    Rule,
    Table,
    Tied,
    conv1d,
    conv2d,
    conv_transpose1d,
    flip,
    fuse,
    identity,
    permute,
    reshape,
    split,
    split_dropping_zeros,
    squeeze,
    stack,
    transpose,
    unsqueeze,
)


class File:
    """Tensors in memory that count how often each is read."""

    def __init__(self, **tensors):
        self.tensors = {name.replace("__", "."): np.asarray(array) for name, array in tensors.items()}
        self.reads = []

    @classmethod
    def of(cls, tensors):
        file = cls()
        file.tensors = dict(tensors)
        return file

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def dtype(self, name):
        return self.tensors[name].dtype

    def read(self, name):
        self.reads.append(name)
        return self.tensors[name].copy()


def numbers(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def expected(**shapes):
    return {name.replace("__", "."): np.empty(shape) for name, shape in shapes.items()}


def complaint(table, file, wanted, **names):
    """The lines of the listing that `plan` raises."""
    with pytest.raises(CheckpointError) as caught:
        table.plan(file, wanted, **names)
    assert not file.reads or table.tied, "nothing is read before the file is known to fit"
    return str(caught.value).split("\n")


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == np.ascontiguousarray(b).tobytes()


# --- operations ------------------------------------------------------------------------------------------------------

CASES = {
    "identity": (identity, [(3, 4)], [(3, 4)]),
    "transpose": (transpose, [(3, 4)], [(4, 3)]),
    "conv1d": (conv1d, [(6, 2, 5)], [(5, 2, 6)]),
    "conv2d": (conv2d, [(6, 2, 5, 7)], [(5, 7, 2, 6)]),
    "conv_transpose1d": (conv_transpose1d, [(6, 2, 5)], [(5, 6, 2)]),
    "permute": (permute(1, 2, 0), [(2, 3, 4)], [(3, 4, 2)]),
    "permute of four": (permute(3, 0, 2, 1), [(2, 3, 4, 5)], [(5, 2, 4, 3)]),
    "squeeze": (squeeze(2), [(3, 4, 1)], [(3, 4)]),
    "squeeze from the end": (squeeze(-1), [(3, 4, 1)], [(3, 4)]),
    "unsqueeze": (unsqueeze(1), [(3, 4)], [(3, 1, 4)]),
    "unsqueeze at the end": (unsqueeze(-1), [(3, 4)], [(3, 4, 1)]),
    "reshape": (reshape((2, 6), (3, 4)), [(3, 4)], [(2, 6)]),
    "reshape with a free length": (reshape((-1,), (3, -1)), [(3, 4)], [(12,)]),
    "split": (split(3), [(6, 4)], [(2, 4)] * 3),
    "split along 1": (split(2, 1), [(6, 4)], [(6, 2)] * 2),
    "split unevenly": (split((1, 3, 2)), [(6, 4)], [(1, 4), (3, 4), (2, 4)]),
    "fuse": (fuse(3), [(2, 4)] * 3, [(6, 4)]),
    "fuse unevenly along 1": (fuse((1, 3), 1), [(2, 1), (2, 3)], [(2, 4)]),
    "stack": (stack(), [(2, 4)] * 3, [(3, 2, 4)]),
    "stack along 1": (stack(1), [(2, 4)] * 3, [(2, 3, 4)]),
    "flip": (flip(0), [(3, 4)], [(3, 4)]),
    "chain": (split(3) >> transpose, [(6, 4)], [(4, 2)] * 3),
    "chain of three": (unsqueeze(0) >> permute(2, 1, 0) >> flip(0), [(3, 4)], [(4, 3, 1)]),
    "chain into fuse": (transpose >> fuse(2, 1), [(3, 4), (3, 4)], [(4, 6)]),
}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int8, bool]


def bits(shape, dtype, seed=0):
    """Every bit pattern that falls: NaN payloads, infinities, denormals and minus zero too."""
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
    return (raw & 1).view(bool).reshape(shape) if dtype is bool else raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("case", CASES)
def test_every_operation_goes_there_and_back_to_the_bit(case, dtype):
    operation, shapes, results = CASES[case]
    foreign = tuple(bits(shape, dtype, seed) for seed, shape in enumerate(shapes))
    ours = operation.forward(foreign)
    assert [a.shape for a in ours] == results
    assert {a.dtype for a in ours} == {np.dtype(dtype)}
    back = operation.inverse(ours)
    assert len(back) == len(foreign)
    assert all(same_bits(a, b) for a, b in zip(foreign, back, strict=True))
    again = operation.forward(back)
    assert all(same_bits(np.ascontiguousarray(a), b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_every_operation_is_linear(case):
    """Gradients go through the table as weights do."""
    operation, shapes, _ = CASES[case]
    a = tuple(numbers(*shape, dtype=np.float64, seed=1) for shape in shapes)
    b = tuple(numbers(*shape, dtype=np.float64, seed=2) for shape in shapes)
    both = operation.forward(tuple(x + 2 * y for x, y in zip(a, b, strict=True)))
    for mixed, x, y in zip(both, operation.forward(a), operation.forward(b), strict=True):
        np.testing.assert_array_equal(mixed, x + 2 * y)


def test_layouts_are_those_of_the_convolutions():
    """Each kernel computes in our layout what it computes in PyTorch's."""
    kernel = numbers(6, 2, 5)  # (out, in, time)
    window = numbers(2, 5)
    there = np.einsum("oit,it->o", kernel, window)
    (ours,) = conv1d.forward((kernel,))
    np.testing.assert_allclose(np.einsum("tio,it->o", ours, window), there, rtol=1e-5)
    transposed = numbers(2, 6, 5)  # (in, out, time)
    (ours,) = conv_transpose1d.forward((transposed,))
    np.testing.assert_allclose(
        np.einsum("tio,i->ot", ours, window[:, 0]), np.einsum("iot,i->ot", transposed, window[:, 0]), rtol=1e-5
    )
    image = numbers(6, 2, 5, 7)  # (out, in, height, width)
    (ours,) = conv2d.forward((image,))
    np.testing.assert_array_equal(ours[1, 2], image[:, :, 1, 2].T)


def test_split_dropping_zeros():
    operation = split_dropping_zeros((True, False, True))
    kept = numbers(2), numbers(2, seed=1)
    fused = np.concatenate([kept[0], np.zeros(2, np.float32), kept[1]])
    ours = operation.forward((fused,))
    assert all(same_bits(a, b) for a, b in zip(ours, kept, strict=True))
    assert same_bits(operation.inverse(ours)[0], fused)
    with pytest.raises(CheckpointError, match="not zero"):
        operation.forward((np.ones(6, np.float32),))


@pytest.mark.parametrize(
    ("operation", "shapes"),
    [
        (split(3), [(5, 2)]),
        (split((1, 2)), [(5, 2)]),
        (split((2, 4)), [(5, 2)]),
        (fuse(2), [(2, 2), (3, 2)]),
        (fuse((2, 3)), [(3, 2), (2, 2)]),
        (stack(), [(2, 2), (3, 2)]),
        (transpose, [(2, 3, 4)]),
        (transpose, [(2,)]),
        (conv1d, [(2, 3)]),
        (squeeze(0), [(2, 3)]),
        (reshape((4,), (2, 2)), [(2, 3)]),
        (reshape((-1,), (2, 2)), [(2, 3)]),
        (split_dropping_zeros((True, False)), [(3,)]),
    ],
    ids=lambda x: x.name if hasattr(x, "name") else str(x),
)
def test_a_shape_that_does_not_go_through_is_an_error_and_not_a_silent_loss(operation, shapes):
    """Whatever `forward` accepts, `inverse` must give back; else export would differ from what was imported."""
    names = tuple(f"t{i}" for i in range(len(shapes)))
    outputs = 1 if len(shapes) > 1 else {"split": 3}.get(operation.name.split("(")[0], 1)
    outputs = 2 if operation.name.startswith("split((") else outputs
    paths = tuple(f"p{i}" for i in range(outputs))
    file = File(**{name: np.zeros(shape, np.float32) for name, shape in zip(names, shapes, strict=True)})
    table = Table([Rule(names, paths, operation)])
    arrays = tuple(file.tensors.values())
    try:
        given = operation.forward(arrays)
    except ValueError:
        given = None
    model = {path: np.empty(a.shape) for path, a in zip(paths, given or [np.empty((2, 2))] * outputs, strict=False)}
    lines = complaint(table, file, model)
    assert any(line.startswith("  !") for line in lines), lines


# --- rules -----------------------------------------------------------------------------------------------------------


def test_placeholders():
    rule = Rule("m.{s:encoder|decoder}.layers.{i}.{n:a|b}.w", "{s}.blocks.{i}.{n}.k")
    values = rule.match_foreign("m.decoder.layers.12.b.w")
    assert values == {"s": "decoder", "i": "12", "n": "b"}
    assert rule.our_paths(values) == ("decoder.blocks.12.b.k",)
    assert rule.match_ours("decoder.blocks.12.b.k") == values
    assert rule.foreign_names(values) == ("m.decoder.layers.12.b.w",)
    for name in (
        "m.other.layers.1.a.w",
        "m.encoder.layers.x.a.w",
        "m.encoder.layers.1.c.w",
        "m.encoder.layers.1.a.w.x",
    ):
        assert rule.match_foreign(name) is None
    for name in ("Xm.encoder.layers.1.a.w", "m-encoder.layers.1.a.w", "m.encoder.layers.1.a.w\n"):
        assert rule.match_foreign(name) is None


def test_a_placeholder_twice_in_a_template_is_one_value():
    rule = Rule("a.{i}.b.{i}", "c.{i}")
    assert rule.match_foreign("a.1.b.1") == {"i": "1"}
    assert rule.match_foreign("a.1.b.2") is None
    assert rule.foreign_names({"i": "7"}) == ("a.7.b.7",)


def test_templates_must_name_the_same_placeholders():
    for foreign, ours in [("a.{i}", "b"), ("a", "b.{i}"), ("a.{i}", "b.{j}"), (("a.{i}", "c"), "b.{i}")]:
        with pytest.raises(ValueError, match="same placeholders"):
            Rule(foreign, ours)


def test_numbers_that_count_differently():
    odd = Rule("flow.{i}.w", "flow.{i}.k", numbers={"i": (2, 1)})
    assert odd.match_foreign("flow.5.w") == {"i": "2"}
    assert odd.match_foreign("flow.4.w") is None
    assert odd.match_foreign("flow.0.w") is None  # before the first
    assert odd.foreign_names({"i": "2"}) == ("flow.5.w",)
    assert odd.match_ours("flow.2.k") == {"i": "2"}


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 10**6))
def test_numbers_go_there_and_back(step, offset, ours):
    rule = Rule("a.{i}.w", "b.{i}.k", numbers={"i": (step, offset)})
    (name,) = rule.foreign_names({"i": str(ours)})
    assert name == f"a.{step * ours + offset}.w"
    assert rule.match_foreign(name) == {"i": str(ours)}


def test_numbers_are_written_one_way_only():
    """`a.01` is not `a.1`: export could not give the first name back."""
    rule = Rule("a.{i}", "b.{i}", numbers={"i": (1, 0)})
    plain = Rule("a.{i}", "b.{i}")
    for each in (rule, plain):
        values = each.match_foreign("a.01")
        assert values is None or each.foreign_names(values) == ("a.01",)


def test_a_prefixed_rule_lies_one_level_deeper_on_both_sides():
    rule = Rule(("x.{i}.a", "x.{i}.b"), "y.{i}", stack(), {"i": (1, 3)}).prefixed("m.", "n.")
    assert rule.match_foreign("m.x.3.b") == {"i": "0"}
    assert rule.our_paths({"i": "0"}) == ("n.y.0",)
    assert rule.foreign_names({"i": "0"}) == ("m.x.3.a", "m.x.3.b")


# --- tables ----------------------------------------------------------------------------------------------------------

TABLE = Table(
    rules=[
        Rule("layers.{i}.qkv.weight", tuple(f"blocks.{{i}}.{p}.kernel" for p in "qkv"), split(3) >> transpose),
        Rule(("layers.{i}.up.weight", "layers.{i}.gate.weight"), "blocks.{i}.mlp.kernel", transpose >> fuse(2, 1)),
        Rule("embed.weight", "embed.embedding"),
    ],
    renames=[(r"^old\.", ""), (r"\.gamma$", ".weight")],
    ignored=[Ignore(r"layers\.\d+\.steps", "a counter")],
    tied=[Tied("head.weight", "embed.weight")],
)


def checkpoint(layers=2):
    tensors = {"embed.weight": numbers(7, 4)}
    for i in range(layers):
        tensors[f"layers.{i}.qkv.weight"] = numbers(12, 4, seed=i)
        tensors[f"layers.{i}.up.weight"] = numbers(8, 4, seed=i + 10)
        tensors[f"layers.{i}.gate.weight"] = numbers(8, 4, seed=i + 20)
    return tensors


def model(layers=2):
    shapes = {"embed.embedding": (7, 4)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.{p}.kernel": (4, 4) for p in "qkv"} | {f"blocks.{i}.mlp.kernel": (4, 16)}
    return {path: np.empty(shape) for path, shape in shapes.items()}


def load(table, file, wanted):
    return dict(table.read(file, table.plan(file, wanted)))


def test_there_and_back():
    file = File.of(checkpoint())
    ours = load(TABLE, file, model())
    assert {p: a.shape for p, a in ours.items()} == {p: a.shape for p, a in model().items()}
    np.testing.assert_array_equal(ours["blocks.1.k.kernel"], file.tensors["layers.1.qkv.weight"][4:8].T)
    np.testing.assert_array_equal(ours["blocks.0.mlp.kernel"][:, 8:], file.tensors["layers.0.gate.weight"].T)
    back = dict(TABLE.write(ours))
    assert back.keys() == file.tensors.keys()
    assert all(same_bits(back[n], file.tensors[n]) and back[n].flags.c_contiguous for n in back)


def test_each_tensor_is_read_once():
    file = File.of(checkpoint())
    load(TABLE, file, model())
    assert sorted(file.reads) == sorted(file.tensors)


def test_the_order_of_the_file_does_not_matter():
    one = load(TABLE, File.of(checkpoint()), model())
    other = load(TABLE, File.of(dict(reversed(checkpoint().items()))), model())
    assert one.keys() == other.keys()
    assert all(same_bits(np.ascontiguousarray(one[p]), other[p]) for p in one)


def test_a_key_that_no_rule_takes():
    lines = complaint(TABLE, File.of(checkpoint() | {"surprise": numbers(3)}), model(), where="The file", model="Net")
    assert lines == [
        "The file does not fit Net: 1 unexpected (+), 0 missing (-), 0 of a wrong shape (!).",
        "  + surprise  (no rule takes it)",
    ]


def test_a_key_that_two_rules_take():
    table = Table([Rule("a.{i}", "x.{i}"), Rule("a.{j}", "y.{j}")])
    lines = complaint(table, File(a__0=numbers(2)), expected(x__0=(2,)))
    assert "  + a.0  (2 rules take it)" in lines


def test_a_parameter_that_nothing_fills():
    tensors = checkpoint()
    del tensors["embed.weight"]
    lines = complaint(TABLE, File.of(tensors), model())
    assert lines[1:] == ["  - embed.embedding  (shape (7, 4); nothing in the file fills it)"]


def test_a_deeper_file_and_a_deeper_model():
    lines = complaint(TABLE, File.of(checkpoint(3)), model(2))
    assert lines[0].endswith("3 unexpected (+), 0 missing (-), 0 of a wrong shape (!).")
    assert "  + layers.2.qkv.weight  (the model has no such parameter)" in lines
    lines = complaint(TABLE, File.of(checkpoint(1)), model(2))
    assert lines[0].endswith("0 unexpected (+), 4 missing (-), 0 of a wrong shape (!).")


def test_half_of_a_fused_pair():
    tensors = checkpoint()
    del tensors["layers.1.gate.weight"]
    lines = complaint(TABLE, File.of(tensors), model())
    assert "  - layers.1.gate.weight  (goes together with layers.1.up.weight)" in lines


def test_a_part_of_what_a_fused_tensor_gives_is_not_in_the_model():
    wanted = model()
    del wanted["blocks.0.k.kernel"]
    lines = complaint(TABLE, File.of(checkpoint()), wanted)
    assert lines[1:] == ["  + layers.0.qkv.weight  (the model has no blocks.0.k.kernel)"]


def test_wrong_shapes():
    lines = complaint(TABLE, File.of(checkpoint() | {"embed.weight": numbers(8, 4)}), model())
    assert lines[1:] == ["  ! embed.weight  (gives embed.embedding the shape (8, 4); the model has (7, 4))"]
    lines = complaint(TABLE, File.of(checkpoint() | {"layers.0.qkv.weight": numbers(11, 4)}), model())
    assert "  ! layers.0.qkv.weight  (shape (11, 4) does not go through split(3, 0) >> permute(1, 0))" in lines
    lines = complaint(
        TABLE, File.of(checkpoint() | {"embed.weight": numbers(4, 7)}), model()
    )  # not transposed in silence
    assert any(line.startswith("  ! embed.weight") for line in lines)


def test_everything_wrong_is_listed_at_once():
    tensors = checkpoint(3) | {"surprise": numbers(1), "embed.weight": numbers(1, 1)}
    del tensors["layers.0.qkv.weight"]
    lines = complaint(TABLE, File.of(tensors), model())
    assert lines[0].endswith("4 unexpected (+), 3 missing (-), 1 of a wrong shape (!).")
    assert len(lines) == 1 + 8


def test_a_long_listing_is_cut_and_says_so():
    lines = complaint(TABLE, File.of(checkpoint() | {f"x{i}": numbers(1) for i in range(100)}), model())
    assert "100 unexpected" in lines[0]
    assert lines[-1] == "  … and 40 more"


def test_two_sources_for_one_parameter():
    table = Table([Rule("a", "x"), Rule("b", "x")])
    lines = complaint(table, File(a=numbers(2), b=numbers(2)), expected(x=(2,)))
    assert "  + b  (x is already filled)" in lines


def test_two_rules_for_one_parameter_cannot_be_exported():
    table = Table([Rule("a", "x"), Rule("b", "x")])
    with pytest.raises(CheckpointError, match=r"x  \(2 rules for this parameter\)"):
        list(table.write({"x": numbers(2)}))


def test_a_parameter_without_a_rule_cannot_be_exported():
    with pytest.raises(CheckpointError, match=r"other\.kernel  \(no rule for this parameter\)"):
        list(TABLE.write(load(TABLE, File.of(checkpoint()), model()) | {"other.kernel": numbers(1)}))


def test_half_of_a_fused_tensor_cannot_be_exported():
    ours = load(TABLE, File.of(checkpoint()), model())
    del ours["blocks.0.q.kernel"]
    with pytest.raises(CheckpointError, match=r"blocks\.0\.q\.kernel"):
        list(TABLE.write(ours))


def test_older_names():
    tensors = checkpoint()
    tensors["old.embed.gamma"] = tensors.pop("embed.weight")
    ours = load(TABLE, File.of(tensors), model())
    np.testing.assert_array_equal(ours["embed.embedding"], tensors["old.embed.gamma"])
    assert dict(TABLE.write(ours)).keys() == checkpoint().keys()  # export writes today's names


def test_the_same_tensor_under_an_old_and_a_new_name():
    lines = complaint(TABLE, File.of(checkpoint() | {"old.embed.weight": numbers(7, 4)}), model())
    assert "  + old.embed.weight  (the same tensor as embed.weight)" in lines


def test_ignored_keys_must_match_in_full():
    assert load(TABLE, File.of(checkpoint() | {"layers.0.steps": np.array(3)}), model())
    lines = complaint(TABLE, File.of(checkpoint() | {"layers.0.steps.more": np.array(3)}), model())
    assert "  + layers.0.steps.more  (no rule takes it)" in lines


def test_tied_keys_are_compared_to_the_bit_and_left_out():
    tensors = checkpoint()
    assert load(TABLE, File.of(tensors | {"head.weight": tensors["embed.weight"]}), model()).keys() == model().keys()
    with_nan = tensors | {"embed.weight": np.full((7, 4), np.nan, np.float32)}
    assert load(TABLE, File.of(with_nan | {"head.weight": with_nan["embed.weight"]}), model())
    changed = tensors["embed.weight"].copy()
    changed[3, 2] = np.nextafter(changed[3, 2], np.float32(9))
    for other in (changed, tensors["embed.weight"].astype(np.float64), tensors["embed.weight"][:-1]):
        lines = complaint(TABLE, File.of(tensors | {"head.weight": other}), model())
        assert "  + head.weight  (differs from embed.weight, to which the model ties it)" in lines


def test_constants_are_left_out_and_written_again():
    table = dataclasses.replace(TABLE, constants=[Constant("mask", lambda: np.tri(3))])
    for tensors in (checkpoint(), checkpoint() | {"mask": np.tri(3)}):
        ours = load(table, File.of(tensors), model())
        assert ours.keys() == model().keys()
        back = dict(table.write(ours))
        assert back.keys() == checkpoint().keys() | {"mask"}
        np.testing.assert_array_equal(back["mask"], np.tri(3))


def test_tied_keys_are_compared_to_the_last_piece(monkeypatch):
    monkeypatch.setattr(rules, "_COMPARED_BYTES", 8)
    table = Table([Rule("a.weight", "a.kernel")], tied=[Tied("b.weight", "a.weight")])
    values, other = numbers(5), numbers(5)
    table.plan(File(a__weight=values, b__weight=other), expected(a__kernel=5))
    other[-1] += 1
    assert (
        "differs from a.weight" in complaint(table, File(a__weight=values, b__weight=other), expected(a__kernel=5))[1]
    )


def test_tied_keys_that_lie_in_one_place_are_not_read(tmp_path):
    """Two names of one PyTorch storage: a table of tokens, which may be a gigabyte, would be read twice."""
    table = Table([Rule("a.weight", "a.kernel")], tied=[Tied("b.weight", "a.weight")])
    for offset, outcome in ((0, contextlib.nullcontext()), (4, pytest.raises(CheckpointError, match="cannot be read"))):
        places = {"a.weight": 0, "b.weight": offset}
        slabs = {n: Slab(tmp_path / "gone", start, (5,), np.dtype(np.float32)) for n, start in places.items()}
        with outcome:
            table.plan(TensorSource(tmp_path, "pytorch", slabs, {}), expected(a__kernel=5))


def test_minus_zero_is_not_zero_where_tied():
    tensors = checkpoint() | {"embed.weight": np.zeros((7, 4), np.float32)}
    lines = complaint(TABLE, File.of(tensors | {"head.weight": -tensors["embed.weight"]}), model())
    assert any("differs" in line for line in lines)


def test_a_tied_key_alone_stands_for_the_other():
    """Some files hold only the head of a tied pair."""
    tensors = checkpoint()
    tensors["head.weight"] = tensors.pop("embed.weight")
    ours = load(TABLE, File.of(tensors), model())
    np.testing.assert_array_equal(ours["embed.embedding"], tensors["head.weight"])


def test_what_may_be_absent():
    tensors = checkpoint()
    del tensors["embed.weight"]
    steps = TABLE.plan(File.of(tensors), model(), may_be_absent=r"embed\..*")
    assert "embed.embedding" not in {path for step in steps for path in step.ours}
    with pytest.raises(CheckpointError):
        TABLE.plan(File.of(tensors), model(), may_be_absent=r"embed")


def test_planning_takes_less_memory_than_the_largest_tensor():
    """A published size is planned from shapes; an operation that joins tensors is tried on a byte a value."""

    class Shapes(File):
        def shape(self, name):
            return (4096, 4096)

        def dtype(self, name):
            return np.dtype(np.float64)

    table = Table([Rule("a", ("x", "y"), split(2) >> transpose), Rule(("b", "c"), "z", transpose >> fuse(2, 1))])
    half, double = np.broadcast_to(0, (4096, 2048)), np.broadcast_to(0, (4096, 8192))
    file = Shapes(a=0, b=0, c=0)
    tracemalloc.start()
    assert len(table.plan(file, {"x": half, "y": half, "z": double})) == 2
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4096 * 4096 * 8 / 3
    assert not file.reads


# --- any table at all ------------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    """A table of random rules, a file that it fits, and the operation of each rule."""
    rules, tensors = [], {}
    for r in range(draw(st.integers(1, 4))):
        operation, shapes, results = CASES[draw(st.sampled_from(sorted(CASES)))]
        foreign = tuple(f"f{r}.{{i}}.{draw(st.sampled_from('wz'))}{k}" for k in range(len(shapes)))
        ours = tuple(f"o{r}.{{i}}.p{k}" for k in range(len(results)))
        step, offset = draw(st.integers(1, 3)), draw(st.integers(0, 3))
        rules.append(Rule(foreign, ours, operation, {"i": (step, offset)}))
        for i in draw(st.sets(st.integers(0, 12), min_size=1, max_size=3)):
            for k, (template, shape) in enumerate(zip(foreign, shapes, strict=True)):
                tensors[template.replace("{i}", str(step * i + offset))] = numbers(*shape, seed=1000 * r + 10 * i + k)
    names = draw(st.permutations(sorted(tensors)))
    return Table(rules), {name: tensors[name] for name in names}


@given(tables())
def test_any_table_goes_there_and_back_to_the_bit(case):
    table, tensors = case
    steps = []
    for rule in table.rules:
        for name in tensors:
            if (values := rule.match_foreign(name)) is not None:
                steps.append((rule.foreign_names(values), rule.our_paths(values), rule.operation))
    wanted = {
        path: array
        for names, paths, operation in steps
        for path, array in zip(paths, operation.forward(tuple(tensors[n] for n in names)), strict=True)
    }
    ours = load(table, File.of(tensors), wanted)
    assert ours.keys() == wanted.keys()
    back = dict(table.write(ours))
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[n], tensors[n]) for n in tensors)


@given(tables(), st.data())
def test_any_missing_surplus_or_misshapen_tensor_is_named(case, data):
    table, tensors = case
    steps = {}
    for rule in table.rules:
        for name in tensors:
            if (values := rule.match_foreign(name)) is not None:
                steps[rule.foreign_names(values)] = (rule.our_paths(values), rule.operation)
    wanted = {
        path: array
        for names, (paths, operation) in steps.items()
        for path, array in zip(paths, operation.forward(tuple(tensors[n] for n in names)), strict=True)
    }
    victim = data.draw(st.sampled_from(sorted(tensors)))
    names = next(names for names in steps if victim in names)
    damage = data.draw(st.sampled_from(["missing", "surplus", "shape"]))
    if damage == "missing":
        damaged = {n: a for n, a in tensors.items() if n != victim}
        named = [victim, *steps[names][0]]
    elif damage == "surplus":
        damaged, named = tensors | {victim + "x": numbers(1)}, [victim + "x"]
    else:
        shape = (*tensors[victim].shape[:-1], tensors[victim].shape[-1] + 1)
        damaged, named = tensors | {victim: numbers(*shape)}, [victim]
    text = "\n".join(complaint(table, File.of(damaged), wanted)[1:])
    assert any(name in text for name in named)


def test_classes_are_named_by_their_numbers():
    assert labels_from_hugging_face({"id2label": {"10": "c", "0": "a", "9": "b"}}) == {"id2label": ("a", "b", "c")}
    with pytest.raises(CheckpointError, match="id2label has 'cat' for the number of a class"):
        labels_from_hugging_face({"id2label": {"cat": 0, "dog": 1}})
