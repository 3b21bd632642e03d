"""The harness itself: it passes on equal models, names the first difference on unequal ones, and is not fooled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from audiozoo.errors import CheckpointError
from tests.parity import harness
from tests.parity.harness import (
    Replaced,
    assert_close,
    assert_detects,
    assert_same_shapes,
    compare_gradients,
    compare_outputs,
    compare_taps,
    dropped,
    parameters,
    perturbations,
    port,
    precision,
    randomise,
)
from tests.random_weights import random_parameters, random_tensor, uniform
from weights_conversion.rules import Ignore, Rule, Table, Tied, conv1d, split, transpose

# --- a small original, with what originals have: channels first, fused projections, tied heads, buffers --------------


class TheirAttention(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out_proj = torch.nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (y.reshape(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).reshape(b, t, c)), weights


class TheirLayer(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = TheirAttention(width, 2)
        self.norm = torch.nn.LayerNorm(width)
        self.fc1 = torch.nn.Linear(width, 2 * width)
        self.fc2 = torch.nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm(x))[0]
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(x)))


class Theirs(torch.nn.Module):
    def __init__(self, width=8, layers=2, vocabulary=11):
        super().__init__()
        self.conv = torch.nn.Conv1d(3, width, 3, padding=1)
        self.bn = torch.nn.BatchNorm1d(width)
        self.layers = torch.nn.ModuleList([TheirLayer(width) for _ in range(layers)])
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.unused = torch.nn.Parameter(torch.zeros(width))
        self.register_buffer("position_ids", torch.arange(7))

    def forward(self, x, ids):
        x = self.bn(self.conv(x)).transpose(1, 2)
        hidden = [x]
        for layer in self.layers:
            x = layer(x)
            hidden.append(x)
        x = x + self.embed(ids)
        return {"logits": self.head(x), "last_hidden_state": x, "hidden_states": tuple(hidden)}


# --- ours, channels last ---------------------------------------------------------------------------------------------


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


class Conv(nnx.Module):
    def __init__(self, inputs, outputs, width, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (width, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x):
        numbers = ("NWC", "WIO", "NWC")
        y = jax.lax.conv_general_dilated(x, self.kernel[...], (1,), ((1, 1),), dimension_numbers=numbers)
        return y + self.bias[...]


class Attention(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nnx.Linear(width, width, rngs=rngs))

    def __call__(self, x):
        b, t, c = x.shape
        q, k, v = (p(x).reshape(b, t, self.heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * (c // self.heads) ** -0.5)
        return self.out_proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, c)), weights


class Layer(nnx.Module):
    def __init__(self, width, rngs):
        self.attention = Attention(width, 2, rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.fc1 = nnx.Linear(width, 2 * width, rngs=rngs)
        self.fc2 = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))[0]
        return x + self.fc2(gelu(self.fc1(x)))


class Ours(nnx.Module):
    def __init__(self, width=8, layers=2, vocabulary=11, *, rngs):
        self.conv = Conv(3, width, 3, rngs)
        self.bn = nnx.BatchNorm(width, epsilon=1e-5, use_running_average=True, use_fast_variance=False, rngs=rngs)
        self.layers = nnx.List([Layer(width, rngs) for _ in range(layers)])
        self.embed = nnx.Embed(vocabulary, width, param_dtype=jnp.zeros(0).dtype, rngs=rngs)  # it casts to this
        self.unused = nnx.Param(jnp.zeros(width))

    def __call__(self, x, ids):
        x = self.bn(self.conv(x))
        hidden = [x]
        for layer in self.layers:
            x = layer(x)
            hidden.append(x)
        x = x + self.embed(ids)
        return {"logits": self.embed.attend(x), "last_hidden_state": x, "hidden_states": tuple(hidden)}


TABLE = Table(
    rules=[
        Rule("conv.weight", "conv.kernel", conv1d),
        Rule("conv.bias", "conv.bias"),
        Rule("bn.weight", "bn.scale"),
        Rule("bn.bias", "bn.bias"),
        Rule("bn.running_mean", "bn.mean"),
        Rule("bn.running_var", "bn.var"),
        Rule("unused", "unused"),
        Rule(
            "layers.{i}.attention.qkv.weight",
            tuple(f"layers.{{i}}.attention.{p}_proj.kernel" for p in "qkv"),
            split(3) >> transpose,
        ),
        Rule(
            "layers.{i}.attention.qkv.bias",
            tuple(f"layers.{{i}}.attention.{p}_proj.bias" for p in "qkv"),
            split(3),
        ),
        Rule("layers.{i}.attention.out_proj.weight", "layers.{i}.attention.out_proj.kernel", transpose),
        Rule("layers.{i}.attention.out_proj.bias", "layers.{i}.attention.out_proj.bias"),
        Rule("layers.{i}.norm.weight", "layers.{i}.norm.scale"),
        Rule("layers.{i}.norm.bias", "layers.{i}.norm.bias"),
        Rule("layers.{i}.{m:fc1|fc2}.weight", "layers.{i}.{m}.kernel", transpose),
        Rule("layers.{i}.{m:fc1|fc2}.bias", "layers.{i}.{m}.bias"),
        Rule("embed.weight", "embed.embedding"),
    ],
    ignored=[Ignore(r"position_ids|bn\.num_batches_tracked", "counters")],
    tied=[Tied("head.weight", "embed.weight")],
)


@pytest.fixture
def pair():
    """The two with the same random weights, and inputs for each."""
    reference = randomise(Theirs(), seed=3)
    model = port(reference, Ours(rngs=nnx.Rngs(0)), TABLE)
    x = uniform(1, "x", (2, 3, 6), -1, 1)
    ids = np.arange(12).reshape(2, 6) % 11
    theirs = lambda: reference(torch.from_numpy(x), torch.from_numpy(ids))  # noqa: E731
    ours = lambda m=model: m(jnp.asarray(x.swapaxes(1, 2)), jnp.asarray(ids))  # noqa: E731
    return reference, theirs, model, ours


# --- weights ---------------------------------------------------------------------------------------------------------


def test_no_parameter_keeps_its_initial_zero_or_one():
    reference = randomise(Theirs(), seed=0)
    for name, tensor in reference.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64
            assert not torch.any((tensor == 0) | (tensor == 1)), name
            assert tensor.std() > 0.01, name
    assert reference.position_ids.tolist() == list(range(7))
    assert reference.head.weight is reference.embed.weight


def test_weights_depend_on_seed_and_name_alone():
    one, other = randomise(Theirs(), seed=0), randomise(Theirs(layers=3), seed=0)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert not torch.equal(one.conv.weight, randomise(Theirs(), seed=1).conv.weight)
    assert not np.array_equal(random_tensor("a.weight", (4, 4), 0), random_tensor("b.weight", (4, 4), 0))


def test_the_generator_gives_these_bits_on_every_machine():
    assert uniform(0, "weight", (3,), 0.0, 1.0).tolist() == [
        0.37360509733639424,
        0.6477362318983907,
        0.8399375364959073,
    ]


def test_our_parameters_can_be_made_without_pytorch(pair):
    _, _, model, _ = pair
    made = random_parameters(parameters(model), TABLE, seed=3)
    assert made.keys() == parameters(model).keys()
    for path, array in parameters(model).items():
        np.testing.assert_array_equal(made[path], array, err_msg=path)


def test_activations_stay_of_order_one(pair):
    _, theirs, _, _ = pair
    for hidden in theirs()["hidden_states"]:
        assert 0.3 < hidden.std() < 10


def test_port_is_strict_and_keeps_float64(pair):
    reference, _, model, _ = pair
    assert {a.dtype.name for a in parameters(model).values()} == {"float64"}
    with pytest.raises(CheckpointError, match=r"conv\.weight.*no rule takes it"):
        port(reference, model, Table(TABLE.rules[1:], ignored=TABLE.ignored, tied=TABLE.tied))
    with pytest.raises(CheckpointError, match="wrong shape"):
        port(reference, Ours(width=16, rngs=nnx.Rngs(0)), TABLE)


# --- outputs and taps ------------------------------------------------------------------------------------------------


def test_equal_models_agree_at_every_tap(pair):
    reference, theirs, model, ours = pair
    taps = compare_taps(reference, theirs, model, ours, TABLE, minimum=16)
    names = [name.split(" ~ ")[0] for name in taps.compared]
    assert names[:3] == ["conv", "bn", "layers.0.norm"]
    assert set(names) >= {
        f"layers.{i}{part}"
        for i in range(2)
        for part in ("", ".attention", ".attention.out_proj", ".norm", ".fc1", ".fc2")
    }
    assert names[-1] == "the model"
    # The fused projection has three modules for counterpart, hence none.
    assert taps.unmapped == ["layers.0.attention.qkv", "layers.1.attention.qkv"]
    compared = compare_outputs(taps.ours, taps.reference)
    assert compared == ["output.logits", "output.last_hidden_state", *(f"output.hidden_states[{i}]" for i in range(3))]


@pytest.mark.parametrize(
    ("path", "first"),
    [
        ("conv.bias", "conv"),
        ("bn.var", "bn"),
        ("layers.1.norm.scale", r"layers\.1\.norm"),
        ("layers.0.fc1.kernel", r"layers\.0\.fc1"),
        ("layers.1.attention.v_proj.bias", r"layers\.1\.attention\.out_proj"),
    ],
)
def test_the_first_tap_that_diverges_is_named(pair, path, first):
    reference, theirs, model, ours = pair
    with dropped(model, path), pytest.raises(AssertionError, match=rf"first tap that diverges is {first} \("):
        compare_taps(reference, theirs, model, ours, TABLE)


def test_a_flipped_gelu_is_named_where_it_shows(pair, monkeypatch):
    reference, theirs, model, ours = pair
    monkeypatch.setitem(globals(), "gelu", lambda x: jax.nn.gelu(x, approximate=True))
    with pytest.raises(AssertionError, match=r"first tap that diverges is layers\.0\.fc2 "):
        compare_taps(reference, theirs, model, ours, TABLE)


def test_a_float32_cast_inside_is_found(pair, monkeypatch):
    reference, theirs, model, ours = pair
    monkeypatch.setitem(
        globals(), "gelu", lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)
    )
    with pytest.raises(AssertionError, match=r"layers\.0\.fc2 "):
        compare_taps(reference, theirs, model, ours, TABLE)


def test_a_module_that_is_never_called_here_is_not_passed_over(pair, monkeypatch):
    reference, theirs, model, ours = pair

    def without_calling_norm(self, x):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        y = (x - mean) / jnp.sqrt(var + 1e-5) * self.norm.scale[...] + self.norm.bias[...]
        x = x + self.attention(y)[0]
        return x + self.fc2(gelu(self.fc1(x)))

    monkeypatch.setattr(Layer, "__call__", without_calling_norm)
    with pytest.raises(AssertionError, match=r"called there, never called here: layers\.0\.norm, layers\.1\.norm"):
        compare_taps(reference, theirs, model, ours, TABLE)
    taps = compare_taps(reference, theirs, model, ours, TABLE, skip={r"layers\.\d\.norm": "computed by hand here"})
    assert not any(".norm" in name for name in taps.compared)


def test_a_different_number_of_calls_is_a_difference(pair):
    reference, theirs, model, ours = pair
    with pytest.raises(AssertionError, match="called 2 times here, 1 times there"):
        compare_taps(reference, theirs, model, lambda: (ours(), ours())[0], TABLE)
    taps = compare_taps(reference, lambda: (theirs(), theirs())[0], model, lambda: (ours(), ours())[0], TABLE)
    assert len(taps.compared) >= 16


def test_too_few_taps_is_a_failure(pair):
    reference, theirs, model, ours = pair
    with pytest.raises(AssertionError, match="taps were compared, 100 wanted"):
        compare_taps(reference, theirs, model, ours, TABLE, minimum=100)
    with pytest.raises(AssertionError, match="never called here"):
        compare_taps(reference, theirs, model, jax.jit(ours), TABLE)  # inside jit nothing can be tapped


def test_tapping_leaves_the_classes_as_they_were(pair):
    reference, theirs, model, ours = pair
    before = {cls: cls.__call__ for cls in (Conv, Attention, Layer, Ours, nnx.Linear, nnx.LayerNorm)}
    with pytest.raises(AssertionError, match="first tap"), dropped(model, "conv.bias"):
        compare_taps(reference, theirs, model, ours, TABLE)
    assert all(cls.__call__ is call for cls, call in before.items())
    assert not any(m._forward_hooks for m in reference.modules())


def test_calls_through_super_count_once():
    class Narrow(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x) * 2

    model = Narrow(2, 2, rngs=nnx.Rngs(0))
    with harness.our_taps(model) as taps:
        y = model(jnp.ones((1, 2)))
    assert len(taps) == 1
    np.testing.assert_array_equal(taps[0][1], y)


def test_every_returned_field_must_be_here(pair):
    _, theirs, _, ours = pair
    output = ours()
    del output["last_hidden_state"]
    with pytest.raises(AssertionError, match="last_hidden_state: the original returns it, we do not"):
        compare_outputs(output, theirs())
    output = ours() | {"hidden_states": ours()["hidden_states"][:2]}
    with pytest.raises(AssertionError, match="3 parts there, 2 here"):
        compare_outputs(output, theirs())
    with pytest.raises(AssertionError, match="nothing to compare"):
        compare_outputs({}, {})


@pytest.mark.parametrize(
    ("ours", "reference", "agree"),
    [
        (np.ones(3) + 5e-10, np.ones(3), True),
        (np.ones(3) + 5e-9, np.ones(3), False),
        (np.array([1.0, 1e-10]), np.array([1.0, 0.0]), True),  # relative to the array's size, not to the zero
        (np.array([1.0, 1e-8]), np.array([1.0, 0.0]), False),
        (np.array([1.0, -np.inf]), np.array([1.0, -np.inf]), True),
        (np.array([1.0, np.inf]), np.array([1.0, -np.inf]), False),
        (np.array([1.0, np.nan]), np.array([1.0, 1.0]), False),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True),
        (np.array([1.0, np.finfo(float).min]), np.array([1.0, np.finfo(float).min]), True),
        (np.array([2.0, np.finfo(float).min]), np.array([1.0, np.finfo(float).min]), False),
        (np.ones(3, np.float32), np.ones(3), False),  # a hidden cast
        (np.ones((3, 1)), np.ones(3), False),
        (np.array([1, 2]), np.array([1, 2]), True),
        (np.array([1, 2]), np.array([1, 3]), False),
        (np.array([1 + 1j]), np.array([1 + 1j]), True),
        (np.array([1 + 1j]), np.array([1 + 1.1j]), False),
    ],
)
def test_what_counts_as_close(ours, reference, agree):
    if agree:
        assert_close(ours, reference)
    else:
        with pytest.raises(AssertionError):
            assert_close(ours, reference)


# --- gradients -------------------------------------------------------------------------------------------------------


def _their_loss(output):
    return output["logits"].square().mean()


def test_all_gradients_agree_and_all_are_compared(pair):
    reference, theirs, model, ours = pair
    compared = compare_gradients(
        reference, lambda: _their_loss(theirs()), model, lambda m: jnp.square(ours(m)["logits"]).mean(), TABLE
    )
    assert set(compared) == {p for p in parameters(model) if p not in ("bn.mean", "bn.var")}
    assert "unused" in compared


def test_one_wrong_gradient_is_named(pair):
    reference, theirs, model, ours = pair

    def loss(m):
        m.layers[1].fc2.bias = nnx.Param(jax.lax.stop_gradient(m.layers[1].fc2.bias[...]))
        return jnp.square(ours(m)["logits"]).mean()

    with pytest.raises(AssertionError, match=r"1 of \d+ gradients differ\nlayers\.1\.fc2\.bias"):
        compare_gradients(reference, lambda: _their_loss(theirs()), model, loss, TABLE)


def test_a_gradient_where_pytorch_has_none_is_named(pair):
    reference, theirs, model, ours = pair

    def loss(m):
        value = jnp.square(ours(m)["logits"]).mean()
        return value + m.unused[...].sum() - jax.lax.stop_gradient(m.unused[...].sum())

    with pytest.raises(AssertionError, match="unused: PyTorch has no gradient here, ours is not zero"):
        compare_gradients(reference, lambda: _their_loss(theirs()), model, loss, TABLE)


# --- mutation --------------------------------------------------------------------------------------------------------


def test_mutations_are_detected(pair):
    _, theirs, model, ours = pair
    check = lambda: compare_outputs(ours(), theirs())  # noqa: E731
    before = {path: np.array(a) for path, a in parameters(model).items()}
    # Softmax does not see what is added to all scores of a query, hence not the key's bias.
    mutations = perturbations(model, count=100, exclude=r"unused|.*k_proj\.bias|embed\.embedding")
    mutations += [dropped(model, "layers.0.fc1.bias"), Replaced(globals(), "gelu", jax.nn.gelu)]
    assert assert_detects(check, mutations) == len(parameters(model)) - 4 + 2
    for path, array in parameters(model).items():
        np.testing.assert_array_equal(before[path], array, err_msg=path)


def test_a_check_that_asserts_nothing_is_found_out(pair):
    _, _, model, ours = pair
    with pytest.raises(AssertionError, match=r"does not notice: one value changed in "):
        assert_detects(lambda: ours(), perturbations(model, count=2))
    with pytest.raises(AssertionError, match="no mutation was tried"):
        assert_detects(lambda: None, [])


# --- shapes and precision --------------------------------------------------------------------------------------------


def test_published_sizes_need_no_memory():
    huge = {"width": 8192, "layers": 24, "vocabulary": 50_000}  # 13 billion values
    count = assert_same_shapes(lambda: Theirs(**huge), lambda: Ours(**huge, rngs=nnx.Rngs(0)), TABLE)
    assert count > 10e9
    with pytest.raises(CheckpointError, match=r"layers\.23\."):
        assert_same_shapes(lambda: Theirs(**huge), lambda: Ours(**huge | {"layers": 23}, rngs=nnx.Rngs(0)), TABLE)


def test_precision_goes_there_and_back():
    assert jnp.ones(1).dtype == jnp.float64
    assert torch.ones(1).dtype == torch.float64
    with precision("float32"):
        assert jnp.ones(1).dtype == jnp.float32
        assert torch.ones(1).dtype == torch.float32
        reference = randomise(Theirs(), seed=3)
        model = port(reference, Ours(rngs=nnx.Rngs(0)), TABLE)
        x, ids = uniform(1, "x", (2, 3, 6), -1, 1).astype(np.float32), np.zeros((2, 6), int)
        compare_outputs(
            model(jnp.asarray(x.swapaxes(1, 2)), jnp.asarray(ids)),
            reference(torch.from_numpy(x), torch.from_numpy(ids)),
        )
    assert jnp.ones(1).dtype == jnp.float64
    assert torch.ones(1).dtype == torch.float64
