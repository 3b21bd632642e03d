"""`audiozoo speak` and `audiozoo convert-voice`: text to speech, and speech in another voice."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from audiozoo import packaged
from audiozoo.commands.terminal import (
    check_file,
    check_output,
    check_sound,
    check_text,
    keep_compiled_programs,
    progress_bar,
    say,
    seed_option,
    write_sound,
    write_whole,
)
from audiozoo.errors import SourceError, UsageError

Output = Annotated[Path, typer.Option("--output", "-o", help="sound file to write; - is standard output, as WAV")]
Model = Annotated[str | None, typer.Option(help="hub id, directory or file of a voice; by default an English one")]
Speaker = Annotated[Path | None, typer.Option(help="x-vector of the wanted voice, a .npy file; for SpeechT5")]
VOCODER = "microsoft/speecht5_hifigan"
Vocoder = Annotated[
    str | None,
    typer.Option(help=f"hub id or directory of what makes sound of spectrograms; for SpeechT5, by default {VOCODER}"),
]


def speak(
    text: Annotated[str | None, typer.Argument(help="what to say; - is standard input")] = None,
    output: Output = Path("speech.wav"),
    file: Annotated[Path | None, typer.Option("--file", "-f", help="read the text from this file")] = None,
    model: Model = None,
    speaker: Annotated[str | None, typer.Option(help="a voice of a model with several: its number or name")] = None,
    speed: Annotated[float | None, typer.Option(help="speaking rate; 2 is twice as fast")] = None,
    noise_scale: Annotated[float | None, typer.Option(help="liveliness of the sound, 0 for none")] = None,
    noise_scale_duration: Annotated[float | None, typer.Option(help="liveliness of the rhythm, 0 for none")] = None,
    seed: Annotated[int, seed_option("of the noise: the same seed, the same speech")] = 0,
    pause: Annotated[float, typer.Option(help="seconds of silence between sentences")] = 0.0,
    normalize: Annotated[bool, typer.Option("--normalize", help="bring every sentence to full scale")] = False,
    phonemes: Annotated[bool, typer.Option("--phonemes", help="the text is phonemes already")] = False,
    subtitles: Annotated[
        Path | None, typer.Option(help="also write what is said when: a file ending in txt, srt, vtt, tsv or json")
    ] = None,
    speaker_embedding: Speaker = None,
    vocoder: Vocoder = None,
    voice_preset: Annotated[str | None, typer.Option(help="Bark: a voice's name, or an .npz file")] = None,
    save_voice: Annotated[
        Path | None, typer.Option(help="Bark: write the voice as an .npz file, to go on from")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Bark: how adventurous; by default 0.7")] = None,
    min_eos_p: Annotated[
        float | None, typer.Option(help="Bark: end as soon as the end is so probable; by default 0.2")
    ] = None,
) -> None:
    """Say a text, sentence by sentence."""
    from audiozoo.text import subtitles as forms

    for name, value, least in (
        ("speed", speed, None),
        ("noise-scale", noise_scale, 0),
        ("noise-scale-duration", noise_scale_duration, 0),
        ("pause", pause, 0),
        ("temperature", temperature, None),
        ("min-eos-p", min_eos_p, None),
    ):
        if value is not None and not (math.isfinite(value) and (value > 0 if least is None else value >= least)):
            raise UsageError(f"--{name} must be {'above' if least is None else 'at least'} 0; it is {value}.")
    form = "" if subtitles is None else subtitles.suffix.removeprefix(".")
    if subtitles is not None and form not in forms.FORMATS:
        raise UsageError(f"There is no format {form!r} of subtitles; there are {', '.join(forms.FORMATS)}.")
    check_sound(output)
    if subtitles is not None:
        check_output(subtitles, file)
    if save_voice is not None and save_voice.suffix != ".npz":
        raise UsageError(f"--save-voice writes an .npz file; {save_voice.name} is not named so.")
    if save_voice is not None:
        check_output(save_voice)
    said = _text(text, file)
    keep_compiled_programs()
    import numpy as np

    import audiozoo
    from audiozoo.decoding.synthesis import Synthesizer, speak, speak_spectrograms

    source = model or packaged.voice()
    voice: Any = audiozoo.load(source)
    if (name := type(voice).__name__) not in ("VitsModel", "SpeechT5ForTextToSpeech", "BarkModel"):
        raise UsageError(f"{source} holds a {name}, which does not speak.")
    barks: dict[str, Any] = {"voice-preset": voice_preset, "save-voice": save_voice}
    barks |= {"temperature": temperature, "min-eos-p": min_eos_p}
    for option, value in barks.items():
        if value is not None and name != "BarkModel":
            raise UsageError(f"--{option} is for Bark; {source} holds a {name}.")
    if speaker_embedding is not None and name != "SpeechT5ForTextToSpeech":
        chosen = "--speaker" if name == "VitsModel" else "--voice-preset"
        raise UsageError(f"{source} holds a {name}, whose voices are chosen by {chosen}.")
    if vocoder is not None and name != "SpeechT5ForTextToSpeech":
        raise UsageError(f"--vocoder is for SpeechT5; {source} holds a {name}, which makes its sound itself.")
    processor = audiozoo.load_processor(source)
    speaking: Iterator[Any]
    if name == "VitsModel":
        if speaker is not None and voice.config.num_speakers <= 1:
            raise UsageError(f"{source} has one voice; leave --speaker out.")
        sentences = processor.sentences(said, is_phonemes=phonemes)
        speaking = speak(
            Synthesizer(voice),
            sentences,
            speaker_id=_speaker(processor, speaker),
            speaking_rate=speed,
            noise_scale=noise_scale,
            noise_scale_duration=noise_scale_duration,
            seed=seed,
        )
    else:
        vits_only: dict[str, Any] = {"speaker": speaker, "speed": speed, "noise-scale": noise_scale}
        vits_only |= {"noise-scale-duration": noise_scale_duration, "phonemes": phonemes or None}
        for option, value in vits_only.items():
            if value is not None:
                raise UsageError(f"--{option} is for VITS; {source} holds a {name}.")
        sentences = processor.sentences(said)
        if name == "BarkModel":
            speaking = _bark(voice, processor, sentences, voice_preset, temperature, min_eos_p, seed)
        else:
            speaking = speak_spectrograms(
                voice,
                load_vocoder(vocoder or VOCODER),
                sentences,
                speaker_embedding=x_vector(speaker_embedding, voice),
                seed=seed,
                alignments=subtitles is not None,
            )
    spoken: list[Any] = []
    with progress_bar("speaking", len(sentences), "sentences") as update:
        for speech in speaking:
            spoken.append(speech)
            update(len(spoken), len(sentences))
    for speech in spoken:
        if not getattr(speech, "complete", True):
            say(f"No end was found, and some of it may be missing: {speech.text}", "yellow")
    if not sum(speech.waveform.size for speech in spoken):
        raise UsageError(f"{source} said nothing; another --seed may.")
    rate = spoken[0].sampling_rate
    pieces: list[Any] = []
    silence, segments, position = np.zeros(round(pause * rate), np.float32), [], 0
    for speech in spoken:
        if pieces:
            pieces.append(silence)
            position += silence.size
        segments.append(_segment(speech, processor, position))
        waveform = speech.waveform
        pieces.append(waveform / max(float(np.abs(waveform).max()), 1e-8) if normalize else waveform)
        position += waveform.size
    write_sound(output, np.concatenate(pieces), rate)
    if save_voice is not None:
        _save_voice(save_voice, spoken, voice.generation_config)
    if subtitles is not None:
        write_whole(subtitles, forms.render({"text": said, "segments": segments}, form))
    say(f"{position / rate:.1f} s of speech in {output}")


def convert_voice(
    recording: Annotated[str, typer.Argument(help="sound file; - is standard input")],
    model: Annotated[str, typer.Option(help="hub id, directory or file of a VITS with several voices, or SpeechT5")],
    source_speaker: Annotated[
        str | None, typer.Option("--from", help="VITS: the voice it is in, number or name")
    ] = None,
    target_speaker: Annotated[str | None, typer.Option("--to", help="VITS: the wanted voice")] = None,
    output: Output = Path("speech.wav"),
    noise_scale: Annotated[
        float | None, typer.Option(help="VITS: deviation about what was heard, 0 for none; by default 1")
    ] = None,
    seed: Annotated[int, seed_option("of the noise, or of the dropout")] = 0,
    speaker_embedding: Speaker = None,
    vocoder: Vocoder = None,
) -> None:
    """Say a recording again in another voice. It is one that VITS knows, or that of an x-vector for SpeechT5."""
    if noise_scale is not None and not 0 <= noise_scale < math.inf:
        raise UsageError(f"--noise-scale must be at least 0; it is {noise_scale}.")
    check_sound(output, recording)
    check_file(recording)
    keep_compiled_programs()
    import jax
    import jax.numpy as jnp
    import numpy as np

    import audiozoo
    from audiozoo import audio
    from audiozoo.decoding.synthesis import bucket
    from audiozoo.models.vits import spectrogram_of

    voice: Any = audiozoo.load(model)
    if (name := type(voice).__name__) not in ("VitsModel", "SpeechT5ForSpeechToSpeech"):
        raise UsageError(f"{model} holds a {name}, which converts no voices.")
    processor = audiozoo.load_processor(model)
    if name == "SpeechT5ForSpeechToSpeech":
        if source_speaker is not None or target_speaker is not None:
            raise UsageError(f"--from and --to are for VITS; {model} holds a {name}: give --speaker-embedding.")
        if noise_scale is not None:
            raise UsageError(f"--noise-scale is for VITS; {model} holds a {name}.")
        rate = processor.feature_extractor.sampling_rate
        values = processor(audio.read(recording, rate), sampling_rate=rate)["input_values"]
        embedding, maker = x_vector(speaker_embedding, voice)[None], load_vocoder(vocoder or VOCODER)
        said = voice.generate_speech(values, embedding, vocoder=maker, key=jax.random.key(seed))
        write_sound(output, said, maker.config.sampling_rate)
        say(f"{said.size / maker.config.sampling_rate:.1f} s of speech in {output}")
        return
    if speaker_embedding is not None or vocoder is not None:
        raise UsageError(f"--speaker-embedding and --vocoder are for SpeechT5; {model} holds a {name}: give --to.")
    if source_speaker is None or target_speaker is None:
        raise UsageError("Give both voices: --from, the one that the recording is in, and --to, the wanted one.")
    config = voice.config
    speakers = [_speaker(processor, name) for name in (source_speaker, target_speaker)]
    for number in speakers:
        voice.speaker_embedding(number)  # says so if there is none of that number
    waveform = audio.check_waveform(
        audio.read(recording, config.sampling_rate),
        config.sampling_rate,
        config.sampling_rate,
        minimum_samples=2 * config.spectrogram_bins,
    )
    frames = waveform.size // config.hop_length
    spectrogram = np.asarray(spectrogram_of(config, jnp.asarray(waveform[None, : frames * config.hop_length])))
    # As many frames as one of a few lengths has, so that a recording of another length need not be compiled anew.
    spectrogram = np.pad(spectrogram, ((0, 0), (0, bucket(frames) - frames), (0, 0)))
    converted = audiozoo.jit(voice, "voice_conversion")(
        spectrogram,
        *(np.asarray([number]) for number in speakers),
        lengths=np.asarray([frames]),
        noise_scale=1.0 if noise_scale is None else noise_scale,
        key=jax.random.key(seed),
    )
    result = np.asarray(converted.waveform)[0, : frames * config.hop_length]
    write_sound(output, result, config.sampling_rate)
    seconds = result.size / config.sampling_rate
    say(f"{seconds:.1f} s of speech in {output}")


def _bark(
    voice: Any,
    processor: Any,
    sentences: list[str],
    preset: str | None,
    temperature: float | None,
    min_eos_p: float | None,
    seed: int,
) -> Iterator[Any]:
    """Sentences, each of which goes on from the one before, drawn as Suno's code draws them."""
    import jax

    from audiozoo.models.bark import speak

    options: dict[str, Any] = {"sampling": "original", "key": jax.random.key(seed)}
    if temperature is not None:
        options |= {"semantic_temperature": temperature, "coarse_temperature": temperature}
    if min_eos_p is not None:
        options["semantic_min_eos_p"] = min_eos_p
    return speak(voice, processor, sentences, preset, **options)


