"""w2v-BERT against `transformers`: every tap, head and gradient, its objective against PyTorch, its files."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
from audiozoo.layers import activations
from audiozoo.models import wav2vec2_bert
from audiozoo.models.wav2vec2 import sample_negative_indices
from tests.parity import harness, speech_family
from tests.parity.harness import blank
from tests.parity.seamless_family import exact_positions
from tests.parity.speech_family import EVERYTHING, NO_DROPOUT, jitted
from tests.seamless_names import fairseq2_names
from weights_conversion import wav2vec2_bert as conversion

TINY = {
    "vocab_size": 11,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "feature_projection_input_dim": 12,
    "conv_depthwise_kernel_size": 5,
    "left_max_position_embeddings": 4,
    "right_max_position_embeddings": 2,
    "classifier_proj_size": 7,
    "tdnn_dim": (10, 9, 8),
    "tdnn_kernel": (3, 3, 1),
    "tdnn_dilation": (1, 2, 1),
    "xvector_output_dim": 6,
    "num_labels": 5,
}
ADAPTED = {
    "add_adapter": True,
    "num_adapter_layers": 2,
    "output_hidden_size": 18,
    "use_intermediate_ffn_before_adapter": True,
    "layer_norm_eps": 1e-3,
    "adapter_act": "gelu",
}
STILL = NO_DROPOUT | {"conformer_conv_dropout": 0.0}
FAMILY = speech_family.Family("Wav2Vec2Bert", "Wav2Vec2BertConfig", wav2vec2_bert, conversion, TINY)
pair = FAMILY.pair
FRAMES = 20


def features(batch: int = 2, frames: int = FRAMES, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, frames, 12))


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Two recordings, the second shorter, with noise where nothing should look, and their mask."""
    mask = np.ones((2, FRAMES), np.int64)
    mask[1, 13:] = 0
    return features(), mask


@pytest.fixture(autouse=True)
def _exact_positions():
    with exact_positions():
        yield


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("Model", {}),
        ("Model", ADAPTED | {"position_embeddings_type": "relative"}),
        ("ForXVector", {"hidden_act": "gelu"}),
    ],
    ids=["bare", "adaptor", "x-vector"],
)
def test_every_tap_and_output(head, changes):
    reference, model, table = pair(head, **changes, mask_time_prob=0.0)
    x, mask = padded()
    extra = {"ignore_dilation": True} if head == "ForXVector" else {}
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **EVERYTHING, **extra),
        table,
        minimum=30,
        skip={r".*\.distance_embedding": "read as a table, not called"},
    )
    assert len(harness.compare_outputs(taps.ours, taps.reference)) >= 6


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("ForCTC", {}),
        ("ForCTC", {"add_adapter": True}),
        ("ForCTC", {"position_embeddings_type": "rotary"}),
        ("ForCTC", {"position_embeddings_type": None}),
        ("ForSequenceClassification", {"use_weighted_layer_sum": True}),
        ("ForSequenceClassification", {}),
        ("ForAudioFrameClassification", {"use_weighted_layer_sum": True}),
    ],
)
def test_heads(head, changes):
    reference, model, _ = pair(head, seed=1, **changes)
    if changes.get("position_embeddings_type") == "rotary":  # float32 there
        exact = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        reference.wav2vec2_bert.encoder.embed_positions.inv_freq = exact
    x, mask = padded()
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING)
    everything = jitted(model, **EVERYTHING)(input_features=x, attention_mask=mask)
    assert len(harness.compare_outputs(everything, theirs)) > 5


@pytest.mark.parametrize("changes", [{}, {"add_adapter": True, "num_adapter_layers": 2}], ids=["bare", "adaptor"])
def test_a_padded_batch_is_its_items(changes):
    _, model, _ = pair("ForCTC", **changes)
    x, mask = padded()
    alone = jitted(model)(input_features=x[1:, :13]).logits
    frames = alone.shape[1]
    together = jitted(model, masked_adapter=True)(input_features=x, attention_mask=mask).logits[1:, :frames]
    harness.assert_close(together, alone)
    assert int(model.backbone.frame_mask(jnp.asarray(mask), 20)[1].sum()) == frames
    as_there = jitted(model)(input_features=x, attention_mask=mask).logits[1:, :frames]
    assert bool(np.abs(as_there - alone).max() > 1e-3) == bool(changes)


