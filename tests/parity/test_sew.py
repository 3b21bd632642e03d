"""SEW and SEW-D against PyTorch: taps, odd lengths, padding, losses and gradients; pre-training; original files."""

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
from transformers.models.sew_d import modeling_sew_d
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2GumbelVectorQuantizer

from audiozoo.layers import activations
from audiozoo.models import sew
from audiozoo.models.wav2vec2 import sample_negative_indices
from tests.parity import harness, speech_family
from tests.parity.harness import blank
from tests.parity.speech_family import EVERYTHING, FRAMES, LENGTHS, NO_DROPOUT, TINY, jitted, padded, waves
from weights_conversion import sew as conversion

PLAIN = {k: v for k, v in TINY.items() if not k.startswith(("tdnn", "xvector", "num_codevectors"))}
# Heads of 12 channels, so that the original's sqrt(3 * 12), which it takes in float32, is exact.
DISENTANGLED = PLAIN | {"num_attention_heads": 2, "position_buckets": 8, "max_position_embeddings": 12}
SEW = speech_family.Family("SEW", "SEWConfig", sew, conversion, PLAIN)
SEWD = speech_family.Family("SEWD", "SEWDConfig", sew, conversion, DISENTANGLED)
BOTH = pytest.mark.parametrize("family", [SEW, SEWD], ids=["SEW", "SEW-D"])
LAYERED = {"feat_extract_norm": "layer", "conv_bias": True}
ODD = 680  # samples that make 33 frames


@BOTH
def test_every_tap_and_output(family):
    changes = {"num_conv_pos_embeddings": 7} if family is SEWD else {}
    reference, model, table = family.pair("ForCTC", **changes)
    x, mask = padded()
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **EVERYTHING),
        table,
        minimum=25,
    )
    assert len(harness.compare_outputs(taps.ours, taps.reference)) >= 6


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (SEW, {"conv_dim": (16, 12, 24), "squeeze_factor": 3}),
        (SEWD, LAYERED | {"share_att_key": False, "norm_rel_ebd": "none"}),
        (SEWD, {"pos_att_type": ["c2p"], "num_attention_heads": 3, "norm_rel_ebd": "Layer_Norm"}),
    ],
    ids=["no projection, in threes", "own projections", "c2p alone"],
)
def test_variants_and_odd_lengths(family, changes):
    reference, model, _ = family.pair("Model", seed=1, **changes)
    x = waves(2, ODD)
    mask = np.where(np.arange(ODD) < np.array([[ODD], [480]]), 1, 0)
    run = jitted(model, **EVERYTHING)
    with torch.no_grad():
        alone = reference(torch.tensor(x), **EVERYTHING)
        together = reference(torch.tensor(x * mask), attention_mask=torch.tensor(mask), **EVERYTHING)
    harness.compare_outputs(run(input_values=x), alone)
    harness.compare_outputs(run(input_values=x * mask, attention_mask=mask), together)
    left_over = 33 % model.config.squeeze_factor
    if left_over:
        assert (np.asarray(run(input_values=x).last_hidden_state)[:, -left_over:] == 0).all()


def test_buckets_are_the_originals():
    distances = np.arange(-3000, 3001)
    with harness.precision("float32"):
        wanted = modeling_sew_d.make_log_bucket_position(torch.tensor(distances), 256, 512)
    np.testing.assert_array_equal(sew.log_bucket_positions(distances, 256, 512), wanted.long())


# --- losses ----------------------------------------------------------------------------------------------------------


@BOTH
def test_ctc_gradients(family):
    reference, model, table = family.pair("ForCTC", **NO_DROPOUT)
    x, mask = padded()
    labels = np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]])
    spans = speech_family.spans()
    kwargs = {"attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    with speech_family.reference_in_double(), speech_family.masked(getattr(reference, table_prefix(family)), spans):
        compared = harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), **kwargs).loss,
            model,
            jax.jit(lambda m: m(x, jnp.asarray(mask), jnp.asarray(labels), mask_time_indices=jnp.asarray(spans)).loss),
            table,
        )
    assert len(compared) > 45