def _save_voice(path: Path, spoken: list[Any], ids: Any) -> None:
    """What was said, as a voice preset."""
    from audiozoo.models.bark import joined
    from audiozoo.processors.bark import save_voice_preset

    history: Any = None
    for speech in spoken:
        if speech.waveform.size:
            history = joined(history, speech.history, ids)
    save_voice_preset(path, history)


def _text(text: str | None, file: Path | None) -> str:
    """What to say: the argument, a file's content, or standard input."""
    if text is not None and file is not None:
        raise UsageError("Give the text or a file with it, not both.")
    if file is None and text is None:
        raise UsageError("There is nothing to say: give a text, --file FILE, or - for standard input.")
    if file is None and text != "-":
        check_text(str(text))
        return str(text)
    try:
        raw = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror}).") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError(f"{file or 'Standard input'} is no text in UTF-8.") from None


def x_vector(path: Path | None, voice: Any) -> Any:
    """A speaker's embedding out of a file.

    Raises:
        UsageError: if there is none.
        SourceError: if it holds something else.
    """
    from audiozoo.processors.speecht5 import read_x_vector

    width = voice.config.speaker_embedding_dim
    if path is None:
        raise UsageError(f"This voice needs --speaker-embedding FILE.npy, an x-vector of {width} numbers.")
    return read_x_vector(path, width)


