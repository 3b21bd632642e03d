"""wav2vec 2.0 against PyTorch: every tap, output, loss and gradient of every class; padding; fairseq's own names."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.wav2vec2 import modeling_wav2vec2

from audiozoo.layers import activations
from audiozoo.layers.losses import ctc_loss
from audiozoo.models import wav2vec2
from tests.parity import harness
from tests.parity.harness import blank
from tests.parity.speech_family import EVERYTHING, LAYER, NO_DROPOUT, TINY, from_s3prl
from weights_conversion.wav2vec2 import (
    config_from_hugging_face,
    config_to_hugging_face,
    fairseq_table,
    hugging_face_table,
)

VARIANTS = {
    "base": {},
    "lv60": LAYER | {"num_conv_pos_embeddings": 7},
    "mms": LAYER | {"adapter_attn_dim": 5},
    "large": {"num_hidden_layers": 3, "conv_bias": True, "hidden_act": "relu"},
}
HEADS = ("Model", "ForCTC", "ForPreTraining", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector")


def pair(name: str, seed: int = 0, **changes):
    """The original with random weights, ours with the same, and the table between them."""
    theirs_config = transformers.Wav2Vec2Config(**(TINY | changes), attn_implementation="eager")
    reference = harness.randomise(getattr(transformers, name)(theirs_config), seed)
    config = config_from_hugging_face(theirs_config.to_dict())
    model = blank(lambda: getattr(wav2vec2, name)(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    table = hugging_face_table(config, name)
    return reference, harness.port(reference, model, table), table


def waves(batch: int = 2, samples: int = 700, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, samples))


FRAMES = 34  # of 700 samples
LENGTHS = (700, 480)


def padded():
    x = waves()
    mask = np.zeros(x.shape, np.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    return np.where(mask, x, 0), mask


@pytest.fixture
def _reference_in_double(monkeypatch):
    """The original casts to float32 in its losses; here its casts go to the precision of the test."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    log_softmax = torch.nn.functional.log_softmax
    monkeypatch.setattr(
        torch.nn.functional, "log_softmax", lambda x, dim=None, dtype=None, **kw: log_softmax(x, dim=dim, **kw)
    )


