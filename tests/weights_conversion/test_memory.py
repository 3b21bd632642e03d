"""What loading, converting and exporting cost in memory: at most 1.3 times the checkpoint and half a gigabyte; and
what a long recording costs: no more than a short one.

Each command runs in a process of its own, whose peak the kernel keeps. The checkpoint here has 0.6 GB; others, of a
class and a published size, are measured by hand, with their files written below DIRECTORY:

    python -m tests.weights_conversion.test_memory DIRECTORY WhisperForConditionalGeneration large_v3
    python -m tests.weights_conversion.test_memory DIRECTORY SeamlessM4Tv2Model large
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audiozoo import packaged
from audiozoo.layers.abstract import abstract
from audiozoo.loading import variables
from audiozoo.models.seamless_m4t import SeamlessM4TConfig, SeamlessM4TModel
from audiozoo.models.whisper import WhisperConfig
from audiozoo.registry import paper_of_class
from tests.seamless_names import fairseq2_names, fairseq_names
from tests.weights_conversion.test_readers import Persistent, archive, assemble, rebuilt
from weights_conversion import seamless_m4t
from weights_conversion.readers import write_safetensors
from weights_conversion.readers.tensors import c_strides

ROOT = Path(__file__).resolve().parents[2]

PEAK = """
import re
from pathlib import Path
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
LOAD = "import sys, audiozoo; audiozoo.load(sys.argv[1])"
LOAD_INTO_SHARDS = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import audiozoo
from audiozoo import loading, sharding
model = audiozoo.load(sys.argv[1], mesh=sharding.make_mesh({"fsdp": 8}))
arrays = [variable[...] for variable in loading.variables(model).values()]
first = sum(array.addressable_shards[0].data.nbytes for array in arrays)
assert first < sum(array.nbytes for array in arrays) / 7, first
"""
# The command line exits at its end; its peak is printed all the same.
COMMAND = """
import sys
from audiozoo.cli import app
app(sys.argv[1:], standalone_mode=False)
"""
LOAD_CONVERTED = "import audiozoo; audiozoo.load(sys.argv[3])"

# A Whisper of the real shape in time, but narrow, hears minutes of noise, ten seconds of it at a time.
TRANSCRIBE = """
import sys
import jax
import numpy as np
import audiozoo
from audiozoo import packaged
from audiozoo.models.whisper import WhisperConfig, transcribe
from tests.models.tiny_whisper import build
from weights_conversion.whisper import _generation_defaults
jax.config.update("jax_enable_compilation_cache", False)  # or the second process would have less to do
config = WhisperConfig(
    vocab_size=51864, d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16,
    decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
    pad_token_id=50256, bos_token_id=50256, eos_token_id=50256, decoder_start_token_id=50257,
)
model = build(config=config)
model.generation_config = _generation_defaults(config)
random = np.random.default_rng(0)
blocks = (random.normal(0, 0.1, 160_000).astype(np.float32) for _ in range(6 * int(sys.argv[1])))
result = transcribe(
    model, audiozoo.load_processor(packaged.whisper()), blocks,
    temperature=0.0, sample_len=3, without_timestamps=True, condition_on_previous_text=False,
)
assert len({segment["seek"] for segment in result["segments"]}) == 2 * int(sys.argv[1]), result
"""

# A Pop2Piano with the real features, but narrow behind them, arranges so many seconds, eight segments at a time.
ARRANGE = """
import sys
import jax
import numpy as np
from audiozoo.models import pop2piano
from audiozoo.processors.pop2piano import Pop2PianoFeatureExtractor, Pop2PianoProcessor, Pop2PianoTokenizer
from tests.models.test_pop2piano import tiny
jax.config.update("jax_enable_compilation_cache", False)  # or the second process would have less to do
model = tiny(d_model=512)
processor = Pop2PianoProcessor(Pop2PianoFeatureExtractor(), Pop2PianoTokenizer())
seconds, done = int(sys.argv[1]), []
song = np.random.default_rng(0).uniform(-0.5, 0.5, 22_050 * seconds).astype(np.float32)
pop2piano.arrange(
    model, processor, song, sampling_rate=22_050, beats=np.arange(0.25, seconds - 1, 0.5), batch_size=8,
    progress=lambda *n: done.append(n),
)
assert done[-1] == (seconds // 2, seconds // 2), done
"""

# Where two peaks are compared, what threads of the compiler free is used again: otherwise it decides, by 0.1 GB.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def write_checkpoint(directory: Path, name: str, config: Any) -> int:
    """A random float32 checkpoint of a class as `save_pretrained` writes it; returns the bytes of its tensors."""
    paper = paper_of_class(name)
    model = abstract(lambda rngs: paper.model_class(name)(config, rngs=rngs))
    expected, form = variables(model), paper.conversion.hugging_face(model)
    random = np.random.default_rng(0)
    total = 0

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal total
        for step in form.table.steps_for(expected):
            blank = tuple(np.broadcast_to(np.float32(0), tuple(expected[path].shape)) for path in step.ours)
            for tensor, array in zip(step.foreign, step.operation.inverse(blank), strict=True):
                total += 4 * math.prod(array.shape)
                yield tensor, random.random(array.shape, np.float32)

    write_safetensors(directory, tensors())
    for file, content in form.files.items():
        (directory / file).write_text(json.dumps(content))
    return total


def write_seamless(path: Path, config: SeamlessM4TConfig) -> int:
    """A random SeamlessM4T as its authors' fairseq has it, without a vocoder; returns the bytes of its storages.

    The table of the tokens is more than half of it, has one row too many, and is there under three names.
    """
    table = seamless_m4t.hugging_face_table(config, "SeamlessM4TModel")
    expected = variables(abstract(lambda rngs: SeamlessM4TModel(config, rngs=rngs)))
    random = np.random.default_rng(0)
    tensors, storages = {}, {}
    for step in table.steps_for(expected):
        blank = tuple(np.broadcast_to(np.float32(0), tuple(expected[path].shape)) for path in step.ours)
        for name, array in zip(step.foreign, step.operation.inverse(blank), strict=True):
            if (original := fairseq2_names(name)) is not None:
                shape = (seamless_m4t.NLLB_100_ROWS, array.shape[1]) if name == "shared.weight" else array.shape
                storage = Persistent(str(len(storages)), math.prod(shape))
                tensors[fairseq_names(original)] = rebuilt(storage, 0, shape, c_strides(shape))
                storages[storage.key] = random.random(shape, np.float32).data
    letters = "target_letter_decoder.output_projection.weight"
    for name in ("target_letter_decoder.embed_tokens.weight", "text_encoder.embed_tokens.weight"):
        tensors[name] = tensors[letters]
    tensors["decoder.output_projection.weight"] = tensors["decoder.embed_tokens.weight"]
    archive(path, assemble({"model": tensors}), storages)
    return sum(storage.nbytes for storage in storages.values())


def peak_of(code: str, *arguments: str | Path, **environment: str) -> int:
    """The largest resident memory of a process that runs `code`, in bytes."""
    run = subprocess.run(
        [sys.executable, "-c", code + PEAK, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return int(run.stdout.split()[-1])


def commands(source: Path, out: Path) -> dict[str, tuple]:
    return {
        "load": (LOAD, source),
        "convert": (COMMAND, "convert", source, out / "native"),
        "export": (COMMAND, "export", source, out / "hugging_face"),
        "load native": (LOAD, out / "native"),
        "load into shards": (LOAD_INTO_SHARDS, source),
        "load native into shards": (LOAD_INTO_SHARDS, out / "native"),
    }


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")


@needs_proc
@pytest.mark.slow
def test_peak_memory(tmp_path):
    config = dataclasses.replace(WhisperConfig.medium(), encoder_layers=3, decoder_layers=3)
    size = write_checkpoint(tmp_path / "source", "WhisperForConditionalGeneration", config)
    assert 4.5e8 < size < 7e8
    assert (tmp_path / "source" / "model.safetensors").stat().st_size > size
    for name, command in commands(tmp_path / "source", tmp_path).items():
        peak = peak_of(*command)
        assert size < peak <= 1.3 * size + 0.5e9, f"{name}: {peak / 1e9:.2f} GB for {size / 1e9:.2f} GB"


@needs_proc
@pytest.mark.slow
def test_peak_memory_where_one_table_is_half_of_the_checkpoint(tmp_path):
    config = SeamlessM4TConfig(
        vocab_size=seamless_m4t.NLLB_100_ROWS - 1, hidden_size=256, encoder_layers=1, encoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_layers=4, decoder_ffn_dim=16_384, decoder_attention_heads=4,
        speech_encoder_layers=1, speech_encoder_attention_heads=4, speech_encoder_intermediate_size=64,
        t2u_vocab_size=100, t2u_encoder_layers=1, t2u_encoder_ffn_dim=64, t2u_encoder_attention_heads=4,
        t2u_decoder_layers=1, t2u_decoder_ffn_dim=64, t2u_decoder_attention_heads=4,
    )  # fmt: skip
    size = write_seamless(tmp_path / "multitask_unity.pt", config)
    assert 3.5e8 < size < 5e8
    arguments = (tmp_path / "multitask_unity.pt", tmp_path / "native", "--model-class", "SeamlessM4TForSpeechToText")
    peak = peak_of(COMMAND + LOAD_CONVERTED, "convert", *arguments, **ONE_ARENA)
    assert size < peak <= 1.3 * size + 0.5e9, f"{peak / 1e9:.2f} GB for {size / 1e9:.2f} GB"


@needs_proc
@pytest.mark.slow
def test_half_an_hour_of_audio_needs_no_more_memory_than_two_minutes():
    if packaged.TINY_EN.find() is None:
        pytest.skip("the package with the real tiny.en, whose tokenizer is used here, is not installed")
    short, long = (peak_of(TRANSCRIBE, minutes, **ONE_ARENA) for minutes in ("2", "30"))
    # Bytes of the one thing that is kept for the whole recording; it is there twice while its parts are joined.
    spectrogram = 80 * 4 * 28 * 60 * 100
    assert long - short < 3 * spectrogram, f"{long / 1e6:.0f} MB for 30 minutes, {short / 1e6:.0f} MB for 2"


@needs_proc
@pytest.mark.slow
def test_a_song_of_three_minutes_needs_no_more_memory_than_one_of_half_a_minute():
    pytest.importorskip("pretty_midi", reason="MIDI needs the extra `music`")
    short, long = (peak_of(ARRANGE, seconds, **ONE_ARENA) for seconds in ("30", "180"))
    # Bytes that are kept for the whole song: its waveform, and the log-mel frames of segments that overlap nowhere.
    kept = 4 * 150 * 22_050 * (1 + 512 / 1024)
    assert long - short < 4 * kept, f"{long / 1e6:.0f} MB for 180 s, {short / 1e6:.0f} MB for 30 s"


def main() -> None:
    directory, name, published = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = getattr(paper_of_class(name).config_class, published)()
    size = write_checkpoint(directory / "source", name, config)
    for name, command in commands(directory / "source", directory).items():
        peak = peak_of(*command)
        print(
            f"{name}: {peak / 1e9:.2f} GB for {size / 1e9:.2f} GB, {(peak - 0.5e9) / size:.3f} x + 0.5 GB", flush=True
        )


if __name__ == "__main__":
    main()
