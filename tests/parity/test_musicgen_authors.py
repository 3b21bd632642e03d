"""MusicGen against its authors' own package, in float64: patterns, files, losses, and greedy codes of any length."""

from __future__ import annotations

import functools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
from audiozoo.models import musicgen
from audiozoo.models.musicgen import Pattern
from audiozoo.processors.musicgen import MusicgenMelodyFeatureExtractor
from tests.parity import harness
from tests.parity.audiocraft_package import audiocraft
from tests.parity.test_musicgen import AUDIO, TEXT, _everything_in_double_precision  # noqa: F401
from weights_conversion.musicgen import original_decoder_rules
from weights_conversion.rules import Ignore, Table

RATE, LONGEST, STRIDE = AUDIO["sampling_rate"], 0.5, 0.25  # seconds: 50 and 25 frames
TEXTS = ["abcde", "fg"]
CHROMA = {"sample_rate": RATE, "n_chroma": 12, "radix2_exp": 6, "argmax": True}
XP = """
sample_rate: 800
dataset: {segment_duration: 0.5}
transformer_lm: {num_heads: 2, dropout: 0.0, activation: gelu, norm_first: true, positional_embedding: sin}
codebooks_pattern: {modeling: delay, delay: {delays: DELAYS, flatten_first: 0, empty_initial: 0}}
classifier_free_guidance: {training_dropout: 0.3, inference_coef: 3.0}
interleave_stereo_codebooks: {use: STEREO, per_timestep: false}
fuser: {cross_attention_pos_emb: false, sum: [], prepend: PREPEND, cross: CROSS, input_interpolate: []}
conditioners: {self_wav: {model: chroma_stem, chroma_stem: {n_chroma: 12, radix2_exp: 6, argmax: true}}}
"""


class Letters(dict):
    """What stands for T5's tokenizer: a letter is a token, and 1 ends the text."""

    def __init__(self, entries, **_):
        rows = [[*(ord(c) - 90 for c in entry), 1] for entry in entries]
        length = max(map(len, rows))
        ids = np.array([row + [0] * (length - len(row)) for row in rows])
        mask = (np.arange(length) < np.array([[len(row)] for row in rows])).astype(np.int64)
        super().__init__(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))

    def to(self, _):
        return self


def inputs(*texts: str) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in Letters(texts).items()}


@pytest.fixture(scope="module")
def package():
    names = {"patterns": "modules.codebooks_patterns", "conditioners": "modules.conditioners"}
    found = audiocraft(**names, chroma="modules.chroma", lm="models.lm", musicgen="models.musicgen")
    wide = functools.partial(found.chroma.filters.chroma, dtype=np.float64)
    found.chroma.filters = types.SimpleNamespace(chroma=wide)
    return found