def jitted(model, **static):
    """Our model's call, compiled."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, kwargs: nnx.merge(graphdef, state)(**kwargs, **static))
    return lambda **kwargs: call(state, {k: jnp.asarray(v) for k, v in kwargs.items()})


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("Wav2Vec2ForPreTraining", "base"),
        ("Wav2Vec2ForCTC", "mms"),
        ("Wav2Vec2ForXVector", "lv60"),
        ("Wav2Vec2ForSequenceClassification", "large"),
        ("Wav2Vec2ForAudioFrameClassification", "base"),
    ],
)
def test_every_tap_and_output(name, variant):
    reference, model, table = pair(name, **VARIANTS[variant])
    x, mask = padded()
    ours = {"hidden_states_before_norm": True} | ({"ignore_dilation": True} if name.endswith("XVector") else {})
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **EVERYTHING, **ours),
        table,
        minimum=35,
    )
    compared = harness.compare_outputs(taps.ours, taps.reference)
    assert len(compared) >= 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_bare_model(variant):
    reference, model, _ = pair("Wav2Vec2Model", seed=1, **VARIANTS[variant])
    x, mask = padded()
    run = jitted(model, **EVERYTHING, hidden_states_before_norm=True)
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING)
        alone = reference(torch.tensor(x), **EVERYTHING)
    harness.compare_outputs(run(input_values=x, attention_mask=mask), theirs)
    harness.compare_outputs(run(input_values=x), alone)


@pytest.mark.parametrize("changes", [{}, {"output_hidden_size": 14}], ids=["same width", "narrower"])
def test_strided_adapter(changes):
    reference, model, _ = pair(
        "Wav2Vec2ForCTC", **LAYER, add_adapter=True, num_adapter_layers=2, **NO_DROPOUT, **changes
    )
    x, mask = padded()
    labels = np.array([[3, 4, -100], [5, 5, 1]])
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask)).logits
    harness.assert_close(jitted(model)(input_values=x, attention_mask=mask).logits, theirs)
    frames = model.wav2vec2.frame_lengths(np.array(LENGTHS))
    np.testing.assert_array_equal(frames, reference._get_feat_extract_output_lengths(torch.tensor(LENGTHS)))
    ours = jitted(model)(input_values=x, attention_mask=mask, labels=labels).loss
    log_probs = theirs.log_softmax(-1).transpose(0, 1)
    wanted = torch.nn.functional.ctc_loss(
        log_probs, torch.tensor([3, 4, 5, 5, 1]), torch.tensor(frames), torch.tensor([2, 3]), reduction="sum"
    )
    harness.assert_close(ours, wanted, name="loss")


@pytest.mark.parametrize("samples", [400, 401, 639, 720, 1039])
def test_published_convolutions_at_odd_lengths(samples):
    published = {k: transformers.Wav2Vec2Config().to_dict()[k] for k in ("conv_kernel", "conv_stride")}
    reference, model, _ = pair("Wav2Vec2Model", **published, conv_dim=(8,) * 7)
    x = waves(1, samples)
    with torch.no_grad():
        theirs = reference(torch.tensor(x)).last_hidden_state
    ours = jitted(model)(input_values=x).last_hidden_state
    assert ours.shape[1] == model.frame_lengths(samples) == 1 + (samples - 400) // 320
    harness.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="399 samples are too few"):
        model(jnp.asarray(waves(1, 399)))


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_ctc_loss_is_pytorchs(reduction, zero_infinity):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 12, 5)) * 3
    lengths = np.array([12, 9, 5, 12, 3, 7])
    labels = np.array(
        [[1, 1, 2, 3], [4, -100, -1, -100], [1, 2, 3, 4], [0, 2, -100, 2], [1, 1, 2, -100], [-100, -100, -100, -100]]
    )
    if not zero_infinity:
        keep = [0, 1, 2, 3, 5]  # the fifth has too few frames for its labels
        logits, lengths, labels = logits[keep], lengths[keep], labels[keep]
    kept = labels > 0  # `transformers` too leaves out whatever is below 0
    tensor = torch.tensor(logits, requires_grad=True)
    wanted = torch.nn.functional.ctc_loss(
        tensor.log_softmax(-1).transpose(0, 1),
        torch.tensor(labels[kept]),
        torch.tensor(lengths),
        torch.tensor(kept.sum(1)),
        reduction=reduction,
        zero_infinity=zero_infinity,
    )
    weights = torch.arange(1.0, len(labels) + 1) if reduction == "none" else 1.0
    (wanted * weights).sum().backward()

    def loss(x):
        return ctc_loss(x, jnp.asarray(labels), jnp.asarray(lengths), reduction=reduction, zero_infinity=zero_infinity)

    ours, gradient = jax.jit(lambda x: (loss(x), jax.grad(lambda y: (loss(y) * np.asarray(weights)).sum())(x)))(logits)
    harness.assert_close(ours, wanted, name="loss")
    harness.assert_close(gradient, tensor.grad, kind="gradient", name="gradient")


def test_too_few_frames_are_infinitely_improbable():
    logits = jnp.zeros((1, 3, 4))
    assert np.isinf(ctc_loss(logits, jnp.array([[1, 1, 1]]), jnp.array([3])))
    assert ctc_loss(logits, jnp.array([[1, 1, 1]]), jnp.array([3]), zero_infinity=True) == 0


@pytest.mark.usefixtures("_reference_in_double")
def test_ctc_gradients():
    reference, model, table = pair("Wav2Vec2ForCTC", **(NO_DROPOUT | VARIANTS["mms"]))
    x, mask = padded()
    labels = np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]])
    spans = np.zeros((2, FRAMES), bool)
    spans[:, 3:9] = True
    masked = reference.wav2vec2._mask_hidden_states
    reference.wav2vec2._mask_hidden_states = lambda x, mask_time_indices=None, attention_mask=None: masked(
        x, torch.tensor(spans), attention_mask
    )
    kwargs = {"attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    compared = harness.compare_gradients(
        reference,
        lambda: reference(torch.tensor(x), **kwargs).loss,
        model,
        jax.jit(
            lambda m: (
                m(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(labels), mask_time_indices=jnp.asarray(spans)).loss
            )
        ),
        table,
    )
    assert "wav2vec2.masked_spec_embed" in compared
    assert len(compared) > 45


def spans_and_negatives(seed: int = 0):
    state = np.random.get_state()  # noqa: NPY002 - the original draws from NumPy's global generator
    np.random.seed(seed)  # noqa: NPY002
    spans = modeling_wav2vec2._compute_mask_indices((2, FRAMES), 0.6, 4, min_masks=2)
    negatives = modeling_wav2vec2._sample_negative_indices((2, FRAMES), TINY["num_negatives"], spans)
    np.random.set_state(state)  # noqa: NPY002
    return spans, negatives


@pytest.mark.usefixtures("_reference_in_double")
@pytest.mark.parametrize(("variant", "training"), [("lv60", False), ("base", True)], ids=["best entry", "Gumbel"])
def test_pretraining_loss_and_every_gradient(variant, training, monkeypatch):
    changes = NO_DROPOUT | VARIANTS[variant] | {"mask_feature_prob": 0.0}
    reference, model, table = pair("Wav2Vec2ForPreTraining", **changes)
    x, mask = padded()
    spans, negatives = spans_and_negatives()
    noise = np.random.default_rng(5).gumbel(size=(2 * FRAMES * 2, TINY["num_codevectors_per_group"]))
    if training:
        reference.train()
        reference.set_gumbel_temperature(1.3)

        def gumbel_softmax(logits, tau=1, hard=False):
            soft = ((logits + torch.tensor(noise)) / tau).softmax(-1)
            index = soft.argmax(-1, keepdim=True)
            # One-hot to the last bit, which PyTorch's (1 - p) + p is not: so equal codes are equal vectors.
            return torch.zeros_like(logits).scatter_(-1, index, 1.0) + (soft - soft.detach())

        monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", gumbel_softmax)

    def theirs():
        return reference(
            torch.tensor(x),
            attention_mask=torch.tensor(mask),
            mask_time_indices=torch.tensor(spans),
            sampled_negative_indices=torch.tensor(negatives),
        )

    options = {"temperature": 1.3, "gumbel_noise": jnp.asarray(noise)} if training else {}

    def ours(m):
        return m(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(spans), jnp.asarray(negatives), **options)

    compared = harness.compare_gradients(
        reference, lambda: theirs().loss, model, jax.jit(lambda m: ours(m).loss), table
    )
    assert len(compared) > 45
    with torch.no_grad():
        wanted = theirs()
    # Distractors that equal the truth are struck out; among so few codes there are some.
    codes = wanted.projected_quantized_states.reshape(-1, 6)
    same = (codes[negatives.reshape(-1)].reshape(2, FRAMES, -1, 6) == codes.reshape(2, FRAMES, 1, 6)).all(-1)
    assert same[torch.tensor(spans)].any()
    harness.compare_outputs(jax.jit(ours)(model), wanted)


def test_x_vector_and_classifier_gradients():
    x, mask = padded()
    for name, labels in (
        ("Wav2Vec2ForXVector", np.array([1, 4])),
        ("Wav2Vec2ForSequenceClassification", np.array([0, 3])),
        ("Wav2Vec2ForAudioFrameClassification", np.eye(5)[np.random.default_rng(0).integers(0, 5, (2, FRAMES))]),
    ):
        reference, model, table = pair(
            name, **NO_DROPOUT, num_hidden_layers=1, use_weighted_layer_sum=True, mask_time_prob=0.0
        )
        extra = {"ignore_dilation": True} if name.endswith("XVector") else {}
        compared = harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss,  # noqa: B023
            model,
            jax.jit(lambda m: m(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(labels), **extra).loss),  # noqa: B023
            table,
        )
        assert "layer_weights" in compared


# --- where this is better than, or other than, the original ---------------------------------------------------------


def test_hidden_states_before_and_after_the_last_norm():
    reference, model, _ = pair("Wav2Vec2Model", **LAYER)
    x = waves()
    with torch.no_grad():
        theirs = reference(torch.tensor(x), output_hidden_states=True)
        normalised = reference.encoder.layer_norm(theirs.hidden_states[-1])
    version_4 = jitted(model, output_hidden_states=True)(input_values=x)
    version_5 = jitted(model, output_hidden_states=True, hidden_states_before_norm=True)(input_values=x)
    harness.compare_outputs(version_5, theirs)
    harness.assert_close(version_4.hidden_states[-1], normalised)
    np.testing.assert_array_equal(version_4.hidden_states[-1], version_4.last_hidden_state)
    assert np.abs(version_4.hidden_states[-1] - version_5.hidden_states[-1]).max() > 0.1


def test_masked_group_norm_makes_a_padded_batch_its_items():
    reference, model, _ = pair("Wav2Vec2ForCTC")
    x, mask = padded()
    frames = model.wav2vec2.frame_lengths(LENGTHS[1])
    with torch.no_grad():
        together = reference(torch.tensor(x), attention_mask=torch.tensor(mask)).logits[1, :frames]
        alone = reference(torch.tensor(x[1:, : LENGTHS[1]])).logits[0]
    assert (together - alone).abs().max() > 0.05  # the original: padding changes the result
    ours = jitted(model, masked_group_norm=True)(input_values=x, attention_mask=mask).logits[1, :frames]
    harness.assert_close(ours, alone, name="the padded row against the row alone")


def test_x_vectors_respect_dilation():
    reference, model, _ = pair("Wav2Vec2ForXVector", **LAYER)
    x, mask = padded()
    with torch.no_grad():
        together = reference(torch.tensor(x), attention_mask=torch.tensor(mask)).embeddings[1]
        alone = reference(torch.tensor(x[1:, : LENGTHS[1]])).embeddings[0]
    assert ((together - alone).norm() / alone.norm()) > 1e-3  # the original pools frames that saw padding
    ours = jitted(model)(input_values=x, attention_mask=mask).embeddings[1]
    harness.assert_close(ours, alone, name="the padded row against the row alone")
    ours = jitted(model, ignore_dilation=True)(input_values=x, attention_mask=mask).embeddings[1]
    harness.assert_close(ours, together, name="as the original")


def test_both_rules_for_frame_masks():
    config = wav2vec2.Wav2Vec2Config()
    samples, lengths = 6000, np.arange(4000, 4020)
    mask = jnp.asarray(np.arange(samples) < lengths[:, None], jnp.int32)
    frames = wav2vec2.conv_lengths(samples, config.conv_kernel, config.conv_stride)
    rule = wav2vec2.frame_mask(config, mask, frames)
    np.testing.assert_array_equal(rule.sum(1), (lengths - 400) // 320 + 1)
    # The code of HuBERT and WavLM: cut to whole blocks, a frame is padding if all of its block is.
    padding = torch.tensor(np.asarray(mask) == 0)
    blocks = padding[:, : samples - samples % frames].view(len(lengths), frames, -1).all(-1)
    np.testing.assert_array_equal(wav2vec2.frame_mask(config, mask, frames, "samples"), ~blocks.numpy())


# --- mutations, sizes, precision -------------------------------------------------------------------------------------


def test_mutations_are_noticed():
    reference, model, _ = pair("Wav2Vec2ForCTC", **LAYER)
    x = waves(1)
    with torch.no_grad():
        theirs = reference(torch.tensor(x))
    mutations = [
        *harness.perturbations(model, count=4, exclude=".*masked_spec_embed"),
        harness.dropped(model, "wav2vec2.encoder.pos_conv_embed.conv.bias"),
        harness.dropped(model, "wav2vec2.encoder.layers.1.attention.v_proj.bias"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
    ]
    check = lambda: harness.compare_outputs(jitted(model)(input_values=x), theirs)  # noqa: E731
    assert harness.assert_detects(check, mutations) == 7


PUBLISHED = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "codevector_dim": 768,
        "proj_codevector_dim": 768,
    },
}
PUBLISHED["large_lv60"] = PUBLISHED["large_xlsr_53"] = PUBLISHED["large"] | LAYER
PUBLISHED["large_espeak"] = PUBLISHED["large_lv60"] | {"vocab_size": 392}
PARAMETERS = {"base": 94_396_320, "large_lv60": 315_471_520}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("head", ["ForCTC", "ForPreTraining"])
def test_published_sizes(name, head):
    config = getattr(wav2vec2.Wav2Vec2Config, name)()
    cls = f"Wav2Vec2{head}"
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: getattr(transformers, cls)(transformers.Wav2Vec2Config(**PUBLISHED[name])),
            lambda: getattr(wav2vec2, cls)(config, rngs=nnx.Rngs(0)),
            hugging_face_table(config, cls),
        )
    if head == "ForCTC":
        assert count == PARAMETERS.get(name, count)


@pytest.mark.parametrize(("name", "layers"), [("base", 12), ("large_lv60", 2)])
def test_full_size_in_float32(name, layers):
    with harness.precision("float32"):
        theirs_config = transformers.Wav2Vec2Config(**(PUBLISHED[name] | {"num_hidden_layers": layers}))
        reference = harness.randomise(transformers.Wav2Vec2ForCTC(theirs_config), 0, torch.float32)
        config = dataclasses.replace(getattr(wav2vec2.Wav2Vec2Config, name)(), num_hidden_layers=layers)
        model = blank(lambda: wav2vec2.Wav2Vec2ForCTC(config, rngs=nnx.Rngs(0)))
        harness.port(reference, model, hugging_face_table(config, "Wav2Vec2ForCTC"))
        x = waves(1, 16_000).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(jitted(model)(input_values=x), theirs)


def test_bfloat16_stays_close():
    _, model, _ = pair("Wav2Vec2ForCTC")
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    half = blank(lambda: wav2vec2.Wav2Vec2ForCTC(model.config, **options))
    harness.assign(half, harness.parameters(model))
    x = waves()
    ours = jitted(half)(input_values=x).logits
    assert ours.dtype == jnp.bfloat16
    harness.assert_close(ours, np.asarray(jitted(model)(input_values=x).logits, np.float32), name="bfloat16 logits")


# --- conversion ------------------------------------------------------------------------------------------------------


def assert_same_weights(model, reference, cls: str, *, without: str = "") -> None:
    """Our parameters are the original's, to the bit, by the table of Hugging Face names."""
    table, ours = hugging_face_table(model.config, cls), harness.parameters(model)
    if without:
        ours.pop(without)
    wanted = dict(table.read(harness.StateDict(reference.state_dict()), table.steps_for(ours)))
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.parametrize("head", HEADS)
def test_hugging_face_directories(head, tmp_path):
    """What `save_pretrained` writes loads; what we export loads there, and back, to the bit."""
    from audiozoo import checkpoints
    from audiozoo.loading import convert, variables
    from weights_conversion.readers import write_safetensors
    from weights_conversion.wav2vec2 import hugging_face, open_checkpoint

    name = f"Wav2Vec2{head}"
    changes = LAYER | ({} if head != "ForCTC" else {"adapter_attn_dim": 5})
    with harness.precision("float32"):
        reference = harness.randomise(
            getattr(transformers, name)(transformers.Wav2Vec2Config(**(TINY | changes))), 2, torch.float32
        )
        reference.save_pretrained(tmp_path / "theirs")
        foreign = open_checkpoint(tmp_path / "theirs")
        assert foreign.model_class == name
        model = convert(foreign, getattr(wav2vec2, name))
        form = hugging_face(model)
        with checkpoints.written_whole(tmp_path / "ours") as directory:
            for file, content in form.files.items():
                (directory / file).write_text(json.dumps(content))
            write_safetensors(directory, form.table.write({n: v[...] for n, v in variables(model).items()}))
        back, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for key, tensor in reference.state_dict().items():
            np.testing.assert_array_equal(back.state_dict()[key], tensor)
        config = back.config.to_dict()
        for key, value in config_to_hugging_face(model.config, name, "wav2vec2").items():
            if key not in ("dtype", "architectures", "id2label"):
                assert json.dumps(config[key]) == json.dumps(value), key


