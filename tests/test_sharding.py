"""Sharding rules on eight virtual devices: the specs that are expected, and the numbers of one device."""

import json
import re

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from audiozoo import sharding
from tests import processes

PRELUDE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from audiozoo import sharding
from audiozoo.errors import UsageError
from audiozoo.sharding import DEFAULT_RULES, TRANSFORMER, Rule, batch_sharding, fsdp, make_mesh, shard, shardings_for

assert len(jax.devices()) == 8


class Attention(nnx.Module):
    def __init__(self, width, rngs):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nnx.Linear(width, width, rngs=rngs))

    def __call__(self, x):
        batch, time, width = x.shape
        q, k, v = (f(x).reshape(batch, time, 4, width // 4) for f in (self.q_proj, self.k_proj, self.v_proj))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 4)
        return self.out_proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class Norm(nnx.Module):
    def __init__(self, width):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(1e-5 + (x * x).mean(-1, keepdims=True)) * self.scale + self.bias


class Layer(nnx.Module):
    def __init__(self, width, rngs):
        self.self_attention = Attention(width, rngs)
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)
        self.norm = Norm(width)

    def __call__(self, x):
        x = x + self.self_attention(self.norm(x))
        return x + self.fc2(jax.nn.relu(self.fc1(x)))


class Model(nnx.Module):
    def __init__(self, width=32, vocabulary=48, layers=2, rngs=None):
        self.embed_tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.embed_positions = nnx.Embed(24, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, rngs) for _ in range(layers)])

    def __call__(self, ids):
        x = self.embed_tokens.embedding[...][ids] + self.embed_positions.embedding[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return x @ self.embed_tokens.embedding[...].T


def flat(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, child in tree.items() for k, v in flat(child, f"{path}.{key}".strip(".")).items()}


def specs(model, mesh, rules):
    return {name: place.spec for name, place in flat(shardings_for(model, mesh, rules)).items()}


def raises(sentence, function, *arguments):
    try:
        function(*arguments)
    except UsageError as error:
        assert sentence in str(error), str(error)
    else:
        raise AssertionError(f"no error {sentence!r}")
"""


def on_eight_devices(code):
    """Run code after `PRELUDE` in a process with eight virtual devices; its last line of output is JSON."""
    out = processes.output("-W", "error::DeprecationWarning:audiozoo", "-c", PRELUDE + code)
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.slow
def test_numbers_equal_those_of_one_device():
    """Outputs and gradients on four mesh shapes under each ruleset, in float64, against the unsharded model."""
    errors = on_eight_devices(
        """
jax.config.update("jax_enable_x64", True)
model = Model(layers=1, rngs=nnx.Rngs(0))
graphdef, state = nnx.split(model)
state = jax.tree.map(lambda x: x.astype(jnp.float64), state)
model = nnx.merge(graphdef, state)
ids = jax.random.randint(jax.random.key(1), (8, 12), 0, 48)


def loss(model, ids):
    logits = model(ids)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3]), logits


step = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))
(_, expected), gradients = step(model, ids)
errors = {}
for data, tensor in ((8, 1), (4, 2), (2, 4), (1, 8)):
    mesh = make_mesh({"data": data, "tensor": tensor})
    for label, rules in (("tensor", TRANSFORMER), ("fsdp", (fsdp(64),)), ("both", (*TRANSFORMER, fsdp(64)))):
        if label != "both" and data != 4:
            continue
        sharded = shard(model, mesh, rules)
        (_, logits), sharded_gradients = step(sharded, jax.device_put(ids, batch_sharding(mesh)))
        assert len(logits.sharding.device_set) == 8
        difference = jnp.abs(jax.device_get(logits) - expected).max()
        pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(sharded_gradients), strict=True)
        slope = max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs)
        errors[f"{data}x{tensor} {label}"] = float(max(difference, slope))
print(json.dumps(errors))
"""
    )
    assert len(errors) == 6
    assert max(errors.values()) < 1e-12, errors


def test_specs_of_the_transformer_rules():
    on_eight_devices(
        """
model = nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))
for tensor in (2, 4, 8):
    mesh = make_mesh({"data": -1, "tensor": tensor})
    assert mesh.shape == {"data": 8 // tensor, "tensor": tensor}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2
    found = specs(model, mesh, TRANSFORMER)
    for i in (0, 1):
        for name in ("q_proj", "k_proj", "v_proj"):
            assert found[f"layers.{i}.self_attention.{name}.kernel"] == P(None, "tensor")
            assert found[f"layers.{i}.self_attention.{name}.bias"] == P("tensor")
        assert found[f"layers.{i}.self_attention.out_proj.kernel"] == P("tensor", None)
        assert found[f"layers.{i}.self_attention.out_proj.bias"] == P(None)
        assert found[f"layers.{i}.fc1.kernel"] == P(None, "tensor")
        assert found[f"layers.{i}.fc2.kernel"] == P("tensor", None)
        assert found[f"layers.{i}.norm.scale"] == P(None)
    assert found["embed_tokens.embedding"] == P("tensor", None)
    assert found["embed_positions.embedding"] == P(None, None)
    assert len(found) == 2 + 2 * 14

sharded = shard(Model(rngs=nnx.Rngs(0)), make_mesh({"data": 2, "tensor": 4}), TRANSFORMER)
kernel = sharded.layers[0].fc1.kernel[...]
assert {s.data.shape for s in kernel.addressable_shards} == {(32, 32)}, kernel.sharding
print("{}")
"""
    )


def test_rules_are_ordered_and_checked():
    on_eight_devices(
        """
mesh = make_mesh({"data": 4, "tensor": 2})
params = {"a": {"kernel": jax.ShapeDtypeStruct((8, 6), "float32")}, "b.kernel": jax.ShapeDtypeStruct((8, 6), "float32")}
found = shardings_for(params, mesh, [("a\\\\.kernel", P("tensor")), ("kernel", P(None, "tensor"))])
assert found["a"]["kernel"].spec == P("tensor", None) and found["b.kernel"].spec == P(None, "tensor")
found = shardings_for(params, mesh, [("b\\\\.kernel", P()), ("kernel", P(("data", "tensor")))])
assert found["a"]["kernel"].spec == P(("data", "tensor"), None) and found["b.kernel"].spec == P(None, None)

raises("'q_proj' matches no parameter", shardings_for, params, mesh, [("q_proj", P("tensor"))])
raises("matches no parameter that an earlier rule", shardings_for, params, mesh, [("kernel", P()), ("a", P("tensor"))])
raises("names the axis 'model'; the mesh has data, tensor", shardings_for, params, mesh, [("kernel", P("model"))])
raises("has 3 entries", shardings_for, params, mesh, [("kernel", P(None, None, "data"))])
raises("not a regular expression", shardings_for, params, mesh, [("(", P())])
raises("only one fsdp", shardings_for, params, mesh, [fsdp(), fsdp()])
raises("needs 6 devices, and there are 8", make_mesh, {"data": 6})
raises("at least 1", make_mesh, {"data": -1, "tensor": -1})
raises("at least 1", make_mesh, {"data": 0})
raises("needs 16 devices, and there are 8", make_mesh, {"data": -1, "tensor": 16})
raises("at least 1", make_mesh, {})
assert make_mesh({"tensor": -1}, jax.devices()[2:4]).devices.tolist() == jax.devices()[2:4]
assert sharding.parse_mesh(" data = 2, tensor=-1,").shape == {"data": 2, "tensor": 4}
for text in ("model=8", "data=x", "data", "data=2.0"):
    raises("is not understood; write data=4", sharding.parse_mesh, text)
several = [("kernel", P()), ("a", P("tensor")), ("c", P()), ("d", P())]
raises("'a' matches no parameter that an earlier", shardings_for, params, mesh, several)
raises("has not taken, and so do 2 more.", shardings_for, params, mesh, several)
for axis, parts in (("data", 4), (("data", "fsdp"), 4), (("data", "tensor"), 8), ("fsdp", 1)):
    assert sharding.shards(batch_sharding(mesh, axis)) == parts
# Rules for a family of models may match nothing, and may name axes that this mesh does not have.
assert shardings_for(params, make_mesh({"data": 8}), TRANSFORMER)["a"]["kernel"].spec == P(None, None)
print("{}")
"""
    )


def test_axes_that_do_not_divide_move_on():
    on_eight_devices(
        """
mesh = make_mesh({"data": 2, "tensor": 4})


def spec(shape, wanted, *more):
    return shardings_for({"x": jax.ShapeDtypeStruct(shape, "float32")}, mesh, [("x", wanted), *more])["x"].spec


assert spec((8, 8), P(None, "tensor")) == P(None, "tensor")
assert spec((8, 6), P(None, "tensor")) == P("tensor", None)  # 6 is not divisible by 4: on to the next axis
assert spec((3, 8, 6), P(None, None, "tensor")) == P(None, "tensor", None)
assert spec((5, 6), P(None, "tensor")) == P(None, None)  # nor is 5: replicated
assert spec((51865, 6), P("tensor")) == P(None, None)
assert spec((6, 8), P(("data", "tensor"))) == P("data", "tensor")  # 6 is divisible by 2, not by 8
assert spec((4, 8), P(("data", "tensor"))) == P("data", "tensor")  # 4 is divisible by either, not by both
assert spec((8, 6), P("data", "tensor")) == P("data", None)  # the next axis is divided already
assert spec((), P()) == P()
assert spec((4, 0), P(None, "tensor")) == P(None, "tensor")
for shape in ((8, 6), (5, 6), (51865, 6), (6, 8)):
    for wanted in (P("tensor"), P(None, "tensor"), P(("data", "tensor")), P("tensor", "data")):
        jax.device_put(np.zeros(shape), jax.sharding.NamedSharding(mesh, spec(shape, wanted)))

assert spec((8, 5, 7), P(None, None, "tensor")) == P(None, None, None)  # not the taps of a convolution

# fsdp: of the last two axes the longer that divides, above min_size, for what is not divided yet.
def fallback(shape, *rules):
    return shardings_for({"x": jax.ShapeDtypeStruct(shape, "float32")}, mesh, [*rules, fsdp(64)])["x"].spec


assert fallback((8, 16)) == P(None, "data")
assert fallback((16, 8)) == P("data", None)
assert fallback((8, 17)) == P("data", None)
assert fallback((9, 17)) == P(None, None)
assert fallback((4, 8)) == P(None, None)  # smaller than min_size
assert fallback((4, 16)) == P(None, "data")  # just as large
assert spec((8, 16), P("tensor"), fsdp(64, combine=True)) == P("tensor", "data")
assert fallback((8, 16), ("x", P("tensor"))) == P("tensor", None)
assert fallback((9, 16), Rule("x", P("tensor"))) == P(None, "tensor")
assert fallback((9, 18), Rule("x", P("tensor"))) == P(None, "data")  # tensor divides neither axis
assert fallback((16, 4, 8)) == P(None, None, "data")
assert fallback((16, 3, 7)) == P(None, None, None)
kept = {name: jax.ShapeDtypeStruct((31, 1, 128), "float32") for name in ("depthwise_conv.kernel", "conv.kernel")}
specs = {name: place.spec for name, place in shardings_for(kept, mesh, [fsdp(64, whole="(^|\\\\.)depthwise")]).items()}
assert specs == {"depthwise_conv.kernel": P(None, None, None), "conv.kernel": P(None, None, "data")}

# Over the axis of that name where the mesh has one, else over data.
both = {"data": 2, "fsdp": 4}
for axes, wanted in ((both, "fsdp"), ({"fsdp": 8}, "fsdp"), ({"data": 8}, "data"), ({"tensor": 8}, None)):
    place = shardings_for({"x": jax.ShapeDtypeStruct((8, 16), "float32")}, make_mesh(axes), [fsdp(64)])["x"]
    assert place.spec == P(None, wanted), axes
print("{}")
"""
    )


def test_restore_straight_into_shards(tmp_path):
    """Save from one layout, restore into others and to another dtype, without an unsharded copy in between."""
    on_eight_devices(
        f"""
from audiozoo import checkpoints
directory = {str(tmp_path / "model")!r}
model = Model(rngs=nnx.Rngs(0))
sharded = shard(model, make_mesh({{"data": 4, "tensor": 2}}), DEFAULT_RULES)
checkpoints.save(sharded, directory, {{"model_class": "Model"}})
expected = flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(1))), nnx.Param))
for data, tensor in ((8, 1), (2, 4), (1, 8)):
    mesh = make_mesh({{"data": data, "tensor": tensor}})
    places = shardings_for(abstract, mesh, (*TRANSFORMER, fsdp(64)))
    restored = flat(checkpoints.restore(directory, abstract, places))
    assert set(restored) == set(expected)
    for name, place in flat(places).items():
        assert restored[name].sharding == place, name
        np.testing.assert_array_equal(restored[name], expected[name])