@pytest.mark.parametrize("changes", [{}, ADAPTED], ids=["bare", "adaptor"])
def test_ctc_gradients(changes):
    reference, model, table = pair("ForCTC", **STILL, **changes)
    x, mask = padded()
    labels, spans = np.array([[3, 4, -100], [1, 2, -100]]), np.zeros((2, FRAMES), bool)
    spans[0, 3:9] = spans[1, 8:12] = True
    kwargs = {"attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    with speech_family.reference_in_double(), speech_family.masked(reference.wav2vec2_bert, spans):
        compared = harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), **kwargs).loss,
            model,
            jax.jit(lambda m: m(jnp.asarray(x), jnp.asarray(mask), jnp.asarray(labels), mask_time_indices=spans).loss),
            table,
        )
    assert len(compared) > 70


# --- pre-training ----------------------------------------------------------------------------------------------------

CODES = {"groups": 2, "entries": 5, "depth": 8, "compared": 6}


class Pretraining(torch.nn.Module):
    """w2v-BERT's objective, frame by frame, around `transformers`' network."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wav2vec2_bert = transformers.Wav2Vec2BertModel(config)
        codes = SimpleNamespace(
            num_codevector_groups=CODES["groups"],
            num_codevectors_per_group=CODES["entries"],
            codevector_dim=CODES["depth"],
            conv_dim=(config.feature_projection_input_dim,),
        )
        quantiser = transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2GumbelVectorQuantizer
        self.quantizer = quantiser(codes)
        self.project_hid = torch.nn.Linear(config.hidden_size, CODES["compared"])
        self.project_q = torch.nn.Linear(CODES["depth"], CODES["compared"])
        self.prediction = torch.nn.Linear(config.hidden_size, CODES["groups"] * CODES["entries"])

    def forward(self, x, mask, spans, negatives, noise):
        outputs = self.wav2vec2_bert(x, attention_mask=mask, mask_time_indices=spans, output_hidden_states=True)
        groups, entries = CODES["groups"], CODES["entries"]
        logits = self.quantizer.weight_proj(outputs.extract_features).view(*spans.shape, groups, entries)
        soft = ((logits + noise) / 1.3).softmax(-1)
        codes = soft.argmax(-1)
        hard = torch.nn.functional.one_hot(codes, entries) + (soft - soft.detach())
        vectors = torch.einsum("btgv,gvd->btgd", hard, self.quantizer.codevectors.view(groups, entries, -1)).flatten(2)
        truth, context = self.project_q(vectors), self.project_hid(outputs.hidden_states[1])
        said = self.prediction(outputs.last_hidden_state).view(*spans.shape, groups, entries)
        contrastive = predicted = 0.0
        flat_truth, flat_codes = truth.flatten(0, 1), codes.flatten(0, 1)
        for b, t in spans.nonzero():
            others = negatives[b, t]
            candidates = torch.cat([truth[b, t][None], flat_truth[others]])
            scores = torch.cosine_similarity(context[b, t][None], candidates, dim=-1) / 0.2
            again = (flat_codes[others] == codes[b, t]).all(-1)
            scores = torch.cat([scores[:1], scores[1:].masked_fill(again, -torch.inf)])
            contrastive = contrastive + torch.logsumexp(scores, 0) - scores[0]
            predicted = predicted + torch.nn.functional.cross_entropy(said[b, t], codes[b, t], reduction="sum")
        mean = logits[spans].softmax(-1).mean(0)
        used = torch.exp(-(mean * mean.log()).sum(-1)).sum()
        diversity = (groups * entries - used) / (groups * entries) * spans.sum()
        return 0.7 * (contrastive + 0.1 * diversity) + 1.5 * predicted


def pretraining(seed: int = 4):
    """Both sides, and a batch with its masks, distractors and noise."""
    theirs_config = FAMILY.their_config(**STILL)
    reference = harness.randomise(Pretraining(theirs_config), seed)
    config = dataclasses.replace(
        conversion.config_from_hugging_face(theirs_config.to_dict()),
        num_contrastive_layers=1,
        num_codevectors_per_group=CODES["entries"],
        num_codevector_groups=CODES["groups"],
        codevector_dim=CODES["depth"],
        proj_codevector_dim=CODES["compared"],
        contrastive_logits_temperature=0.2,
        contrastive_weight=0.7,
        prediction_weight=1.5,
    )
    name = "Wav2Vec2BertForPreTraining"
    model = blank(lambda: getattr(wav2vec2_bert, name)(config, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    table = conversion.hugging_face_table(config, name)
    harness.port(reference, model, table)
    x, mask = padded()
    spans = np.zeros((2, FRAMES), bool)
    spans[0, 3:9] = spans[0, 14:18] = spans[1, 5:12] = True
    negatives = np.asarray(sample_negative_indices(jax.random.key(1), jnp.asarray(spans), 4))
    noise = np.random.default_rng(5).gumbel(size=(2, FRAMES, CODES["groups"], CODES["entries"]))
    return reference, model, table, (x, mask, spans, negatives, noise)


def test_both_losses_and_every_gradient():
    reference, model, table, batch = pretraining()
    theirs = [torch.tensor(np.array(a)) for a in batch]
    *given, noise = map(jnp.asarray, batch)
    ours = jax.jit(lambda m: m(*given, temperature=1.3, gumbel_noise=noise).loss)
    compared = harness.compare_gradients(reference, lambda: reference(*theirs), model, ours, table)
    assert {"prediction.kernel", "project_q.kernel", "quantizer.codevectors"} <= set(compared)


def test_the_objective_notices_mutations():
    reference, model, _, batch = pretraining()
    with torch.no_grad():
        wanted = reference(*(torch.tensor(np.array(a)) for a in batch))
    *given, noise = map(jnp.asarray, batch)

    def check() -> None:
        graphdef, state = nnx.split(model)
        call = jax.jit(lambda state: nnx.merge(graphdef, state)(*given, temperature=1.3, gumbel_noise=noise).loss)
        harness.assert_close(call(state), wanted)

    mutations = [
        *harness.perturbations(model, count=2, exclude=r".*masked_spec_embed"),
        harness.dropped(model, "prediction.bias"),
        harness.Replaced(wav2vec2_bert, "diversity_loss", lambda used, config: 0.0),
    ]
    assert harness.assert_detects(check, mutations) == 4


# --- mutations, sizes ------------------------------------------------------------------------------------------------


def test_mutations_are_noticed():
    reference, model, _ = pair("ForCTC", **ADAPTED)
    x, mask = padded()
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask))
    mutations = [
        *harness.perturbations(model, count=3, exclude=r".*masked_spec_embed"),
        harness.dropped(model, "wav2vec2_bert.adapter.layers.1.ffn.fc1.bias"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
        harness.Replaced(wav2vec2_bert, "pooled_lengths", lambda lengths, config, layers: lengths),
    ]
    check = lambda: harness.compare_outputs(jitted(model)(input_features=x, attention_mask=mask), theirs)  # noqa: E731
    assert harness.assert_detects(check, mutations) == 6


def test_published_size():
    config = wav2vec2_bert.Wav2Vec2BertConfig.w2v_bert_2()
    with harness.precision("float32"):
        harness.assert_same_shapes(
            lambda: transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig()),
            lambda: wav2vec2_bert.Wav2Vec2BertModel(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, "Wav2Vec2BertModel"),
        )


def test_full_size_in_float32():
    with harness.precision("float32"):
        theirs_config = transformers.Wav2Vec2BertConfig(num_hidden_layers=2, add_adapter=True, vocab_size=32)
        reference = harness.randomise(transformers.Wav2Vec2BertForCTC(theirs_config), 0, torch.float32)
        reference, model, _ = FAMILY.ported(reference, "Wav2Vec2BertForCTC")
        x = np.random.default_rng(0).standard_normal((1, 90, 160)).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(jitted(model)(input_features=x), theirs)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("Model", {}),
        ("Model", ADAPTED),
        ("ForCTC", ADAPTED | {"position_embeddings_type": "relative"}),
        ("ForSequenceClassification", {"use_weighted_layer_sum": True, "position_embeddings_type": "rotary"}),
        ("ForAudioFrameClassification", {"position_embeddings_type": None}),
        ("ForXVector", {"mask_time_prob": 0.0}),
    ],
)
def test_hugging_face_directories(head, changes, tmp_path):
    FAMILY.round_trip(head, tmp_path, **changes)


def fairseq2_state(reference: torch.nn.Module, inside: str) -> dict[str, torch.Tensor]:
    """An original's tensors by fairseq2's names."""
    fixed = {
        "masked_spec_embed": "masker.temporal_mask_embed",
        "quantizer.codevectors": "quantizer.entries",
        "quantizer.weight_proj": "quantizer.entry_proj",
        "project_hid": "final_proj",
        "project_q": "final_target_proj",
    }
    state = {f"{inside}quantizer.num_updates": torch.zeros(())}
    for key, tensor in reference.state_dict().items():
        name = key.removeprefix("wav2vec2_bert.")
        if name.startswith("prediction"):
            state[name.replace("prediction", "final_bert_proj")] = tensor
            continue
        for theirs, original in fixed.items():
            name = re.sub(rf"^{re.escape(theirs)}", original, name)
        if name.startswith(("encoder.layers", "feature_projection")):
            name = fairseq2_names(f"speech_encoder.{name}")
            name = name.replace("speech_encoder_frontend", "encoder_frontend")
            name = name.replace("speech_encoder.inner.layers", "encoder.layers")
        state[f"{inside}{name}"] = tensor
    return state


@pytest.mark.parametrize("trained", [False, True], ids=["published", "with its objective"])
def test_fairseq2s_files(trained, tmp_path):
    from weights_conversion import seamless_m4t, seamless_m4t_v2, wav2vec2

    with harness.precision("float32"):
        reference = harness.randomise(Pretraining(FAMILY.their_config(**STILL)), 3, torch.float32)
        state = fairseq2_state(reference, "w2v2_model." if trained else "")
        if not trained:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("final_bert_proj")}
        file = tmp_path / "conformer_shaw.pt"
        torch.save({"model": state}, file)
        assert conversion.recognise(file)
        assert not any(other.recognise(file) for other in (wav2vec2, seamless_m4t, seamless_m4t_v2))
        model = audiozoo.load(file)
        assert type(model).__name__ == ("Wav2Vec2BertForPreTraining" if trained else "Wav2Vec2BertModel")
        config = model.config
        # The distances of a file say how many there are, and not how many lie ahead; 2.0's 73 are known.
        assert (config.left_max_position_embeddings, config.right_max_position_embeddings) == (3, 3)
        backbone = model.wav2vec2_bert if trained else model
        model.config = backbone.config = dataclasses.replace(
            config, left_max_position_embeddings=4, right_max_position_embeddings=2
        )
        for layer in backbone.encoder.layers:
            layer.self_attn.config = model.config.conformer
        x = features(1).astype(np.float32)
        with torch.no_grad():
            theirs = reference.wav2vec2_bert(torch.tensor(x)).last_hidden_state
        harness.assert_close(jitted(backbone)(input_features=x).last_hidden_state, theirs)
        if trained:
            assert (config.num_codevector_groups, config.num_codevectors_per_group, config.codevector_dim) == (2, 5, 8)
            np.testing.assert_array_equal(model.prediction.kernel[...].T, reference.prediction.weight.detach())
            np.testing.assert_array_equal(model.quantizer.codevectors[...], reference.quantizer.codevectors.detach())
    first = {name.replace("rel_k_embed.weight", "u_bias"): tensor for name, tensor in state.items()}
    torch.save({"model": first}, tmp_path / "first.pt")
    with pytest.raises(ValueError, match=r"only those of 2\.0 are read"):
        conversion.open_checkpoint(tmp_path / "first.pt")


def test_the_processor(tmp_path):
    """Features as `transformers` makes them, and letters, of the same files."""
    import json

    from audiozoo.processors.wav2vec2_bert import Wav2Vec2BertProcessor

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "b": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    theirs = transformers.Wav2Vec2BertProcessor(
        transformers.SeamlessM4TFeatureExtractor(), transformers.Wav2Vec2CTCTokenizer(tmp_path / "vocab.json")
    )
    theirs.save_pretrained(tmp_path)
    ours = Wav2Vec2BertProcessor.from_directory(tmp_path)
    waves = [0.1 * np.random.default_rng(i).standard_normal(n).astype(np.float32) for i, n in enumerate((9000, 6123))]
    wanted = theirs(audio=waves, sampling_rate=16_000, return_tensors="np")
    found = ours(waves, sampling_rate=16_000)
    assert set(found) == {"input_features", "attention_mask"}
    np.testing.assert_array_equal(found["attention_mask"], wanted["attention_mask"])
    with harness.precision("float32"):
        harness.assert_close(found["input_features"], wanted["input_features"], kind="features")
    tokens = np.array([[5, 5, 0, 5, 4, 6, 0]])
    assert ours.batch_decode(tokens) == theirs.batch_decode(tokens) == ["aa b"]
    ours.save(tmp_path / "ours")
    again = transformers.Wav2Vec2BertProcessor.from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(
        again(audio=waves, sampling_rate=16_000, return_tensors="np")["input_features"], wanted["input_features"]
    )


def test_dropouts():
    reference, model, _ = pair("ForCTC", **ADAPTED, **harness.rates(transformers.Wav2Vec2BertConfig()))
    harness.compare_in_training(reference, model, {"input_features": features()})