def test_old_names_missing_mask_vector_and_left_over_heads(tmp_path):
    """A fine-tuned directory of 2021: weight_g and weight_v, no vector for masked frames, a quantiser left over."""
    from audiozoo.loading import convert
    from weights_conversion.wav2vec2 import open_checkpoint

    with harness.precision("float32"):
        reference = harness.randomise(
            transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**TINY)), 2, torch.float32
        )
        state = reference.state_dict()
        old = {}
        for key, tensor in state.items():
            key = key.replace("parametrizations.weight.original0", "weight_g")
            old[key.replace("parametrizations.weight.original1", "weight_v")] = tensor
        del old["wav2vec2.masked_spec_embed"]
        old["quantizer.codevectors"] = torch.zeros(1, 10, 4)
        torch.save(old, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(
            json.dumps(TINY | {"architectures": ["Wav2Vec2ForCTC"], "model_type": "wav2vec2"})
        )
        model = convert(open_checkpoint(tmp_path), wav2vec2.Wav2Vec2ForCTC)
        assert_same_weights(model, reference, "Wav2Vec2ForCTC", without="wav2vec2.masked_spec_embed")
        drawn = model.wav2vec2.masked_spec_embed[...]
        assert len(np.unique(drawn)) == len(drawn)
        bare = convert(open_checkpoint(tmp_path, "Wav2Vec2Model"), wav2vec2.Wav2Vec2Model)
        assert_same_weights(bare, reference.wav2vec2, "Wav2Vec2Model", without="masked_spec_embed")


def test_adapters_of_another_language(tmp_path):
    from safetensors.torch import save_file

    from weights_conversion.wav2vec2 import load_adapter

    changes = LAYER | {"adapter_attn_dim": 5}
    reference, model, _ = pair("Wav2Vec2ForCTC", **changes)
    other = harness.randomise(
        transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**(TINY | changes | {"vocab_size": 17}))), 9
    )
    save_file({k: v.contiguous() for k, v in other._get_adapters().items()}, tmp_path / "adapter.fra.safetensors")
    reference.config._name_or_path = str(tmp_path)
    reference.target_lang = "eng"
    reference.load_adapter("fra")
    french = load_adapter(model, tmp_path, "fra")
    x = waves(1)
    with torch.no_grad():
        theirs = reference(torch.tensor(x)).logits
    assert theirs.shape[-1] == 17 == french.config.vocab_size
    harness.assert_close(jitted(french)(input_values=x).logits, theirs)
    assert model.config.vocab_size == 11  # the model itself is as it was
    with pytest.raises(FileNotFoundError, match=r"no adapter for 'deu'; it has fra"):
        load_adapter(model, tmp_path, "deu")


