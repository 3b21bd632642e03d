"""WavLM against PyTorch: taps, outputs, losses and gradients; masked prediction; Microsoft's own model and files."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from audiozoo.layers import activations
from audiozoo.models import wavlm
from audiozoo.models.wav2vec2 import frame_mask
from tests.parity import harness, speech_family
from tests.parity.harness import blank
from tests.parity.speech_family import (
    EVERYTHING,
    FRAMES,
    LAYER,
    LENGTHS,
    NO_DROPOUT,
    TINY,
    from_s3prl,
    jitted,
    padded,
    waves,
)
from weights_conversion import wavlm as conversion

BUCKETS = {"num_buckets": 16, "max_bucket_distance": 20}
FAMILY = speech_family.Family("WavLM", "WavLMConfig", wavlm, conversion, TINY | BUCKETS)
pair = FAMILY.pair
AVERAGED = {"attentions": "the original's are averaged over heads; test_attention_weights_are_each_heads_own"}


@pytest.mark.parametrize(("head", "changes"), [("ForCTC", LAYER), ("ForXVector", {"num_conv_pos_embeddings": 7})])
def test_every_tap_and_output(head, changes):
    reference, model, table = pair(head, **changes)
    x, mask = padded()
    extra = {"ignore_dilation": True} if head == "ForXVector" else {}
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **EVERYTHING, hidden_states_before_norm=True, **extra),
        table,
        minimum=30,
        skip={r".*\.rel_attn_embed": "read at every pair of frames there, at every distance here"},
    )
    harness.compare_outputs(taps.ours, taps.reference, skip=AVERAGED)
    # The laid-out table itself.
    frames = FRAMES
    wanted = reference.wavlm.encoder.layers[0].attention.compute_bias(frames, frames)
    harness.assert_close(model.wavlm.encoder.position_bias(frames), wanted)


def test_other_heads_and_the_bare_model():
    x, mask = padded()
    for head, changes in (
        ("ForSequenceClassification", {"use_weighted_layer_sum": True}),
        ("ForAudioFrameClassification", LAYER),
        ("Model", {"add_adapter": True, "num_adapter_layers": 1}),
    ):
        reference, model, _ = pair(head, seed=1, **changes)
        with torch.no_grad():
            theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask))
        harness.compare_outputs(jitted(model)(input_values=x, attention_mask=mask), theirs)


@pytest.mark.parametrize(("buckets", "distance"), [(320, 800), (320, 1280), (16, 20)])
def test_buckets_are_the_originals(buckets, distance):
    attention = WavLMAttention(6, 3, num_buckets=buckets, max_distance=distance)
    distances = np.arange(-3000, 3001)
    with harness.precision("float32"):
        wanted = attention._relative_positions_bucket(torch.tensor(distances))
    ours = wavlm.relative_position_buckets(distances, buckets, distance)
    np.testing.assert_array_equal(ours, wanted)
    assert set(ours) == set(range(buckets)) - {buckets // 2}  # distance 0 belongs to the first half


def test_attention_weights_are_each_heads_own():
    """The original gives every head the mean over heads; ours are what each head's scores say."""
    reference, model, _ = pair("Model")
    x, mask = padded()
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING)
        first = reference.encoder.layers[0].attention
        hidden = theirs.hidden_states[0]
        heads = hidden.view(2, FRAMES, 3, 8).transpose(1, 2)
        gates = torch.sigmoid(first.gru_rel_pos_linear(heads).view(2, 3, FRAMES, 2, 4).sum(-1))
        gate = gates[..., :1] * (gates[..., 1:] * first.gru_rel_pos_const - 1) + 2
        query, key = (p(hidden).view(2, FRAMES, 3, 8).transpose(1, 2) for p in (first.q_proj, first.k_proj))
        scores = query @ key.transpose(2, 3) / 8**0.5 + gate * first.compute_bias(FRAMES, FRAMES)
        frames = reference._get_feature_vector_attention_mask(FRAMES, torch.tensor(mask))
        by_head = scores.masked_fill(~frames[:, None, None], -torch.inf).softmax(-1)
    ours = jitted(model, **EVERYTHING)(input_values=x, attention_mask=mask)
    harness.assert_close(ours.attentions[0], by_head)
    assert np.abs(np.diff(ours.attentions[0], axis=1)).max() > 0.01
    for mine, averaged in zip(ours.attentions, theirs.attentions, strict=True):
        assert torch.equal(averaged[:, 0], averaged[:, 1])
        harness.assert_close(jnp.broadcast_to(mine.mean(1, keepdims=True), mine.shape), averaged)


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _reference_in_double():
    with speech_family.reference_in_double():
        yield


