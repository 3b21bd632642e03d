"""A small configuration of every paper, with two equal blocks in each stack, to be planned and to be stacked."""

from __future__ import annotations

import dataclasses
from typing import Any

from audiozoo import registry
from audiozoo.models.encodec import EncodecConfig
from audiozoo.models.mbart import MBartConfig
from audiozoo.models.mms import MMSConfig
from audiozoo.models.musicgen import MusicgenConfig
from audiozoo.models.pop2piano import Pop2PianoConfig
from audiozoo.models.seamless_m4t import SeamlessM4TConfig
from audiozoo.models.seamless_m4t_v2 import SeamlessM4Tv2Config
from audiozoo.models.speech_resynthesis import CodeHifiGanConfig
from audiozoo.models.speech_to_text import Speech2TextConfig
from audiozoo.models.speech_to_text_2 import Speech2Text2Config
from audiozoo.models.speecht5 import SpeechT5Config
from audiozoo.models.t5 import T5Config
from audiozoo.models.xls_r import SpeechEncoderDecoderConfig, XLSRConfig
from audiozoo.recipes import Recipe
from audiozoo.recipes.plan import Amount, Choice, recipe_of
from tests.models import tiny_bark, tiny_speecht5
from tests.training import tiny

_CODEC = EncodecConfig(
    target_bandwidths=(16.0,),
    sampling_rate=4000,
    hidden_size=8,
    num_filters=4,
    upsampling_ratios=(4, 2),
    codebook_size=16,
    num_lstm_layers=1,
)
_VOICE = CodeHifiGanConfig(
    unit_hifi_gan_vocab_size=26,
    unit_embed_dim=8,
    vocoder_num_langs=3,
    lang_embed_dim=4,
    vocoder_num_spkrs=5,
    spkr_embed_dim=4,
    upsample_initial_channel=8,
    upsample_rates=(5, 2),
    upsample_kernel_sizes=(11, 4),
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 3),),
)
_SEAMLESS: dict[str, Any] = {
    "vocab_size": 40,
    "t2u_vocab_size": 30,
    "hidden_size": 16,
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2,
    "feature_projection_input_dim": 16,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 2,
    "speech_encoder_intermediate_size": 16,
    "conv_depthwise_kernel_size": 5,
    "t2u_encoder_layers": 1,
    "t2u_encoder_ffn_dim": 16,
    "t2u_encoder_attention_heads": 2,
    "t2u_decoder_layers": 2,
    "t2u_decoder_ffn_dim": 16,
    "t2u_decoder_attention_heads": 2,
    "vocoder": _VOICE,
}
_SPEECH = {name: value for name, value in tiny.SPEECH.items() if name != "num_hidden_layers"} | {"num_hidden_layers": 2}


def _speech(cls: Any, **more: Any) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in (_SPEECH | more).items() if name in known})