FAIRSEQ = (
    ("feature_projection.layer_norm", "layer_norm"),
    ("feature_projection.projection", "post_extract_proj"),
    ("pos_conv_embed.conv", "pos_conv.0"),
    ("feed_forward.intermediate_dense", "fc1"),
    ("feed_forward.output_dense", "fc2"),
    ("masked_spec_embed", "mask_emb"),
    ("quantizer.codevectors", "quantizer.vars"),
    ("project_hid", "final_proj"),
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
)


def fairseq_names(state: dict, layered: bool) -> dict:
    """A state dict in fairseq's names: a map of its own, not that of the code under test."""
    result = {}
    for key, tensor in state.items():
        name = key.removeprefix("wav2vec2.")
        if name.startswith("feature_extractor.conv_layers."):
            *start, part, leaf = name.split(".")
            kind = {"conv": "0", "layer_norm": "2.1" if layered else "2"}[part]
            name = ".".join([*start, kind, leaf])
        elif ".layers." in name and ".layer_norm." in name:
            name = name.replace(".layer_norm.", ".self_attn_layer_norm.")
        name = name.replace(".attention.", ".self_attn.")
        for theirs, fairseq in FAIRSEQ:
            name = name.replace(theirs, fairseq)
        result[name] = tensor
    return result