@pytest.mark.usefixtures("_reference_in_double")
def test_ctc_gradients():
    reference, model, table = pair("ForCTC", **(NO_DROPOUT | LAYER))
    x, mask = padded()
    labels = np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]])
    spans = speech_family.spans()
    kwargs = {"attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    with speech_family.masked(reference.wavlm, spans):
        compared = harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), **kwargs).loss,
            model,
            jax.jit(lambda m: m(x, jnp.asarray(mask), jnp.asarray(labels), mask_time_indices=jnp.asarray(spans)).loss),
            table,
        )
    assert "wavlm.encoder.layers.0.attention.rel_attn_embed.embedding" in compared
    assert "wavlm.encoder.layers.1.attention.gru_rel_pos_const" in compared
    assert "wavlm.masked_spec_embed" in compared


def test_x_vector_gradients():
    x, mask = padded()
    labels = np.array([1, 4])
    changes = {"use_weighted_layer_sum": True, "mask_time_prob": 0.0, "num_hidden_layers": 1}
    reference, model, table = pair("ForXVector", **NO_DROPOUT, **changes)
    compared = harness.compare_gradients(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss,
        model,
        jax.jit(lambda m: m(x, jnp.asarray(mask), jnp.asarray(labels), ignore_dilation=True).loss),
        table,
    )
    assert "layer_weights" in compared


class Pretraining(torch.nn.Module):
    """The released objective around `transformers`' network, which has none: frame by frame, the truth first."""

    def __init__(self, config, clusters):
        super().__init__()
        self.config = config
        self.wavlm = transformers.WavLMModel(config)
        self.final_proj = torch.nn.Linear(config.hidden_size, config.proj_codevector_dim)
        self.label_embeddings = torch.nn.Parameter(torch.zeros(clusters, config.proj_codevector_dim))

    def logits(self, states, targets):
        rows = []
        for state, target in zip(states, targets, strict=True):
            candidates = torch.cat([self.label_embeddings[target][None], self.label_embeddings])
            row = torch.cosine_similarity(state[None], candidates, dim=-1) / 0.1
            again = (candidates[1:] == candidates[0]).all(-1)
            rows.append(torch.cat([row[:1], row[1:].masked_fill(again, -torch.inf)]))
        return torch.stack(rows)

    def forward(self, x, mask, targets, spans, valid, unmasked_weight):
        outputs = self.wavlm(x, attention_mask=mask, mask_time_indices=spans)
        states = self.final_proj(outputs.last_hidden_state)
        penalty = self.wavlm.feature_extractor(x).pow(2).mean()
        loss, count = 0.0, 0
        for chosen, weight in ((spans & valid, 1.0), (~spans & valid, unmasked_weight)):
            if weight:
                logits = self.logits(states[chosen], targets[chosen])
                zeros = torch.zeros(len(logits), dtype=torch.long)
                loss = loss + weight * torch.nn.functional.cross_entropy(logits, zeros, reduction="sum")
                count += len(logits)
        return loss + 10 * penalty * count