def load_vocoder(source: str) -> Any:
    """What makes sound of spectrograms.

    Raises:
        UsageError: if it is something else.
    """
    import audiozoo

    vocoder: Any = audiozoo.load(source)
    if (name := type(vocoder).__name__) != "SpeechT5HifiGan":
        raise UsageError(f"{source} holds a {name}; a vocoder is a SpeechT5HifiGan.")
    return vocoder


def _speaker(processor: Any, name: str | None) -> int:
    """The number of a voice given by number or by name, or of the voice's default."""
    if name is None:
        return int(processor.default_speaker)
    if name in processor.speakers:
        return int(processor.speakers[name])
    if name.removeprefix("-").isdecimal():
        return int(name)
    known = f"; its voices are {', '.join(sorted(processor.speakers))}" if processor.speakers else ""
    raise UsageError(f"This model has no voice named {name!r}{known}.")


def _segment(speech: Any, processor: Any, position: int) -> dict[str, Any]:
    """A sentence for subtitles: when it is said and, if the model knows, when each of its symbols is."""
    rate, end = speech.sampling_rate, position + speech.waveform.size
    segment = {"start": position / rate, "end": end / rate, "text": speech.text}
    if not hasattr(speech, "durations"):
        return segment
    ends = position + speech.durations.cumsum()
    symbols = [
        {"symbol": processor.symbol(index), "start": int(end - duration) / rate, "end": int(end) / rate}
        for index, duration, end in zip(speech.input_ids, speech.durations, ends, strict=True)
        if duration
    ]
    return segment | {"symbols": symbols}