CODEBOOK_FIELDS = ("num_codevectors_per_group", "codevector_dim", "proj_codevector_dim", "num_negatives")
NETWORK_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "do_stable_layer_norm"),
    *("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm"),
    *("num_conv_pos_embeddings", "num_conv_pos_embedding_groups"),
)
SETTINGS = {
    "arch": "wav2vec2",
    "encoder_attention_heads": 3,
    "conv_feature_layers": "[(16, 10, 5)] + [(12, 3, 2)] * 1 + [(18,2,2)]",
    "latent_groups": 2,
    "mask_prob": 0.65,
    "dropout": 0.1,
    "logit_temp": 0.1,
    "num_negatives": 4,
}


@pytest.mark.parametrize("variant", ["base", "lv60"])
@pytest.mark.parametrize("form", ["pre-trained, args", "pre-trained, cfg", "fine-tuned, args", "fine-tuned, cfg"])
def test_fairseq_files(variant, form, tmp_path):
    from argparse import Namespace

    from audiozoo.loading import convert
    from weights_conversion.wav2vec2 import open_checkpoint, recognise

    settings = SETTINGS | {"layer_norm_first": variant == "lv60"}
    tuned = form.startswith("fine")
    cls = "Wav2Vec2ForCTC" if tuned else "Wav2Vec2ForPreTraining"
    with harness.precision("float32"):
        theirs_config = transformers.Wav2Vec2Config(**(TINY | VARIANTS[variant]))
        reference = harness.randomise(getattr(transformers, cls)(theirs_config), 3, torch.float32)
        state = fairseq_names(reference.state_dict(), variant == "lv60")
        if tuned:
            state = {
                f"w2v_encoder.{'proj' if k.startswith('lm_head') else 'w2v_model'}.{k.removeprefix('lm_head.')}": v
                for k, v in state.items()
            }
        outer = settings
        if tuned:
            outer = {"_name": "wav2vec_ctc", "arch": "wav2vec_ctc", "mask_prob": 0.5, "mask_channel_prob": 0.1}
            inner = Namespace(**settings) if form.endswith("args") else {"model": settings | {"_name": "wav2vec2"}}
            outer["w2v_args"] = inner
        file = {"model": state}
        file |= {"args": Namespace(**outer)} if form.endswith("args") else {"cfg": {"model": outer}, "args": None}
        torch.save(file, tmp_path / "w2v.pt")
        assert recognise(tmp_path / "w2v.pt")
        foreign = open_checkpoint(tmp_path / "w2v.pt")
        assert foreign.model_class == cls
        assert (foreign.config.mask_time_prob, foreign.config.mask_feature_prob) == ((0.5, 0.1) if tuned else (0.65, 0))
        assert_same_weights(convert(foreign, getattr(wav2vec2, cls)), reference, cls)
    wanted = TINY | VARIANTS[variant]
    for field in NETWORK_FIELDS + (("vocab_size",) if tuned else CODEBOOK_FIELDS):
        if field in wanted:
            assert getattr(foreign.config, field) == wanted[field], field