def table_prefix(family):
    return "sew" if family is SEW else "sew_d"


class Predictor(torch.nn.Module):
    def __init__(self, inputs, inner, outputs):
        super().__init__()
        self.dense_1 = torch.nn.Linear(inputs, inner, bias=False)
        self.batch_norm = torch.nn.BatchNorm1d(inner)
        self.batch_norm.num_batches_tracked = None
        self.dense_2 = torch.nn.Linear(inner, outputs)

    def forward(self, x):
        return self.dense_2(torch.relu(self.batch_norm(self.dense_1(x))))


class Pretraining(torch.nn.Module):
    """The released objective around `transformers`' network: only masked frames reach the heads."""

    def __init__(self, family, config, inner):
        super().__init__()
        self.config, self.prefix = config, table_prefix(family)
        setattr(self, self.prefix, getattr(transformers, f"{family.prefix}Model")(config))
        self.quantizer = Wav2Vec2GumbelVectorQuantizer(config)
        self.quantizer.temperature = 1.3
        self.project_hid = Predictor(config.hidden_size, inner, config.proj_codevector_dim)
        self.project_q = Predictor(config.codevector_dim, inner, config.proj_codevector_dim)

    def forward(self, x, mask, spans, negatives, noise):
        network = getattr(self, self.prefix)
        outputs = network(x, attention_mask=mask, mask_time_indices=spans).last_hidden_state
        features = network.feature_extractor(x)
        penalty = features.pow(2).mean()
        frames = network.layer_norm(features.transpose(1, 2))[spans]
        logits = self.quantizer.weight_proj(frames).view(len(frames), 2, -1)
        soft = ((logits + noise[spans]) / 1.3).softmax(-1)
        hard = torch.nn.functional.one_hot(soft.argmax(-1), logits.shape[-1]) + (soft - soft.detach())
        books = self.quantizer.codevectors.view(2, logits.shape[-1], -1)
        codes = torch.einsum("ngv,gvd->ngd", hard, books)
        use = logits.softmax(-1).mean(0)
        in_use = torch.exp(-(use * use.log()).sum(-1)).sum()
        truth, context = self.project_q(codes.flatten(1)), self.project_hid(outputs[spans])
        place = torch.full(spans.shape, -1).reshape(-1)
        place[spans.reshape(-1)] = torch.arange(len(frames))
        chosen, loss = soft.argmax(-1), 0.0
        for n, others in enumerate(negatives[spans]):
            rows = torch.cat([torch.tensor([n]), place[others]])
            scores = torch.cosine_similarity(context[n][None], truth[rows], dim=-1) / 0.1
            same = (chosen[rows[1:]] == chosen[n]).all(-1)
            scores = torch.cat([scores[:1], scores[1:].masked_fill(same, -torch.inf)])
            loss = loss + torch.logsumexp(scores, 0) - scores[0]
        entries = 2 * logits.shape[-1]
        return loss + len(frames) * (0.1 * (entries - in_use) / entries + 10 * penalty)