half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract)
for name, array in flat(checkpoints.restore(directory, half, places)).items():
    np.testing.assert_array_equal(array, expected[name].astype(jnp.bfloat16))
print("{{}}")
"""
    )


OPENS = "self_attn.q_proj", "attention.k_proj", "self_attention.v_proj", "fc1", "feed_forward.intermediate_dense"
OPENS += (
    "layer.intermediate",
    "mlp.in_proj",
    "self_attention.q",
    "cross_attention.k",
    "attention.v",
    "wi",
    "wi_0",
    "wi_1",
)
CLOSES = "attention.out_proj", "o_proj", "fc2", "output_dense", "layer.output", "attention_output", "attention.o", "wo"


def test_what_the_families_call_their_projections():
    def specs(names, shape=(64, 128)):
        mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
        parameters = {name: jax.ShapeDtypeStruct(shape, "float32") for name in names}
        return {place.spec for place in sharding.shardings_for(parameters, mesh, sharding.TRANSFORMER).values()}

    assert specs(f"layers.0.{name}.kernel" for name in OPENS) == {P(None, "tensor")}
    assert specs(f"layers.0.{name}.kernel" for name in CLOSES) == {P("tensor", None)}
    assert specs(["fc1.kernel", "q_proj.kernel"]) == {P(None, "tensor")}  # of the model itself
    with_biases = [name for name in OPENS if not re.search(r"attention\.[qkv]$|wi", name)]
    assert specs((f"layers.0.{name}.bias" for name in with_biases), (128,)) == {P("tensor")}
    assert specs((f"layers.0.{name}.bias" for name in CLOSES), (128,)) == {P(None)}
    assert specs(["embed_tokens.embedding", "decoder.shared.embedding"]) == {P("tensor", None)}
    others = (
        "embed_positions.embedding",
        "position_embeds_layer.embedding",
        "head.kernel",
        "project.kernel",
        "fc1.scale",
    )
    others += "xfc1.kernel", "xfc2.kernel", "tout.kernel", "xwo.kernel"
    assert specs(others) == {P(None, None)}
    assert specs(["xfc1.bias"], (128,)) == {P(None)}


def test_what_lies_divided_in_training():
    """From 4,096 numbers on over `fsdp`, beside `tensor` too; small kernels of convolutions a channel never."""
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))

    def spec(name, *shape, mesh=mesh):
        rules = sharding.TRAINING_RULES
        return sharding.shardings_for({name: jax.ShapeDtypeStruct(shape, "float32")}, mesh, rules)[name].spec

    assert spec("layers.0.fc1.kernel", 64, 64) == spec("layers.0.fc1.kernel", 64, 128) == P("fsdp", "tensor")
    assert spec("layers.0.fc1.kernel", 63, 65) == P(None, None)
    assert spec("layers.0.fc1.kernel", 62, 66) == P(None, "tensor")
    assert spec("head.kernel", 64, 128) == P(None, "fsdp")
    assert spec("layers.0.conv.depthwise_conv.kernel", 31, 1, 512) == P(None, None, None)
    assert spec("layers.stacked.fc1.kernel", 4, 64, 64) == P(None, "fsdp", "tensor")
    data = jax.sharding.AbstractMesh((2,), ("data",))  # copies, where there is no axis of that name
    assert spec("head.kernel", 64, 128, mesh=data) == spec("fc1.kernel", 64, 128, mesh=data) == P(None, None)
    model = nnx.eval_shape(
        lambda: nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(0)))
    )
    assert list(sharding.shardings_for(model, mesh)["layers"]) == [0]  # random state is none of the parameters
    assert [rule for rule in sharding.DEFAULT_RULES if isinstance(rule, sharding.Fsdp)] == [sharding.fsdp()]


@pytest.mark.parametrize("name", ["TRANSFORMER", "DEFAULT_RULES", "TRAINING_RULES"])
def test_rules_for_families_are_never_required(name):
    assert all(not rule.required for rule in getattr(sharding, name) if isinstance(rule, sharding.Rule))


def test_a_single_row_leaves_the_shards_where_they_are():
    """Its product, cut in parts on a CPU, sums over the devices at most: no device is sent another's share of W."""
    found = on_eight_devices(
        """
import re
from audiozoo.layers import Embed, Linear

layer, table = Linear(512, 384, rngs=nnx.Rngs(0)), Embed(384, 512, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(1), (1, 1, 512))
run = jax.jit(lambda layer, table, x: (layer(x), table.attend(x)))
expected, found = run(layer, table, x), []
for devices in (2, 4, 8):
    mesh = make_mesh({"tensor": devices}, jax.devices()[:devices])
    for spec in (P("tensor", None), P(None, "tensor")):
        place = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
        parts = [nnx.clone(layer), nnx.clone(table)]
        parts[0].kernel[...] = place(layer.kernel[...], spec)
        parts[1].embedding[...] = place(table.embedding[...], spec)
        parts[0].bias[...] = place(layer.bias[...], P())
        arguments = (*parts, place(x, P()))
        for a, b in zip(run(*arguments), expected):
            np.testing.assert_allclose(a, b, atol=1e-5)
        text = run.lower(*arguments).compile().as_text()
        found.append(sorted(set(re.findall(r" (all-[a-z-]+|collective-permute)[(]", text))))
print(json.dumps(found))
"""
    )
    assert found == [["all-reduce"]] * 6