def test_torchaudio_files(tmp_path):
    from audiozoo.loading import convert
    from weights_conversion.wav2vec2 import open_checkpoint, recognise

    changes = {"hidden_size": 32, "num_attention_heads": 16, "num_conv_pos_embedding_groups": 4} | LAYER
    changes |= {k: transformers.Wav2Vec2Config().to_dict()[k] for k in ("conv_kernel", "conv_stride")}
    changes |= {"conv_dim": (8,) * 7, "mask_time_prob": 0.0}
    with harness.precision("float32"):
        reference = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**(TINY | changes)))
        reference = harness.randomise(reference, 4, torch.float32)
        names = {}
        for key, tensor in reference.state_dict().items():
            name = key.removeprefix("wav2vec2.").replace("lm_head", "aux")
            name = name.replace("feature_projection", "encoder.feature_projection")
            name = name.replace("encoder.layers", "encoder.transformer.layers")
            name = name.replace("encoder.layer_norm", "encoder.transformer.layer_norm")
            name = name.replace("encoder.pos_conv", "encoder.transformer.pos_conv")
            name = name.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v")
            names[name] = tensor
        torch.save(names, tmp_path / "model.pt")
        assert recognise(tmp_path / "model.pt")
        foreign = open_checkpoint(tmp_path / "model.pt")
        assert foreign.config.conv_stride == tuple(reference.config.conv_stride)
        assert_same_weights(convert(foreign, wav2vec2.Wav2Vec2ForCTC), reference, "Wav2Vec2ForCTC")


