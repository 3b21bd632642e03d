"""UniSpeech-SAT against PyTorch: taps, outputs, both pre-training losses and their gradients; Microsoft's files."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from audiozoo.layers import activations
from audiozoo.models import unispeech_sat
from tests.parity import harness, speech_family
from tests.parity.harness import blank
from tests.parity.speech_family import EVERYTHING, FRAMES, LAYER, NO_DROPOUT, TINY, jitted, padded, waves
from weights_conversion import unispeech_sat as conversion

SMALL = TINY | {"codevector_dim": 6, "num_clusters": 9}
FAMILY = speech_family.Family("UniSpeechSat", "UniSpeechSatConfig", unispeech_sat, conversion, SMALL)
pair = FAMILY.pair


@pytest.mark.parametrize(("head", "changes"), [("ForAudioFrameClassification", {}), ("ForXVector", LAYER)])
def test_every_tap_and_output(head, changes):
    reference, model, table = pair(head, **changes, mask_time_prob=0.0)
    x, mask = padded()
    extra = {"ignore_dilation": True} if head == "ForXVector" else {}
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **EVERYTHING, hidden_states_before_norm=True, **extra),
        table,
        minimum=30,
    )
    assert len(harness.compare_outputs(taps.ours, taps.reference)) >= 6


def test_other_heads():
    x, mask = padded()
    for head, changes in (("ForCTC", LAYER), ("ForSequenceClassification", {"use_weighted_layer_sum": True})):
        reference, model, _ = pair(head, seed=1, **changes)
        with torch.no_grad():
            theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask))
        harness.compare_outputs(jitted(model)(input_values=x, attention_mask=mask), theirs)
    reference, model, _ = pair("ForPreTraining", seed=1, num_hidden_layers=2)
    model.config = dataclasses.replace(model.config, utterance_contrastive_layer=1)
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask))
    stub = {"logits": "the original returns its convolutional features under that name"}
    harness.compare_outputs(jitted(model)(input_values=x, attention_mask=mask), theirs, skip=stub)


def test_ctc_gradients():
    reference, model, table = pair("ForCTC", **NO_DROPOUT, num_hidden_layers=1)
    x, mask = padded()
    labels, spans = np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]]), speech_family.spans()
    kwargs = {"attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    with speech_family.reference_in_double(), speech_family.masked(reference.unispeech_sat, spans):
        harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), **kwargs).loss,
            model,
            jax.jit(lambda m: m(x, jnp.asarray(mask), jnp.asarray(labels), mask_time_indices=jnp.asarray(spans)).loss),
            table,
        )


class Pretraining(torch.nn.Module):
    """The released objective around `transformers`' network: masked prediction, and the task for the speaker."""

    def __init__(self, config):
        super().__init__()
        whole = transformers.UniSpeechSatForPreTraining(config)
        self.config = config
        self.unispeech_sat, self.quantizer = whole.unispeech_sat, whole.quantizer
        self.project_q, self.project_hid, self.speaker_proj = whole.project_q, whole.project_hid, whole.speaker_proj
        self.label_embeddings_concat = whole.label_embeddings_concat
        self.layer_norm_for_extract = whole.layer_norm_for_extract

    def forward(self, x, mask, targets, spans, instances, noise):
        outputs = self.unispeech_sat(x, attention_mask=mask, mask_time_indices=spans, output_hidden_states=True)
        penalty = self.unispeech_sat.feature_extractor(x).pow(2).mean()
        table, frames = self.label_embeddings_concat, spans.nonzero()
        content = 0.0
        for b, t in frames:
            state = self.project_hid(outputs.last_hidden_state[b, t])
            candidates = torch.cat([table[targets[b, t]][None], table])
            scores = torch.cosine_similarity(state[None], candidates, dim=-1) / 0.1
            again = torch.arange(len(table)) == targets[b, t]
            scores = torch.cat([scores[:1], scores[1:].masked_fill(again, -torch.inf)])
            content = content + torch.logsumexp(scores, 0) - scores[0]
        middle = self.layer_norm_for_extract(outputs.hidden_states[1])[spans]
        speaker = self.speaker_proj(middle)
        logits = self.quantizer.weight_proj(middle).view(len(frames), 2, 5)
        soft = ((logits + noise[spans]) / 1.3).softmax(-1)
        hard = torch.nn.functional.one_hot(soft.argmax(-1), 5) + (soft - soft.detach())
        codes = torch.einsum("ngv,gvd->ngd", hard, self.quantizer.codevectors.view(2, 5, -1)).flatten(1)
        codes = self.project_q(codes)
        place = torch.full(spans.shape, -1).reshape(-1)
        place[spans.reshape(-1)] = torch.arange(len(frames))
        scores, wanted = [], []
        for n, (b, t) in enumerate(frames):
            rows = torch.cat([torch.tensor([n]), place[instances[b, t]]])
            scores.append(torch.cosine_similarity(speaker[n][None], codes[rows], dim=-1) / 0.1)
            wanted.append((frames[rows][:, 0] == b).double())
        speakers = torch.nn.functional.binary_cross_entropy_with_logits(torch.stack(scores), torch.stack(wanted))
        mean = logits.softmax(-1).mean(0)
        diversity = (10 - torch.exp(-(mean * mean.log()).sum(-1)).sum()) / 10
        return content + len(frames) * (0.7 * speakers + 0.1 * diversity + 10 * penalty)


