"""For every recipe a model of a few thousand parameters, a processor, and what else must be small."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, ClassVar

from audiozoo.models import (
    audio_spectrogram_transformer as ast,
)
from audiozoo.models import (
    bark,
    encodec,
    hifigan,
    hubert,
    mms,
    pop2piano,
    seamless_m4t,
    seamless_m4t_v2,
    sew,
    speech_to_text,
    speecht5,
    unispeech,
    unispeech_sat,
    vits,
    wav2vec2,
    wav2vec2_bert,
    wav2vec2_conformer,
    wavlm,
    whisper,
    xls_r,
)
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.processors.encodec import EncodecFeatureExtractor
from audiozoo.processors.hifigan import HifiGanProcessor
from audiozoo.processors.musicgen import MusicgenMelodyFeatureExtractor, MusicgenMelodyProcessor
from audiozoo.processors.pop2piano import Pop2PianoFeatureExtractor, Pop2PianoProcessor, Pop2PianoTokenizer
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor
from audiozoo.processors.speech_to_text import Speech2TextFeatureExtractor
from audiozoo.processors.speecht5 import SpeechT5FeatureExtractor
from audiozoo.processors.vits import VitsProcessor, VitsTokenizer
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from audiozoo.processors.wav2vec2_bert import Wav2Vec2BertProcessor
from audiozoo.recipes import Recipe
from audiozoo.text.numbers import spell_numbers
from tests.models import tiny_bark, tiny_speecht5, tiny_vits, tiny_whisper
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
    "wav2vec2_conformer": (wav2vec2_conformer.Wav2Vec2ConformerConfig, CODES | {"conv_depthwise_kernel_size": 5}),
    "wav2vec2_bert": (
        wav2vec2_bert.Wav2Vec2BertConfig,
        CODES | {"num_hidden_layers": 2, "num_contrastive_layers": 1, "conv_depthwise_kernel_size": 5},
    ),
}
PROCESSOR = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(LETTERS))
PROCESSORS = {"wav2vec2_bert": Wav2Vec2BertProcessor(SeamlessM4TFeatureExtractor(), PROCESSOR.tokenizer)}


def family(paper: str, name: str, **changes: Any) -> Any:
    cls, more = FAMILY[paper]
    known = {f.name for f in dataclasses.fields(cls)}
    sizes = SPEECH | more
    if name.endswith("ForSequenceClassification"):  # a head over a frozen body learns little where half is masked
        sizes |= {"mask_time_prob": 0.0}
    config = cls(**{n: v for n, v in (sizes | changes).items() if n in known})
    module = {"wav2vec2": wav2vec2, "hubert": hubert, "wavlm": wavlm, "sew": sew}.get(paper) or {
        "unispeech": unispeech,
        "unispeech_sat": unispeech_sat,
        "wav2vec2_conformer": wav2vec2_conformer,
        "wav2vec2_bert": wav2vec2_bert,
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
    return random_model(lambda rngs: hifigan.HifiGanGenerator(config, rngs=rngs)), HifiGanProcessor(
        8000, 20, 128, 32, 80.0, 3600.0
    )


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


def mms_model() -> tuple[Any, Any]:
    known = {f.name for f in dataclasses.fields(mms.MMSConfig)}
    sizes = {n: v for n, v in SPEECH.items() if n in known and n != "vocab_size"}
    sizes |= {"languages": ("deu", "eng"), "vocab_sizes": (len(LETTERS),) * 2, "adapter_attn_dim": 4}
    config = mms.MMSConfig(**sizes, do_stable_layer_norm=True, feat_extract_norm="layer")
    tokenizer = Wav2Vec2CTCTokenizer({"deu": LETTERS, "eng": LETTERS}, target_lang="eng")
    model = random_model(lambda rngs: mms.MMSForCTC(config, rngs=rngs))
    return model, Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer)


class Characters(Tokens):
    """Characters as SpeechT5's tokenizer gives them."""

    pad_token_id = 1
    added: ClassVar = {"<mask>": 79}

    def encode(self, text: str, normalize: bool | None = None) -> list[int]:
        text = spell_numbers(text) if normalize else text
        return [*(4 + ord(c) % 40 for c in text), 2]

    def __call__(self, text: str) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text)]}


def speecht5_model(head: str) -> tuple[Any, Any]:
    sizes = tiny_speecht5.SIZES | ({} if head == "ForSpeechToText" else {"ctc_weight": 0.0})
    config = speecht5.SpeechT5Config(**sizes, use_guided_attention_loss=head == "ForTextToSpeech")
    model = random_model(lambda rngs: getattr(speecht5, f"SpeechT5{head}")(config, rngs=rngs))
    extractor = SpeechT5FeatureExtractor(num_mel_bins=config.num_mel_bins)
    return model, SimpleNamespace(tokenizer=Characters(), feature_extractor=extractor)


class Languages:
    """Letters between `</s>` and `</s>`, a language in front, as SeamlessM4T's tokenizer gives them."""

    def __call__(self, *, text_target: str, tgt_lang: str) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3, {"deu": 30, "eng": 31}[tgt_lang], *(4 + ord(c) % 20 for c in text_target), 3]]}


