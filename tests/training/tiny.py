"""For every recipe a model of a few thousand parameters, a processor, and what else must be small."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from audiozoo.models import (
    audio_spectrogram_transformer as ast,
)
from audiozoo.models import (
    encodec,
    hifigan,
    hubert,
    sew,
    speech_to_text,
    unispeech,
    unispeech_sat,
    vits,
    wav2vec2,
    wavlm,
    whisper,
    xls_r,
)
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.processors.encodec import EncodecFeatureExtractor
from audiozoo.processors.hifigan import HifiGanProcessor
from audiozoo.processors.speech_to_text import Speech2TextFeatureExtractor
from audiozoo.processors.vits import VitsProcessor, VitsTokenizer
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from audiozoo.recipes import Recipe
from tests.models import tiny_vits, tiny_whisper
from tests.models.random_model import random_model

LETTERS = {letter: index for index, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdehilnosuw"])}
SPEECH = {
    "vocab_size": len(LETTERS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (10, 8, 4),
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.5,
    "mask_time_length": 3,
    "layerdrop": 0.0,
    "classifier_proj_size": 5,
    "id2label": ("high", "low"),
}
CODES = {"num_codevectors_per_group": 6, "codevector_dim": 8, "proj_codevector_dim": 8, "num_negatives": 5}
UNITS = {"num_clusters": (7,), "label_rate": 50.0, "proj_codevector_dim": 8}
FAMILY: dict[str, tuple[Any, dict[str, Any]]] = {
    "wav2vec2": (wav2vec2.Wav2Vec2Config, CODES),
    "hubert": (hubert.HubertConfig, UNITS),
    "wavlm": (wavlm.WavLMConfig, UNITS | {"num_clusters": 7, "num_buckets": 16, "max_bucket_distance": 20}),
    "sew": (sew.SEWConfig, CODES | {"num_conv_pos_embeddings": 7, "mlp_hidden_size": 16}),
    "unispeech": (unispeech.UniSpeechConfig, CODES | {"num_ctc_classes": 6, "proj_codevector_dim": 16}),
    "unispeech_sat": (
        unispeech_sat.UniSpeechSatConfig,
        CODES | UNITS | {"num_clusters": 7, "utterance_contrastive_layer": 1},
    ),
}
PROCESSOR = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(LETTERS))


def family(paper: str, name: str) -> Any:
    cls, more = FAMILY[paper]
    known = {f.name for f in dataclasses.fields(cls)}
    config = cls(**{n: v for n, v in (SPEECH | more).items() if n in known})
    module = {"wav2vec2": wav2vec2, "hubert": hubert, "wavlm": wavlm, "sew": sew}.get(paper) or {
        "unispeech": unispeech,
        "unispeech_sat": unispeech_sat,
    }[paper]
    return random_model(lambda rngs: getattr(module, name)(config, rngs=rngs))


class Tokens:
    """Letters as numbers, `</s>` behind them, a start in front if asked for."""

    pad_token_id = 0

    def __init__(self, start: int | None = None):
        self.start = start

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*([] if self.start is None else [self.start]), *(4 + ord(c) % 40 for c in text), 1]}


def whisper_model() -> tuple[Any, Any]:
    config = dataclasses.replace(tiny_whisper.TINY, max_source_positions=50, dropout=0.0)
    start = config.decoder_start_token_id
    extractor = SimpleNamespace(sampling_rate=16_000)
    return (
        random_model(lambda rngs: whisper.WhisperForConditionalGeneration(config, rngs=rngs)),
        SimpleNamespace(tokenizer=Tokens(start), feature_extractor=extractor),
    )


def s2t_model() -> tuple[Any, Any]:
    config = speech_to_text.Speech2TextConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        conv_channels=16,
    )
    model = random_model(lambda rngs: speech_to_text.Speech2TextForConditionalGeneration(config, rngs=rngs))
    return model, SimpleNamespace(tokenizer=Tokens(), feature_extractor=Speech2TextFeatureExtractor())


def xls_r_model() -> tuple[Any, Any]:
    known = {f.name for f in dataclasses.fields(xls_r.XLSRConfig)}
    encoder = xls_r.XLSRConfig(**{n: v for n, v in SPEECH.items() if n in known})
    decoder = xls_r.MBartConfig(
        vocab_size=64, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16
    )
    config = xls_r.SpeechEncoderDecoderConfig(encoder=encoder, decoder=decoder)
    model = random_model(lambda rngs: xls_r.SpeechEncoderDecoderModel(config, rngs=rngs))
    return model, SimpleNamespace(tokenizer=Tokens(), feature_extractor=Wav2Vec2FeatureExtractor())


def ast_model() -> tuple[Any, Any]:
    config = ast.ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        max_length=48,
        num_mel_bins=16,
        id2label=("high", "low"),
    )
    model = random_model(lambda rngs: ast.ASTForAudioClassification(config, rngs=rngs))
    return model, ASTFeatureExtractor(num_mel_bins=16, max_length=48)


def clap_model() -> tuple[Any, Any]:
    from tests.models import test_clap

    return test_clap.tiny(depths=(1, 1)), test_clap.tiny_processor()


def vits_model() -> tuple[Any, Any]:
    config = dataclasses.replace(tiny_vits.PLAIN, num_speakers=1, vocab_size=len(LETTERS) + 1)
    tokenizer = VitsTokenizer(LETTERS | {" ": len(LETTERS)}, phonemize=False)
    return random_model(lambda rngs: vits.VitsModel(config, rngs=rngs)), VitsProcessor(tokenizer)


JUDGE = {"periods": (2,), "period_channels": (4,), "scale_layers": ((4, 15, 1, 1),)}


def hifigan_model() -> tuple[Any, Any]:
    config = hifigan.HifiGanConfig(
        model_in_dim=20,
        sampling_rate=8000,
        upsample_initial_channel=16,
        upsample_rates=(8, 4),
        upsample_kernel_sizes=(16, 8),
        resblock="2",
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 2),),
    )
    return random_model(lambda rngs: hifigan.HifiGanGenerator(config, rngs=rngs)), HifiGanProcessor(8000, 20, 128, 32)


def encodec_model() -> tuple[Any, Any]:
    config = encodec.EncodecConfig(
        target_bandwidths=(1.6, 3.2),
        sampling_rate=800,
        hidden_size=8,
        num_filters=4,
        upsampling_ratios=(2,),
        codebook_size=8,
    )
    model = random_model(lambda rngs: encodec.EncodecModel(config, rngs=rngs))
    model.quantizer.inited[...] = 0 * model.quantizer.inited[...]
    return model, EncodecFeatureExtractor(1, 800)


MAKERS = {
    "whisper": whisper_model,
    "speech_to_text": s2t_model,
    "xls_r": xls_r_model,
    "audio_spectrogram_transformer": ast_model,
    "clap": clap_model,
    "vits": vits_model,
    "hifigan": hifigan_model,
    "encodec": encodec_model,
}
SMALL: dict[str, dict[str, Any]] = {  # of the objectives
    "vits": {"segment_frames": 16, "num_mels": 10, "judge": JUDGE},
    "hifigan": {"segment": 512, "n_fft": 128, "judge": JUDGE},
    "encodec": {
        "segment": 0.2,
        "judge": {"n_ffts": (32, 16), "filters": 4},
        "options": {"frequency_options": {"exponents": (5, 6)}, "kmeans_iterations": 5},
    },
}


def small(recipe: Recipe) -> tuple[Recipe, Any, Any]:
    """The recipe with small parts, a model and a processor."""
    if recipe.name in SMALL:
        recipe = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, **SMALL[recipe.name]))
    if recipe.paper in FAMILY:
        return recipe, family(recipe.paper, recipe.model_class), PROCESSOR
    return (recipe, *MAKERS[recipe.paper]())