def _configurations() -> dict[str, tuple[str, Any]]:
    """Paper: class and configuration."""
    from tests.models.test_clap import tiny as tiny_clap

    found: dict[str, tuple[str, Any]] = {
        paper: (f"{prefix}ForCTC", _speech(tiny.FAMILY[paper][0], **tiny.FAMILY[paper][1]))
        for paper, prefix in {
            "wav2vec2": "Wav2Vec2",
            "hubert": "Hubert",
            "wavlm": "WavLM",
            "sew": "SEW",
            "unispeech": "UniSpeech",
            "unispeech_sat": "UniSpeechSat",
            "wav2vec2_conformer": "Wav2Vec2Conformer",
            "wav2vec2_bert": "Wav2Vec2Bert",
        }.items()
    }
    decoder = MBartConfig(vocab_size=64, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=16)
    s2t = {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    s2t |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "conv_channels": 16}
    s2t2 = {"vocab_size": 64, "d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    adapters = {"do_stable_layer_norm": True, "adapter_attn_dim": 4}
    adapters |= {"languages": ("deu", "eng", "fra"), "vocab_sizes": (9, 8, 10)}
    small_clap = tiny_clap(depths=(1, 1)).config
    patches = {"patch_size": (16, 16), "patch_stride": (16, 16)}
    sounds = dataclasses.replace(small_clap.audio_config, num_mel_bins=64, spec_size=256, **patches)
    two = {"encoder_layers": 2, "decoder_layers": 2}
    one_step: dict[str, Any] = {"upsample_rates": (8,), "upsample_kernel_sizes": (16,), "upsample_initial_channel": 8}
    tiny_whisper = dataclasses.replace(tiny.tiny_whisper.TINY, max_source_positions=50, **two)
    ast = tiny.ast.ASTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=48,
        num_mel_bins=16,
        id2label=("high", "low"),
    )
    return found | {
        "whisper": ("WhisperForConditionalGeneration", tiny_whisper),
        "audio_spectrogram_transformer": ("ASTForAudioClassification", ast),
        "clap": ("ClapModel", dataclasses.replace(small_clap, audio_config=sounds)),
        "pop2piano": ("Pop2PianoForConditionalGeneration", Pop2PianoConfig(240, 3, 16, 8, 32, 2, 2, 2)),
        "vits": (
            "VitsModel",
            dataclasses.replace(tiny.tiny_vits.PLAIN, num_speakers=1, num_hidden_layers=2, **one_step),
        ),
        "speecht5": (
            "SpeechT5ForTextToSpeech",
            SpeechT5Config(**tiny_speecht5.SIZES | two | {"ctc_weight": 0.0}),
        ),
        "hifigan": ("HifiGanGenerator", dataclasses.replace(tiny.hifigan_model()[0].config, **one_step)),
        "xls_r": (
            "SpeechEncoderDecoderModel",
            SpeechEncoderDecoderConfig(encoder=_speech(XLSRConfig), decoder=decoder),
        ),
        "speech_to_text": ("Speech2TextForConditionalGeneration", Speech2TextConfig(**s2t)),
        "speech_to_text_2": ("Speech2Text2ForCausalLM", Speech2Text2Config(**s2t2)),
        "mms": ("MMSForCTC", _speech(MMSConfig, **adapters)),
        "encodec": ("EncodecModel", tiny.encodec_model()[0].config),
        "bark": ("BarkSemanticModel", tiny_bark_config()),
        "musicgen": (
            "MusicgenForConditionalGeneration",
            MusicgenConfig(
                text_encoder=T5Config(60, 8, 4, 8, 2, 1, 2),
                audio_encoder=_CODEC,
                vocab_size=16,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                ffn_dim=16,
            ),
        ),
        "seamless_m4t": ("SeamlessM4TForSpeechToSpeech", SeamlessM4TConfig(**_SEAMLESS)),
        "seamless_m4t_v2": (
            "SeamlessM4Tv2ForSpeechToText",
            SeamlessM4Tv2Config(
                **_SEAMLESS
                | {
                    "char_vocab_size": 20,
                    "t2u_variance_predictor_embed_dim": 16,
                    "t2u_variance_predictor_hidden_dim": 8,
                }
            ),
        ),
    }


def tiny_bark_config() -> Any:
    from audiozoo.models.bark import BarkSubModelConfig

    return BarkSubModelConfig(**tiny_bark.SEMANTIC)


CONFIGURATIONS = _configurations()
AMOUNT = Amount(batch=4, seconds=0.4, tokens=8)


def choice(paper: str) -> Choice:
    """A paper's small model."""
    name, config = CONFIGURATIONS[paper]
    return Choice(registry.paper(paper), name, config, f"{paper}:small")


# One spectrogram each for the judge and for the loss: TPU code for a convolution takes its compiler a while.
_QUICK = {"encodec": {"judge": {"n_ffts": (16,), "filters": 2}, "options": {"frequency_options": {"exponents": (5,)}}}}


def recipe(paper: str) -> Recipe:
    """How it is trained: by the paper's recipe, with small judges."""
    row = recipe_of(choice(paper))
    if row.name in tiny.SMALL:
        small = tiny.SMALL[row.name] | _QUICK.get(row.name, {})
        row = dataclasses.replace(row, objective=dataclasses.replace(row.objective, **small))
    return row