def seamless_model(module: Any, config: Any, name: str) -> tuple[Any, Any]:
    config = dataclasses.replace(config, feature_projection_input_dim=160)
    model = random_model(lambda rngs: getattr(module, name)(config, rngs=rngs))
    return model, SimpleNamespace(tokenizer=Languages(), feature_extractor=SeamlessM4TFeatureExtractor())


def seamless() -> tuple[Any, Any]:
    from tests.models.test_seamless_m4t import TINY

    return seamless_model(seamless_m4t, TINY, "SeamlessM4TForSpeechToText")


def seamless_v2() -> tuple[Any, Any]:
    from tests.models.test_seamless_m4t_v2 import TINY

    return seamless_model(seamless_m4t_v2, TINY, "SeamlessM4Tv2ForSpeechToText")


def s2t2_model() -> tuple[Any, Any]:
    from tests.models.test_speech_to_text_2 import DECODER

    known = {f.name for f in dataclasses.fields(hubert.HubertConfig)}
    encoder = hubert.HubertConfig(**{n: v for n, v in SPEECH.items() if n in known})
    decoder = dataclasses.replace(DECODER, vocab_size=64)
    config = xls_r.SpeechEncoderDecoderConfig(encoder, decoder, "hubert", "speech_to_text_2")
    model = random_model(lambda rngs: xls_r.SpeechEncoderDecoderModel(config, rngs=rngs))
    return model, SimpleNamespace(tokenizer=Tokens(), feature_extractor=Wav2Vec2FeatureExtractor())


def pop2piano_model() -> tuple[Any, Any]:
    config = pop2piano.Pop2PianoConfig(
        vocab_size=240,
        composer_vocab_size=3,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_decoder_layers=1,
        num_heads=2,
        dropout_rate=0.0,
    )
    model = random_model(lambda rngs: pop2piano.Pop2PianoForConditionalGeneration(config, rngs=rngs))
    extractor = Pop2PianoFeatureExtractor(8_000, 0, 512, 256, 10.0, 16)
    return model, Pop2PianoProcessor(extractor, Pop2PianoTokenizer())


class Pieces(Tokens):
    """Several texts, and which tokens are real, as T5's tokenizer gives them."""

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        rows = [super(Pieces, self).__call__(text)["input_ids"] for text in texts]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    def save(self, directory: Any) -> None:
        """It has no files."""


def musicgen_model() -> tuple[Any, Any]:
    from tests.models import test_musicgen

    model = test_musicgen.tiny(dropout=0.0)
    extractor = SimpleNamespace(sampling_rate=test_musicgen.RATE)
    return model, SimpleNamespace(tokenizer=Pieces(), feature_extractor=extractor)


def musicgen_melody_model() -> tuple[Any, Any]:
    from tests.models import test_musicgen

    model = test_musicgen.tiny("MusicgenMelodyForConditionalGeneration", dropout=0.0)
    extractor = MusicgenMelodyFeatureExtractor(sampling_rate=test_musicgen.RATE, hop_length=256, n_fft=1024)
    return model, MusicgenMelodyProcessor(extractor, Pieces())  # type: ignore[arg-type]


_TABLES = {name: dict(part) if isinstance(part, dict) else part for name, part in tiny_bark.GENERATION.items()}
_TABLES["semantic_config"].pop("max_new_tokens")
_TABLES["fine_acoustics_config"]["n_fine_codebooks"] = 3
GENERATION = bark.BarkGenerationConfig(**_TABLES)


class Words:
    """Bark's processor: words as numbers, padded to eight."""

    def __call__(self, text: str) -> dict[str, list[list[int]]]:
        ids = [sum(map(ord, word)) % 40 for word in text.split()]
        more = [0] * (8 - len(ids))
        return {"input_ids": [ids + more], "attention_mask": [[1] * len(ids) + more]}


def bark_model() -> tuple[Any, Any]:
    codec = tiny_bark.CODEC | {"target_bandwidths": [72.0], "codebook_size": 16}
    fine = tiny_bark.FINE | {"n_codes_total": 3}
    config = bark.BarkConfig(**tiny_bark.CONFIG | {"codec_config": codec, "fine_acoustics_config": fine})
    model = random_model(lambda rngs: bark.BarkModel(config, rngs=rngs))
    model.generation_config = GENERATION
    return model, Words()


MAKERS = {
    "mms": mms_model,
    "speecht5": lambda: speecht5_model("ForTextToSpeech"),
    "speecht5_recognition": lambda: speecht5_model("ForSpeechToText"),
    "speecht5_pretraining": lambda: speecht5_model("ForPreTraining"),
    "seamless_m4t": seamless,
    "seamless_m4t_v2": seamless_v2,
    "speech_to_text_2": s2t2_model,
    "pop2piano": pop2piano_model,
    "musicgen": musicgen_model,
    "musicgen_melody": musicgen_melody_model,
    "bark": bark_model,
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
    "bark": {"ids": GENERATION, "multiple": 8},
    "vits": {"segment_frames": 16, "num_mels": 10, "judge": JUDGE},
    "hifigan": {"segment": 512, "judge": JUDGE},
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
        return recipe, family(recipe.paper, recipe.model_class), PROCESSORS.get(recipe.paper, PROCESSOR)
    return (recipe, *MAKERS[recipe.name if recipe.name in MAKERS else recipe.paper]())
