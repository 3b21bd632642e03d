"""UniSpeech against PyTorch: taps, outputs, the multitask loss and its gradients; directories and fairseq files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from audiozoo.layers import activations
from audiozoo.models import unispeech
from tests.parity import harness, speech_family
from tests.parity.speech_family import EVERYTHING, FRAMES, LAYER, LENGTHS, NO_DROPOUT, TINY, jitted, padded, waves
from weights_conversion import unispeech as conversion

SMALL = {k: v for k, v in TINY.items() if not k.startswith(("tdnn", "xvector"))} | {"num_ctc_classes": 7}
FAMILY = speech_family.Family("UniSpeech", "UniSpeechConfig", unispeech, conversion, SMALL)
pair = FAMILY.pair
REPLACED = np.random.default_rng(7).random((2, FRAMES)) < 0.5


@pytest.fixture
def _same_replacements(monkeypatch):
    """The original draws replacements in evaluation too; here it gets ours."""
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.tensor(REPLACED).T.to(p.dtype))


@pytest.mark.usefixtures("_same_replacements")
@pytest.mark.parametrize(("head", "changes"), [("ForPreTraining", LAYER), ("ForCTC", {})])
def test_every_tap_and_output(head, changes):
    reference, model, table = pair(head, **changes)
    x, mask = padded()
    extra = {"replaced": jnp.asarray(REPLACED)} if head == "ForPreTraining" else {}
    once = {}
    if head == "ForPreTraining":  # we quantise twice, as the training code does
        once = {r"(quantizer|project_q|project_hid)(\..*)?": "called once there, twice here; their results are outputs"}
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **EVERYTHING, hidden_states_before_norm=True, **extra),
        table,
        minimum=25,
        skip=once,
    )
    assert len(harness.compare_outputs(taps.ours, taps.reference)) >= 5


def test_classifier():
    reference, model, _ = pair("ForSequenceClassification", use_weighted_layer_sum=True)
    x, mask = padded()
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask))
    harness.compare_outputs(jitted(model)(input_values=x, attention_mask=mask), theirs)


def test_ctc_gradients():
    reference, model, table = pair("ForCTC", **NO_DROPOUT, num_hidden_layers=1)
    x, mask = padded()
    labels, spans = np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]]), speech_family.spans()
    kwargs = {"attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    with speech_family.reference_in_double(), speech_family.masked(reference.unispeech, spans):
        harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), **kwargs).loss,
            model,
            jax.jit(lambda m: m(x, jnp.asarray(mask), jnp.asarray(labels), mask_time_indices=jnp.asarray(spans)).loss),
            table,
        )


def released_loss(model, x, mask, spans, negatives, labels, noises, alpha=0.5):
    """The objective of the released training code around `transformers`' modules, one masked frame after the other."""
    config = model.config
    outputs = model.unispeech(x, attention_mask=mask, mask_time_indices=spans)
    context = outputs.last_hidden_state
    penalty = model.unispeech.feature_extractor(x).pow(2).mean()

    def quantise(noise):
        logits = model.quantizer.weight_proj(outputs.extract_features)
        logits = logits.view(2, FRAMES, 2, config.num_codevectors_per_group)
        soft = ((logits + noise) / 1.3).softmax(-1)
        index = soft.argmax(-1)
        hard = torch.nn.functional.one_hot(index, logits.shape[-1]) + (soft - soft.detach())
        books = model.quantizer.codevectors.view(2, config.num_codevectors_per_group, -1)
        codes = torch.einsum("btgv,gvd->btgd", hard, books).flatten(2)
        return model.project_hid(model.project_q(codes)), index, logits.softmax(-1)

    truth, index, use = quantise(noises[0])
    everywhere, index_everywhere, _ = quantise(noises[1])
    flat, flat_index = everywhere.flatten(0, 1), index_everywhere.flatten(0, 1)
    contrastive = 0.0
    for b, t in spans.nonzero():
        others = negatives[b, t]
        scores = torch.cosine_similarity(context[b, t][None], torch.cat([truth[b, t][None], flat[others]]), dim=-1)
        same = (flat_index[others] == index[b, t]).all(-1)
        scores = torch.cat([scores[:1], scores[1:].masked_fill(same, -torch.inf)]) / 0.1
        contrastive = contrastive + torch.logsumexp(scores, 0) - scores[0]
    mean = use[spans].mean(0)
    entries = 2 * config.num_codevectors_per_group
    diversity = (entries - torch.exp(-(mean * mean.log()).sum(-1)).sum()) / entries
    own = contrastive + int(spans.sum()) * (0.1 * diversity + 10 * penalty)
    mixed = torch.where(torch.tensor(REPLACED)[..., None], everywhere, context)
    log_probs = model.ctc_proj(mixed).log_softmax(-1).transpose(0, 1)
    lengths = model._get_feat_extract_output_lengths(mask.sum(-1))
    kept = labels >= 0
    ctc = torch.nn.functional.ctc_loss(log_probs, labels[kept], lengths, kept.sum(-1), reduction="sum")
    return alpha * ctc + (1 - alpha) * own