def test_both_losses_and_every_gradient():
    theirs_config = FAMILY.their_config(**NO_DROPOUT, **LAYER)
    reference = harness.randomise(Pretraining(theirs_config), 4)
    config = dataclasses.replace(
        conversion.config_from_hugging_face(theirs_config.to_dict()),
        utterance_contrastive_layer=1,
        label_rate=800.0,
    )
    model = blank(lambda: unispeech_sat.UniSpeechSatForPreTraining(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    table = conversion.hugging_face_table(config, "UniSpeechSatForPreTraining")
    harness.port(reference, model, table)
    x, mask = padded()
    spans = speech_family.spans()
    labels = np.random.default_rng(3).integers(0, 9, (2, FRAMES))
    instances = np.asarray(unispeech_sat.sample_instances(jax.random.key(1), jnp.asarray(spans), 5))
    noise = np.random.default_rng(5).gumbel(size=(2, FRAMES, 2, 5))
    theirs = [torch.tensor(np.array(a)) for a in (x, mask, labels, spans, instances, noise)]

    def ours(m):
        return m(
            *(jnp.asarray(a) for a in (x, mask, labels)),
            mask_time_indices=jnp.asarray(spans),
            instances=jnp.asarray(instances),
            temperature=1.3,
            gumbel_noise=jnp.asarray(noise),
            utterance_weight=0.7,
            features_pen_weight=10.0,
        ).loss

    compared = harness.compare_gradients(reference, lambda: reference(*theirs), model, jax.jit(ours), table)
    assert {"speaker_proj.kernel", "label_embeddings_concat", "layer_norm_for_extract.scale"} <= set(compared)


def test_mutations_are_noticed():
    reference, model, _ = pair("ForXVector")
    x = waves(1)
    with torch.no_grad():
        theirs = reference(torch.tensor(x))
    unused = r".*masked_spec_embed|objective\..*"
    mutations = [
        *harness.perturbations(model, count=2, exclude=unused),
        harness.dropped(model, "tdnn.1.bias"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
    ]
    check = lambda: harness.compare_outputs(jitted(model)(input_values=x), theirs)  # noqa: E731
    assert harness.assert_detects(check, mutations) == 4


PUBLISHED = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "codevector_dim": 768,
        "proj_codevector_dim": 768,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = getattr(unispeech_sat.UniSpeechSatConfig, name)()
    with harness.precision("float32"):
        harness.assert_same_shapes(
            lambda: transformers.UniSpeechSatForPreTraining(transformers.UniSpeechSatConfig(**PUBLISHED[name])),
            lambda: unispeech_sat.UniSpeechSatForPreTraining(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, "UniSpeechSatForPreTraining"),
        )


def test_full_size_in_float32():
    with harness.precision("float32"):
        theirs_config = transformers.UniSpeechSatConfig(num_hidden_layers=4)
        reference = harness.randomise(transformers.UniSpeechSatForXVector(theirs_config), 0, torch.float32)
        reference, model, _ = FAMILY.ported(reference, "UniSpeechSatForXVector")
        x = waves(1, 16_000).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(jitted(model)(input_values=x), theirs)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Model", "ForPreTraining", "ForCTC", "ForAudioFrameClassification", "ForXVector"])
def test_hugging_face_directories(head, tmp_path):
    FAMILY.round_trip(head, tmp_path)


NAMES = (
    ("feature_projection.layer_norm", "layer_norm"),
    ("feature_projection.projection", "post_extract_proj"),
    ("pos_conv_embed.conv", "pos_conv.0"),
    ("feed_forward.intermediate_dense", "fc1"),
    ("feed_forward.output_dense", "fc2"),
    ("masked_spec_embed", "mask_emb"),
    ("parametrizations.weight.original0", "weight_g"),
    ("parametrizations.weight.original1", "weight_v"),
    ("quantizer.codevectors", "quantizer.vars"),
    ("project_hid", "final_proj"),
    ("speaker_proj", "spk_proj"),
    ("label_embeddings_concat", "label_embs_concat"),
    ("layer_norm_for_extract", "encoder.layer_norm_for_extract"),
)
SETTINGS = {
    "extractor_mode": "layer_norm",
    "conv_feature_layers": "[(16, 10, 5)] + [(12, 3, 2)] * 1 + [(18,2,2)]",
    "encoder_attention_heads": 3,
    "layer_norm_first": True,
    "relative_position_embedding": False,
    "gru_rel_pos": False,
    "mask_prob": 0.8,
    "latent_groups": 2,
    "utterance_contrastive_layer": 1,
}


@pytest.mark.parametrize("headed", [False, True], ids=["published", "with heads"])
def test_microsofts_files(headed, tmp_path):
    from audiozoo.loading import convert
    from weights_conversion import wav2vec2, wavlm

    with harness.precision("float32"):
        reference = harness.randomise(Pretraining(FAMILY.their_config(**LAYER)), 3, torch.float32)
        state = {}
        for key, tensor in reference.state_dict().items():
            if not headed and not key.startswith("unispeech_sat."):
                continue
            key = key.removeprefix("unispeech_sat.")
            if key.startswith("feature_extractor.conv_layers."):
                key = key.replace(".conv.", ".0.").replace(".layer_norm.", ".2.1.")
            elif ".layers." in key:
                key = key.replace(".layer_norm.", ".self_attn_layer_norm.")
            key = key.replace(".attention.", ".self_attn.")
            for theirs, original in NAMES:
                key = key.replace(theirs, original)
            state[key] = tensor
        torch.save({"cfg": SETTINGS, "model": state}, tmp_path / "sat.pt")
        assert conversion.recognise(tmp_path / "sat.pt")
        assert not wavlm.recognise(tmp_path / "sat.pt")
        assert not wav2vec2.recognise(tmp_path / "sat.pt")
        foreign = conversion.open_checkpoint(tmp_path / "sat.pt")
        name = "UniSpeechSatForPreTraining" if headed else "UniSpeechSatModel"
        assert foreign.model_class == name
        config = foreign.config
        assert (config.mask_time_prob, config.utterance_contrastive_layer, config.frame_rule) == (0.8, 1, "samples")
        model = convert(foreign, getattr(unispeech_sat, name))
        backbone = model.unispeech_sat if headed else model
        x = waves(1).astype(np.float32)
        with torch.no_grad():
            theirs = reference.unispeech_sat(torch.tensor(x)).last_hidden_state
        harness.assert_close(jitted(backbone)(input_values=x).last_hidden_state, theirs)
        if headed:
            np.testing.assert_array_equal(model.speaker_proj.kernel[...].T, reference.speaker_proj.weight.detach())
            np.testing.assert_array_equal(
                model.label_embeddings_concat[...], reference.label_embeddings_concat.detach()
            )
    torch.save({"cfg": SETTINGS | {"gru_rel_pos": True}, "model": state}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="trained with gru_rel_pos"):
        conversion.open_checkpoint(tmp_path / "odd.pt")


def test_dropouts():
    reference, model, _ = pair("ForCTC", **harness.rates(transformers.UniSpeechSatConfig()), **LAYER)
    harness.compare_in_training(reference, model, {"input_values": waves()})