@pytest.fixture(scope="module")
def fairseq_model():
    """The pure-PyTorch copy of fairseq's wav2vec 2.0."""
    return from_s3prl("wav2vec2/wav2vec2_model.py")


@pytest.mark.parametrize("layered", [False, True], ids=["group", "layer"])
def test_fairseqs_own_model(fairseq_model, layered):
    """fairseq's network under its own names: context, and the parts of the pre-training loss."""
    settings = {
        "conv_feature_layers": SETTINGS["conv_feature_layers"],
        "extractor_mode": "layer_norm" if layered else "default",
        "layer_norm_first": layered,
        "conv_bias": layered,
        "encoder_layers": 2,
        "encoder_embed_dim": 24,
        "encoder_ffn_embed_dim": 40,
        "encoder_attention_heads": 3,
        "conv_pos": 8,
        "conv_pos_groups": 3,
        "quantize_targets": True,
        "final_dim": 6,
        "latent_vars": 5,
        "latent_groups": 2,
        "latent_dim": 8,
        "num_negatives": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    with harness.precision("float32"):
        theirs_config = fairseq_model.Wav2Vec2Config(**settings)
        reference = harness.randomise(fairseq_model.Wav2Vec2Model(theirs_config), 6, torch.float32)
        changes = LAYER | {"num_conv_pos_embeddings": 8} if layered else {}
        config = config_from_hugging_face(transformers.Wav2Vec2Config(**(TINY | changes)).to_dict())
        model = blank(lambda: wav2vec2.Wav2Vec2ForPreTraining(config, rngs=nnx.Rngs(0)))
        harness.port(reference, model, fairseq_table(config, "Wav2Vec2ForPreTraining"))
        x, mask = padded()
        x = x.astype(np.float32)
        spans, _ = spans_and_negatives()
        spans[:, 24:] = False
        spans[1] = spans[0]  # fairseq wants as many masked frames in each row
        with torch.no_grad():
            context = reference(torch.tensor(x), torch.tensor(mask == 0), mask=False, features_only=True)
            whole = reference(torch.tensor(x), mask_indices=torch.tensor(spans))
        ours = jitted(model.wav2vec2)(input_values=x, attention_mask=mask)
        frames = model.wav2vec2.frame_lengths(LENGTHS[1])
        harness.assert_close(ours.last_hidden_state[0], context["x"][0])
        harness.assert_close(ours.last_hidden_state[1, :frames], context["x"][1, :frames])
        harness.assert_close(ours.extract_features, context["features"])
        ours = jitted(model)(input_values=x, mask_time_indices=spans)
        harness.assert_close(ours.features_pen, whole["features_pen"])
        harness.assert_close(ours.codevector_perplexity, whole["code_perplexity"], kind="output")
        # The first of fairseq's candidates is the truth: cosine over temperature.
        truth = wav2vec2.cosine_similarity(ours.projected_states, ours.projected_quantized_states)[spans] / 0.1
        harness.assert_close(truth, whole["x"][0].reshape(-1))


@pytest.mark.parametrize(("name", "variant"), [("Wav2Vec2ForCTC", "base"), ("Wav2Vec2ForPreTraining", "lv60")])
def test_dropouts(name, variant, monkeypatch):
    masked = name == "Wav2Vec2ForPreTraining"
    rates = harness.rates(transformers.Wav2Vec2Config(), mask_time_prob=float(masked))
    reference, model, _ = pair(name, **VARIANTS[variant], **rates)
    if not masked:
        harness.compare_in_training(reference, model, {"input_values": waves()})
        return
    given = {"input_values": waves(), "mask_time_indices": spans_and_negatives()[0]}
    choose = lambda logits, tau, hard: torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1])  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", choose)
    no_noise = jnp.zeros((2, FRAMES, 2, TINY["num_codevectors_per_group"]))
    harness.compare_in_training(reference, model, given, gumbel_noise=no_noise)