def test_multitask_loss_and_every_gradient():
    reference, model, table = pair("ForPreTraining", **NO_DROPOUT)
    x, mask = padded()
    spans = speech_family.spans()
    frames = model.unispeech.frame_lengths(np.array(LENGTHS))
    rng = np.random.default_rng(1)
    # Distractors from everywhere in the utterance, masked or not.
    negatives = np.stack([b * FRAMES + rng.integers(0, frames[b], (FRAMES, 4)) for b in range(2)])
    labels = np.array([[3, 4, 4, 6, -100], [1, 2, 5, -100, -100]])
    noises = rng.gumbel(size=(2, 2, FRAMES, 2, 5))
    theirs = [torch.tensor(a) for a in (x, mask, spans, negatives, labels, noises)]

    def ours(m):
        return m(
            jnp.asarray(x),
            *(jnp.asarray(a) for a in (mask, spans, negatives, labels)),
            replaced=jnp.asarray(REPLACED),
            temperature=1.3,
            gumbel_noise=jnp.asarray(noises[0]),
            gumbel_noise_everywhere=jnp.asarray(noises[1]),
            features_pen_weight=10.0,
        ).loss

    compared = harness.compare_gradients(
        reference, lambda: released_loss(reference, *theirs), model, jax.jit(ours), table
    )
    assert {"ctc_proj.kernel", "project_hid.kernel", "quantizer.codevectors"} <= set(compared)


def test_mutations_are_noticed():
    reference, model, _ = pair("ForCTC", **LAYER)
    x = waves(1)
    with torch.no_grad():
        theirs = reference(torch.tensor(x))
    mutations = [
        *harness.perturbations(model, count=2, exclude=".*masked_spec_embed"),
        harness.dropped(model, "unispeech.feature_projection.projection.bias"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
    ]
    check = lambda: harness.compare_outputs(jitted(model)(input_values=x), theirs)  # noqa: E731
    assert harness.assert_detects(check, mutations) == 4


PUBLISHED = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "codevector_dim": 768,
    "proj_codevector_dim": 768,
} | LAYER


def test_published_size():
    config = unispeech.UniSpeechConfig.large()
    with harness.precision("float32"):
        count = harness.assert_same_shapes(
            lambda: transformers.UniSpeechForPreTraining(transformers.UniSpeechConfig(**PUBLISHED)),
            lambda: unispeech.UniSpeechForPreTraining(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, "UniSpeechForPreTraining"),
        )
    assert abs(count / 1e6 - 317.5) < 1


def test_full_size_in_float32():
    with harness.precision("float32"):
        theirs_config = transformers.UniSpeechConfig(**(PUBLISHED | {"num_hidden_layers": 2}))
        reference = harness.randomise(transformers.UniSpeechForCTC(theirs_config), 0, torch.float32)
        reference, model, _ = FAMILY.ported(reference, "UniSpeechForCTC")
        x = waves(1, 16_000).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(jitted(model)(input_values=x), theirs)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["Model", "ForPreTraining", "ForCTC", "ForSequenceClassification"])
def test_hugging_face_directories(head, tmp_path):
    FAMILY.round_trip(head, tmp_path, **LAYER)


NAMES = (
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


@pytest.mark.parametrize("head", ["ForPreTraining", "ForCTC"])
def test_fairseq_files(head, tmp_path):
    from argparse import Namespace

    from audiozoo.loading import convert
    from weights_conversion import wav2vec2

    with harness.precision("float32"):
        name = f"UniSpeech{head}"
        reference = harness.randomise(getattr(transformers, name)(FAMILY.their_config(**LAYER)), 3, torch.float32)
        state = {}
        for key, tensor in reference.state_dict().items():
            key = key.removeprefix("unispeech.")
            if key.startswith("feature_extractor.conv_layers."):
                key = key.replace(".conv.", ".0.").replace(".layer_norm.", ".2.1.")
            elif ".layers." in key:
                key = key.replace(".layer_norm.", ".self_attn_layer_norm.")
            key = key.replace(".attention.", ".self_attn.")
            for theirs, fairseq in NAMES:
                key = key.replace(theirs, fairseq)
            own = key.startswith(("ctc_proj", "lm_head"))
            state["w2v_encoder." + (f"proj.{key.split('.')[1]}" if own else f"w2v_model.{key}")] = tensor
        settings = {
            "arch": "unispeech",
            "encoder_attention_heads": 3,
            "conv_feature_layers": "[(16, 10, 5)] + [(12, 3, 2)] * 1 + [(18,2,2)]",
            "layer_norm_first": True,
            "latent_groups": 2,
            "mask_prob": 0.5,
            "replace_prob": 0.4,
            "transpose": True,
        }
        outer = settings if head == "ForPreTraining" else {"arch": "wav2vec_ctc", "w2v_args": Namespace(**settings)}
        torch.save({"args": Namespace(**outer), "model": state}, tmp_path / "unispeech.pt")
        assert conversion.recognise(tmp_path / "unispeech.pt")
        assert not wav2vec2.recognise(tmp_path / "unispeech.pt")
        foreign = conversion.open_checkpoint(tmp_path / "unispeech.pt")
        assert foreign.model_class == name
        assert foreign.config.replace_prob == 0.4
        assert (foreign.config.num_ctc_classes, foreign.config.vocab_size)[head == "ForCTC"] == (7, 11)[
            head == "ForCTC"
        ]
        model = convert(foreign, getattr(unispeech, name))
        x = waves(1).astype(np.float32)
        with torch.no_grad():
            theirs = reference.unispeech(torch.tensor(x)).last_hidden_state
        harness.assert_close(jitted(model.unispeech)(input_values=x).last_hidden_state, theirs)
        table, ours = conversion.hugging_face_table(model.config, name), harness.parameters(model)
        for path, value in table.read(harness.StateDict(reference.state_dict()), table.steps_for(ours)):
            np.testing.assert_array_equal(ours[path], value, err_msg=path)


def test_dropouts():
    reference, model, _ = pair("ForCTC", **harness.rates(transformers.UniSpeechConfig()))
    harness.compare_in_training(reference, model, {"input_values": waves()})