@BOTH
def test_pretraining_loss_every_gradient_and_statistic(family):
    books = {"num_codevectors_per_group": 5, "num_codevector_groups": 2, "feat_quantizer_dropout": 0.0}
    theirs = family.their_config(**NO_DROPOUT, **books, diversity_loss_weight=0.1, num_hidden_layers=1)
    reference = harness.randomise(Pretraining(family, theirs, 16), 3)
    config = dataclasses.replace(conversion.config_from_hugging_face(theirs.to_dict()), mlp_hidden_size=16)
    name = f"{family.prefix}ForPreTraining"
    model = blank(lambda: getattr(sew, name)(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    table = conversion.hugging_face_table(config, name)
    harness.port(reference, model, table)
    reference.project_hid.train()
    reference.project_q.train()
    x, mask = padded()
    spans = speech_family.spans()
    negatives = np.asarray(jax.jit(sample_negative_indices, static_argnums=2)(jax.random.key(2), spans, 4))
    noise = np.random.default_rng(5).gumbel(size=(2, FRAMES, 2, 5))

    def ours(m):
        options = {"temperature": 1.3, "gumbel_noise": jnp.asarray(noise), "features_pen_weight": 10.0}
        spans_, negatives_ = jnp.asarray(spans), jnp.asarray(negatives)
        return m(jnp.asarray(x), jnp.asarray(mask), spans_, negatives_, **options, key=jax.random.key(0)).loss

    arguments = [torch.tensor(np.array(a)) for a in (x, mask, spans, negatives, noise)]
    compared = harness.compare_gradients(reference, lambda: reference(*arguments), model, jax.jit(ours), table)
    assert {"project_q.dense_1.kernel", "project_hid.batch_norm.scale", "quantizer.codevectors"} <= set(compared)

    # The running statistics move by PyTorch's step; ours are read from the model after the call.
    @jax.jit
    def step(m):
        ours(m)
        return m.project_q.batch_norm.mean[...], m.project_hid.batch_norm.var[...]

    mean, var = step(model)
    harness.assert_close(mean, reference.project_q.batch_norm.running_mean)
    harness.assert_close(var, reference.project_hid.batch_norm.running_var)


# --- where this is better than the original --------------------------------------------------------------------------


@BOTH
def test_the_end_of_a_recording_does_not_depend_on_its_neighbours(family):
    reference, model, _ = family.pair("ForCTC", **LAYERED)
    x, mask = padded()
    with torch.no_grad():
        together = reference(torch.tensor(x), attention_mask=torch.tensor(mask)).logits[1, :23]
        alone = reference(torch.tensor(x[1:, : LENGTHS[1]])).logits[0]
    assert len(alone) == 23  # odd
    assert (together - alone).abs().max() > 0.01
    exact = blank(
        lambda: type(model)(
            dataclasses.replace(model.config, squeeze_rule="floor"), param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
    )
    harness.assign(exact, harness.parameters(model))
    ours = jitted(exact)(input_values=x, attention_mask=mask).logits
    harness.assert_close(ours[1, :23], alone, name="the padded row against the row alone")
    harness.assert_close(jitted(model)(input_values=x, attention_mask=mask).logits[1, :23], together)


def test_classifier_over_mixed_layers():
    """Without padding as the original; with padding the item alone, where the original pools padding."""
    reference, model, _ = SEWD.pair("ForSequenceClassification", **LAYERED, use_weighted_layer_sum=True)
    x, mask = padded()
    mask[1, 460:] = 0  # 22 frames, no half pair
    x = x * mask
    with torch.no_grad():
        whole = reference(torch.tensor(x[:1])).logits
        alone = reference(torch.tensor(x[1:, :460])).logits[0]
        together = reference(torch.tensor(x), attention_mask=torch.tensor(mask)).logits[1]
    assert (together - alone).abs().max() > 1e-3
    run = jitted(model)
    harness.assert_close(run(input_values=x[:1]).logits, whole)
    ours = run(input_values=x, attention_mask=mask).logits
    harness.assert_close(ours[1], alone, name="the padded row against the row alone")


# --- mutations, sizes, precision -------------------------------------------------------------------------------------


def test_mutations_are_noticed():
    reference, model, _ = SEWD.pair("ForCTC")
    x = waves(1)
    with torch.no_grad():
        theirs = reference(torch.tensor(x))
    mutations = [
        *harness.perturbations(model, count=2, exclude=".*masked_spec_embed|.*rel_embeddings.*"),
        harness.dropped(model, "sew_d.encoder.upsample.projection.bias"),
        harness.dropped(model, "sew_d.encoder.rel_layer_norm.bias"),
        harness.Replaced(activations.ACTIVATIONS, "gelu_python", activations.gelu_tanh),
        harness.Replaced(sew, "log_bucket_positions", lambda d, b, m: np.clip(d, -b, b)),
    ]
    check = lambda: harness.compare_outputs(jitted(model)(input_values=x), theirs)  # noqa: E731
    assert harness.assert_detects(check, mutations) == 6


SIZES = {
    "sew_tiny": (12, 512, 31, 64),
    "sew_small": (12, 768, 31, 64),
    "sew_mid": (24, 768, 31, 64),
    "sew_d_tiny": (12, 384, 31, 64),
    "sew_d_small": (12, 512, 31, 64),
    "sew_d_mid": (24, 512, 31, 64),
    "sew_d_mid_k127": (24, 512, 127, 64),
    "sew_d_base": (24, 768, 31, 64),
    "sew_d_base_plus": (24, 768, 31, 96),
}
MILLIONS = {"sew_tiny": 40.7, "sew_small": 89.6, "sew_mid": 174.7, "sew_d_tiny": 24.1, "sew_d_small": 41.0}
MILLIONS |= {"sew_d_mid": 78.8, "sew_d_base": 175.1, "sew_d_base_plus": 177.0}


def published(name, layers=None):
    count, width, taps, channels = SIZES[name]
    fields = {
        "num_hidden_layers": layers or count,
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "num_conv_pos_embeddings": taps,
        "conv_dim": tuple(channels * c // 64 for c in (64, *(128,) * 4, *(256,) * 4, *(512,) * 4)),
    }
    return getattr(transformers, "SEWDConfig" if "_d_" in name else "SEWConfig")(**fields)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    config, cls = getattr(sew.SEWConfig, name)(), "SEWDForCTC" if "_d_" in name else "SEWForCTC"
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: getattr(transformers, cls)(published(name)),
            lambda: getattr(sew, cls)(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, cls),
        )
    if name in MILLIONS:
        assert abs(count / 1e6 - MILLIONS[name]) < 0.1, count


@pytest.mark.parametrize("name", ["sew_tiny", "sew_d_tiny"])
def test_full_size_in_float32(name):
    family, cls = (SEWD, "SEWDForCTC") if "_d_" in name else (SEW, "SEWForCTC")
    with harness.precision("float32"):
        reference = harness.randomise(getattr(transformers, cls)(published(name)), 0, torch.float32)
        reference, model, _ = family.ported(reference, cls)
        x = waves(1, 16_000).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(jitted(model)(input_values=x), theirs)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head"),
    [(SEW, "Model"), (SEW, "ForCTC"), (SEWD, "Model"), (SEWD, "ForCTC"), (SEWD, "ForSequenceClassification")],
)
def test_hugging_face_directories(family, head, tmp_path):
    model = family.round_trip(head, tmp_path)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"].startswith("sew")
    bare = conversion.open_checkpoint(tmp_path / "theirs", f"{family.prefix}Model")
    steps = bare.table.plan(bare.tensors, harness.parameters(model if head == "Model" else model.backbone))
    assert len(steps) > 40


NAMES = (
    ("feature_projection", "post_extract_proj"),
    ("pos_conv_embed.conv", "pos_conv.0"),
    ("upsample.projection", "upsample.0"),
    ("feed_forward.intermediate_dense", "fc1"),
    ("feed_forward.output_dense", "fc2"),
    ("masked_spec_embed", "mask_emb"),
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
)


def original_names(state, prefix):
    """A state dict in the original code's names: a map of its own, not that of the code under test."""
    result = {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        if name.startswith("feature_extractor.conv_layers."):
            name = name.replace(".conv.weight", ".0.weight").replace(".layer_norm.", ".2.")
        elif "encoder.layers." in name:
            name = name.replace(".layer_norm.", ".self_attn_layer_norm.").replace(".attention.", ".self_attn.")
        for theirs, original in NAMES:
            name = name.replace(theirs, original)
        result[name] = tensor
    return result


@BOTH
@pytest.mark.parametrize("tuned", [False, True], ids=["pre-trained", "fine-tuned"])
def test_original_files(family, tuned, tmp_path):
    from audiozoo.loading import convert

    disentangled = family is SEWD
    settings = {
        "_name": "squeeze_wav2vec2_deberta" if disentangled else "squeeze_wav2vec2",
        "encoder_attention_heads": 2 if disentangled else 3,
        "conv_feature_layers": "[(16, 10, 5)] + [(12, 3, 2)] * 1 + [(18,2,2)]",
        "layer_norm_first": False,
        "squeeze_factor": 2,
        "encoder_layerdrop": 0.05,
        "latent_groups": 2,
        "mask_prob": 0.65,
    }
    if disentangled:
        settings |= {"position_buckets": 8, "max_position_embeddings": 12, "pos_att_type": "p2c|c2p"}
        settings |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "activation_fn": "gelu"}
    with harness.precision("float32"):
        cls = getattr(transformers, f"{family.prefix}{'ForCTC' if tuned else 'Model'}")
        reference = harness.randomise(cls(family.their_config()), 2, torch.float32)
        state = original_names(reference.state_dict(), f"{table_prefix(family)}.")
        if tuned:
            state = {
                f"w2v_encoder.{'proj' if k.startswith('lm_head') else 'w2v_model'}.{k.removeprefix('lm_head.')}": v
                for k, v in state.items()
            }
            outer = {"_name": "wav2vec_ctc", "mask_prob": 0.5, "w2v_args": {"model": settings}}
        else:
            outer = settings
            for head, inputs in (("final_proj", 24), ("project_q", 8)):
                state[f"{head}.net.0.weight"] = torch.randn(16, inputs, 1)
                for part, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.1), ("running_var", 2.0)):
                    state[f"{head}.net.1.{part}"] = torch.full((16,), value)
                state[f"{head}.net.1.num_batches_tracked"] = torch.tensor(7)
                state |= {f"{head}.net.3.weight": torch.randn(6, 16, 1), f"{head}.net.3.bias": torch.randn(6)}
            state |= {"quantizer.vars": torch.randn(1, 10, 4), "quantizer.weight_proj.weight": torch.randn(10, 18)}
            state["quantizer.weight_proj.bias"] = torch.randn(10)
        torch.save({"cfg": {"model": outer}, "args": None, "model": state}, tmp_path / "sew.pt")
        assert conversion.recognise(tmp_path / "sew.pt")
        foreign = conversion.open_checkpoint(tmp_path / "sew.pt")
        name = f"{family.prefix}{'ForCTC' if tuned else 'ForPreTraining'}"
        assert foreign.model_class == name
        model = convert(foreign, getattr(sew, name))
        assert model.config.layerdrop == 0.05
        assert model.config.squeeze_rule == "floor"
        x = waves(1).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        backbone = model if tuned else model.backbone
        harness.compare_outputs(jitted(backbone)(input_values=x), theirs)
    if not tuned:
        np.testing.assert_array_equal(
            model.project_q.dense_1.kernel[...], state["project_q.net.0.weight"][:, :, 0].numpy().T
        )
        np.testing.assert_array_equal(model.project_hid.batch_norm.var[...], np.full(16, 2.0))


@BOTH
def test_dropouts(family, monkeypatch):
    monkeypatch.setattr(
        modeling_sew_d.StableDropout,
        "forward",
        lambda self, x: torch.nn.functional.dropout(x, self.drop_prob, self.training),
    )
    reference, model, _ = family.pair("ForCTC", **harness.rates(getattr(transformers, family.config_class)()))
    harness.compare_in_training(reference, model, {"input_values": waves()})