def build(package, folder, melody: bool = False, streams: int = 4):
    """Their language model with random weights, and ours of the files that they would write."""
    t5 = harness.randomise(transformers.T5EncoderModel(transformers.T5Config(**TEXT)), 1)
    conditioners = package.conditioners
    with (
        mock.patch.object(conditioners, "T5EncoderModel", mock.Mock(from_pretrained=lambda _: t5)),
        mock.patch.object(conditioners, "T5Tokenizer", mock.Mock(from_pretrained=lambda _: Letters)),
        mock.patch.dict(conditioners.T5Conditioner.MODELS_DIMS, {"t5-base": TEXT["d_model"]}),
    ):
        parts = {"description": conditioners.T5Conditioner("t5-base", 16, finetune=False, device="cpu")}
    if melody:
        sources = types.SimpleNamespace(sources=["drums", "bass", "other", "vocals"], to=lambda _: sources)
        demucs = types.ModuleType("demucs")
        demucs.pretrained = types.SimpleNamespace(get_model=lambda _: sources)
        with mock.patch.dict("sys.modules", {"demucs": demucs}):
            parts["self_wav"] = conditioners.ChromaStemConditioner(
                16, duration=LONGEST, match_len_on_eval=True, **CHROMA
            )
        parts["self_wav"]._get_stemmed_wav = lambda wav, rate: wav  # the recording is melody only
    delays = [k // (streams // 4) for k in range(streams)]
    prepend, cross = (["self_wav", "description"], []) if melody else ([], ["description"])
    theirs = package.lm.LMModel(
        package.patterns.DelayedPatternProvider(streams, delays),
        conditioners.ConditioningProvider(parts),
        conditioners.ConditionFuser({"cross": cross, "prepend": prepend, "sum": [], "input_interpolate": []}),
        n_q=streams, card=32, dim=16, num_heads=2, hidden_scale=1.5, norm_first=True, bias_proj=False, bias_ff=False,
        bias_attn=False, activation="gelu", num_layers=1, causal=True, custom=True, cross_attention=not melody,
        cfg_coef=3.0,
    )  # fmt: skip
    theirs = harness.randomise(theirs, 0)
    if melody:  # whose filters are no weights
        chroma = parts["self_wav"].chroma
        chroma.fbanks.copy_(torch.from_numpy(package.chroma.filters.chroma(sr=RATE, n_fft=64, n_chroma=12, tuning=0)))
    text = XP.replace("DELAYS", str(delays)).replace("STEREO", "true" if streams == 8 else "false")
    text = text.replace("PREPEND", str(prepend)).replace("CROSS", str(cross))
    torch.save({"best_state": theirs.state_dict(), "xp.cfg": text}, folder / "state_dict.bin")
    t5.save_pretrained(folder / "t5-base")
    codec = harness.randomise(transformers.EncodecModel(transformers.EncodecConfig(**AUDIO)), 2)
    codec.save_pretrained(folder / "codec")
    torch.save({"pretrained": str(folder / "codec")}, folder / "compression_state_dict.bin")
    return theirs, audiozoo.load(folder, param_dtype=jnp.float64)


@pytest.fixture(scope="module")
def plain(package, tmp_path_factory):
    return build(package, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def melodic(package, tmp_path_factory):
    return build(package, tmp_path_factory.mktemp("melodic"), melody=True)


def attributes(package, *texts, melody=None):
    """Their inputs; without a melody there is one of length 0."""
    wave = torch.zeros(1, 1, 1) if melody is None else torch.tensor(melody)[None, None]
    length = torch.tensor([0 if melody is None else wave.shape[2]])
    made = [package.conditioners.ConditioningAttributes(text={"description": text}) for text in texts]
    for one in made:
        one.wav["self_wav"] = package.conditioners.WavCondition(wave, length, sample_rate=[RATE], path=[None])
    return made


def test_patterns(package):
    """Sequence, mask, valid steps and the way back are theirs, of every kind and also of few frames."""
    unrolled = package.patterns.UnrolledPatternProvider
    kinds = {
        "delay": (package.patterns.DelayedPatternProvider(4), lambda n: Pattern.delay(n, range(4))),
        "stereo": (package.patterns.DelayedPatternProvider(4, [0, 0, 1, 1]), lambda n: Pattern.delay(n, (0, 0, 1, 1))),
        "parallel": (package.patterns.ParallelPatternProvider(4), lambda n: Pattern.parallel(n, 4)),
        "flatten": (unrolled(4), lambda n: Pattern.flatten(n, range(4))),
        "partial": (unrolled(4, [0, 1, 1, 1]), lambda n: Pattern.flatten(n, (0, 1, 1, 1))),
        "coarse": (package.patterns.CoarseFirstPattern(4), lambda n: Pattern.coarse_first(n, 4)),
    }  # fmt: skip
    for name, (theirs, ours) in kinds.items():
        for frames in (1, 2, 9):
            codes = np.random.default_rng(frames).integers(0, 32, (2, 4, frames))
            pattern, mine = theirs.get_pattern(frames), ours(frames)
            laid, _, mask = pattern.build_pattern_sequence(torch.tensor(codes), 32)
            np.testing.assert_array_equal(mine.interleave(codes, 32), laid, err_msg=name)
            np.testing.assert_array_equal(mine.columns >= 0, mask)
            np.testing.assert_array_equal(mine.revert(laid.numpy()), codes)
            valid = pattern.build_pattern_sequence(torch.tensor(codes), 32, keep_only_valid_steps=True)[0]
            assert valid.shape[2] == 1 + mine.steps - mine.incomplete
            logits = np.random.default_rng(0).standard_normal((1, 4, valid.shape[2], 3))
            back, _, there = pattern.revert_pattern_logits(torch.tensor(logits).permute(0, 3, 1, 2), 0.0, True)
            found, known = mine.revert_logits(jnp.asarray(logits[:, :, :-1]))
            np.testing.assert_array_equal(known, there, err_msg=name)
            np.testing.assert_array_equal(np.where(known[..., None], found, 0), back.permute(0, 2, 3, 1))


def test_training_loss_and_every_gradient(package, plain):
    """Two texts of different length: padding is seen as zeros. The loss counts what has a complete context."""
    theirs, ours = plain
    codes = np.random.default_rng(0).integers(0, 32, (2, 4, 9))

    def predicted():
        tokenized = theirs.condition_provider.tokenize(attributes(package, *TEXTS))
        return theirs.compute_predictions(torch.tensor(codes), [], theirs.condition_provider(tokenized))

    def reference_loss():
        output, each = predicted(), []
        for k in range(4):
            mask = output.mask[:, k]
            each.append(torch.nn.functional.cross_entropy(output.logits[:, k][mask], torch.tensor(codes)[:, k][mask]))
        return torch.stack(each).mean()

    def our_loss(decoder):
        whole = nnx.merge(*nnx.split(ours))
        whole.decoder = decoder
        return whole.training_loss(jnp.asarray(codes), **inputs(*TEXTS))[0]

    conditions = Ignore(r"condition_provider\..*", "what the decoder is given")
    table = Table(original_decoder_rules(ours.config, cross=True), ignored=(conditions,))
    compared = harness.compare_gradients(theirs, reference_loss, ours.decoder, jax.jit(our_loss), table)
    assert len(compared) == 4 + 16


def their_codes(package, theirs, *, duration, texts, melody=None, prompt=None, two_step=False, **options):
    """What their program would decode."""
    codec = types.SimpleNamespace(frame_rate=100, sample_rate=RATE, channels=1, eval=lambda: None)
    program = package.musicgen.MusicGen("small", codec, theirs, max_duration=30.0)
    program.max_duration = LONGEST
    program.set_generation_params(
        use_sampling=False, duration=duration, cfg_coef=3.0, extend_stride=STRIDE, two_step_cfg=two_step
    )
    known = None if prompt is None else torch.tensor(prompt)
    return program._generate_tokens(attributes(package, *texts, melody=melody), known).numpy()


def test_codes_of_two_texts(package, plain):
    """A batch that goes on from codes, with guidance, which theirs can also do in two steps."""
    theirs, ours = plain
    prompt = np.random.default_rng(3).integers(0, 32, (2, 4, 5))
    call = {"duration": 0.125, "texts": TEXTS, "prompt": prompt}
    wanted = their_codes(package, theirs, **call)
    np.testing.assert_array_equal(their_codes(package, theirs, two_step=True, **call), wanted)
    found = ours.generate_codes(**inputs(*TEXTS), decoder_input_ids=prompt.reshape(8, 5), frames=12, do_sample=False)
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(wanted)) > 8


def composed(ours, melody=None, **options):
    """The codes of `compose`, whose codec is left out."""
    found = []

    def program(model, method, values):
        if method == "audio_to_codes":
            return options["codes"]
        found.append(np.asarray(values))
        return np.zeros((1, 1, values.shape[2] * 8))

    features = MusicgenMelodyFeatureExtractor(12, RATE, hop_length=16, chunk_length=1, n_fft=64)
    processor = types.SimpleNamespace(melody=lambda wave, rate: features(wave, rate)["input_features"])
    maker = mock.Mock(side_effect=lambda text: inputs(*text), melody=processor.melody)
    prompt = None if options.get("codes") is None else np.zeros(8 * options["codes"].shape[2])
    call = {"longest": LONGEST, "extend_stride": STRIDE, "do_sample": False, "duration": options["duration"]}
    call["two_step_cfg"] = options.get("two_step_cfg", False)
    with mock.patch.object(musicgen, "_call", program):
        musicgen.compose(ours, maker, options["text"], melody=melody, prompt=prompt, **call)
    return found[0]


def test_longer_than_the_model_has_learnt(package, plain):
    """A second by windows of half a second, from a beginning on."""
    theirs, ours = plain
    prompt = np.random.default_rng(3).integers(0, 32, (1, 4, 30))
    wanted = their_codes(package, theirs, duration=1.0, texts=TEXTS[:1], prompt=prompt)
    np.testing.assert_array_equal(composed(ours, text=TEXTS[0], codes=prompt, duration=1.0), wanted)


@pytest.mark.parametrize(
    ("duration", "follows", "two_step"), [(0.25, True, False), (0.25, False, True), (1.0, True, False)]
)
def test_along_a_melody(package, melodic, duration, follows, two_step):
    """Shorter than a window, when its chroma is repeated; longer, when the melody itself is; and without one."""
    theirs, ours = melodic
    melody = np.sin(2 * np.pi * np.linspace(60, 300, 331) * np.arange(331) / RATE) if follows else None
    call = {"duration": duration, "melody": melody}
    wanted = their_codes(package, theirs, texts=TEXTS[:1], two_step=two_step, **call)
    np.testing.assert_array_equal(composed(ours, text=TEXTS[0], two_step_cfg=two_step, **call), wanted)
    if two_step:  # the null condition has fewer positions
        assert (wanted != their_codes(package, theirs, texts=TEXTS[:1], **call)).any()


def test_stereo(package, tmp_path):
    """Eight streams, left and right in turn, by their delays."""
    theirs, ours = build(package, tmp_path, streams=8)
    assert ours.config.audio_channels == 2
    assert ours.config.stream_delays == (0, 0, 1, 1, 2, 2, 3, 3)
    wanted = their_codes(package, theirs, duration=0.125, texts=TEXTS)
    np.testing.assert_array_equal(ours.generate_codes(**inputs(*TEXTS), frames=12, do_sample=False), wanted)