def test_masked_prediction_and_every_gradient():
    clusters, unmasked_weight = 9, 0.3
    config = FAMILY.their_config(**NO_DROPOUT)
    reference = harness.randomise(Pretraining(config, clusters), 4)
    ours = dataclasses.replace(conversion.config_from_hugging_face(config.to_dict()), num_clusters=clusters)
    # 16,000 / 20 samples a frame: 800 frames a second here, and half as many targets.
    ours = dataclasses.replace(ours, label_rate=400.0)
    model = blank(lambda: wavlm.WavLMForPreTraining(ours, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    table = conversion.hugging_face_table(ours, "WavLMForPreTraining")
    harness.port(reference, model, table)
    x, mask = padded()
    spans = speech_family.spans()
    labels = np.random.default_rng(3).integers(0, clusters, (2, FRAMES // 2))
    targets = labels[:, np.arange(FRAMES) // 2]
    valid = np.arange(FRAMES) < np.array(model.wavlm.frame_lengths(np.array(LENGTHS)))[:, None]
    theirs = [torch.tensor(a) for a in (x, mask, targets, spans, valid)]
    harness.compare_gradients(
        reference,
        lambda: reference(*theirs, unmasked_weight),
        model,
        jax.jit(
            lambda m: (
                m(
                    jnp.asarray(x),
                    jnp.asarray(mask),
                    jnp.asarray(labels),
                    mask_time_indices=jnp.asarray(spans),
                    unmasked_weight=unmasked_weight,
                    features_pen_weight=10.0,
                ).loss
            )
        ),
        table,
    )


# --- mutations, sizes, precision -------------------------------------------------------------------------------------


def test_mutations_are_noticed():
    reference, model, _ = pair("ForCTC", **LAYER)
    x = waves(1)
    with torch.no_grad():
        theirs = reference(torch.tensor(x))
    attention = "wavlm.encoder.layers.1.attention"
    mutations = [
        *harness.perturbations(model, count=2, exclude=".*masked_spec_embed"),
        harness.dropped(model, f"{attention}.gru_rel_pos_linear.bias"),
        harness.dropped(model, f"{attention}.gru_rel_pos_const"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
        harness.Replaced(wavlm, "relative_position_buckets", lambda d, n, m: np.abs(d) % n),
    ]
    check = lambda: harness.compare_outputs(jitted(model)(input_values=x), theirs)  # noqa: E731
    assert harness.assert_detects(check, mutations) == 6


PUBLISHED = {
    "base": {},
    "base_plus": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    },
}
PARAMETERS = {"base": 94_380_000, "large": 315_450_000}


@pytest.mark.parametrize("name", ["base", "large"])
def test_published_sizes(name):
    config = getattr(wavlm.WavLMConfig, name)()
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: transformers.WavLMModel(transformers.WavLMConfig(**PUBLISHED[name])),
            lambda: wavlm.WavLMModel(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, "WavLMModel"),
        )
    assert abs(count - PARAMETERS[name]) < 20_000


@pytest.mark.parametrize(("name", "layers"), [("base", 12), ("large", 2)])
def test_full_size_in_float32(name, layers):
    with harness.precision("float32"):
        theirs_config = transformers.WavLMConfig(**(PUBLISHED[name] | {"num_hidden_layers": layers}))
        reference = harness.randomise(transformers.WavLMForCTC(theirs_config), 0, torch.float32)
        reference, model, _ = FAMILY.ported(reference, "WavLMForCTC")
        x = waves(1, 32_000).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(jitted(model)(input_values=x), theirs)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head", ["Model", "ForCTC", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector"]
)
def test_hugging_face_directories(head, tmp_path):
    FAMILY.round_trip(head, tmp_path, **LAYER)


@pytest.fixture(scope="module")
def microsofts():
    """Microsoft's WavLM."""
    from_s3prl("wavlm/modules.py")
    return from_s3prl("wavlm/WavLM.py")


@pytest.mark.parametrize("layered", [False, True], ids=["base", "large"])
def test_microsofts_own_model_and_file(microsofts, layered, tmp_path):
    """Its file loads, with its settings; its network, padded by its own rule, gives the same."""
    from audiozoo.loading import convert

    settings = {
        "conv_feature_layers": "[(16, 10, 5)] + [(12, 3, 2)] * 1 + [(18,2,2)]",
        "extractor_mode": "layer_norm" if layered else "default",
        "layer_norm_first": layered,
        "encoder_layers": 2,
        "encoder_embed_dim": 24,
        "encoder_ffn_embed_dim": 40,
        "encoder_attention_heads": 3,
        "conv_pos": 8,
        "conv_pos_groups": 3,
        "relative_position_embedding": True,
        "gru_rel_pos": True,
        "num_buckets": 16,
        "max_distance": 20,
        "dropout": 0.0,
        "mask_prob": 0.8,
    }
    x, mask = padded()
    with harness.precision("float32"):
        original = microsofts.WavLM(microsofts.WavLMConfig(settings))
        reference = harness.randomise(original, 6, torch.float32)
        torch.save({"cfg": settings, "model": reference.state_dict()}, tmp_path / "WavLM-Tiny.pt")
        assert conversion.recognise(tmp_path / "WavLM-Tiny.pt")
        foreign = conversion.open_checkpoint(tmp_path / "WavLM-Tiny.pt")
        assert foreign.model_class == "WavLMModel"
        config = foreign.config
        assert (config.max_bucket_distance, config.num_buckets, config.mask_time_prob) == (20, 16, 0.8)
        assert (config.conv_stride, config.conv_kernel) == ((5, 2, 2), (10, 3, 2))
        model = convert(foreign, wavlm.WavLMModel)
        x = x.astype(np.float32)
        with torch.no_grad():
            theirs, padding = reference.extract_features(torch.tensor(x), torch.tensor(mask == 0))
        ours = jitted(model)(input_values=x, attention_mask=mask).last_hidden_state
        valid = np.asarray(model.frame_mask(jnp.asarray(mask), FRAMES))
        np.testing.assert_array_equal(valid, ~padding.numpy())
        harness.assert_close(ours[0], theirs[0])
        harness.assert_close(ours[1][valid[1]], theirs[1][valid[1]])
        # By the rule of lengths, which transformers follows, one frame fewer counts.
        shorter = frame_mask(config, jnp.asarray(mask), FRAMES, "lengths")
        assert int(shorter[1].sum()) == valid[1].sum() - 1
        if layered:
            return
        # With a head, which the file lacks, the head is drawn and the rest is the file's.
        tuned = convert(
            conversion.open_checkpoint(tmp_path / "WavLM-Tiny.pt", "WavLMForPreTraining"), wavlm.WavLMForPreTraining
        )
        np.testing.assert_array_equal(
            tuned.wavlm.encoder.layers[1].attention.gru_rel_pos_const[...],
            reference.encoder.layers[1].self_attn.grep_a.detach(),
        )
        assert float(jnp.abs(tuned.label_embeddings[...]).min()) > 0


def test_torchaudio_files(tmp_path):
    """Its names, the three projections in one; recognised as WavLM and not as wav2vec 2.0."""
    from audiozoo.loading import convert
    from weights_conversion import wav2vec2

    changes = LAYER | {"conv_dim": (8,) * 7, "mask_time_prob": 0.0}
    changes |= {k: transformers.WavLMConfig().to_dict()[k] for k in ("conv_kernel", "conv_stride")}
    with harness.precision("float32"):
        reference = harness.randomise(transformers.WavLMModel(FAMILY.their_config(**changes)), 4, torch.float32)
        state, named = reference.state_dict(), {}
        for key, tensor in state.items():
            name = key.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v")
            name = name.replace("encoder.", "encoder.transformer.").replace("feature_proj", "encoder.feature_proj")
            name = name.replace("attention.out_proj", "attention.attention.out_proj")
            if ".v_proj." in name:
                fused = torch.cat([state[key.replace("v_proj", f"{p}_proj")] for p in "qkv"])
                name, tensor = name.replace("attention.v_proj.", "attention.attention.in_proj_"), fused
            if not re.search(r"\.[qk]_proj\.", name):
                named[name] = tensor
        torch.save(named, tmp_path / "wavlm_tiny.pth")
        assert conversion.recognise(tmp_path / "wavlm_tiny.pth")
        assert not wav2vec2.recognise(tmp_path / "wavlm_tiny.pth")
        foreign = conversion.open_checkpoint(tmp_path / "wavlm_tiny.pth")
        assert (foreign.config.num_attention_heads, foreign.config.num_buckets) == (3, 16)
        model = convert(foreign, wavlm.WavLMModel)
        table, ours = conversion.hugging_face_table(model.config, "WavLMModel"), harness.parameters(model)
        wanted = dict(table.read(harness.StateDict(state), table.steps_for(ours)))
        assert set(ours) == set(wanted)
        for path, value in wanted.items():
            np.testing.assert_array_equal(ours[path], value, err_msg=path)


def test_dropouts():
    reference, model, _ = pair("ForCTC", **harness.rates(transformers.WavLMConfig()))
    harness.compare_in_training(reference, model, {"input_values": waves()})
