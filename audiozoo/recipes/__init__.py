"""How each paper trains: one row a recipe, its numbers with where they are from.

    audiozoo train wav2vec2_ctc --data corpus/ --init facebook/wav2vec2-base --out run/

`RECIPES` is the table; `audiozoo.recipes.run.train` runs a row of it; `objectives` says what is learnt.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from audiozoo.errors import unknown_name
from audiozoo.models.audio_spectrogram_transformer import ASTRecipe
from audiozoo.models.musicgen import MusicgenRecipe
from audiozoo.models.speech_to_text import SpecAugmentPolicy
from audiozoo.recipes.generation import Arrangement, Languages, Music, Speaking, SpeechAndText, Stages, Translated
from audiozoo.recipes.objectives import (
    CTC,
    Codec,
    Contrastive,
    Objective,
    Pretraining,
    Seq2Seq,
    Spectrogram,
    Utterance,
    Vocoder,
    Voice,
)
from audiozoo.recipes.settings import Settings
from audiozoo.registry import PAPERS

CONVOLUTIONS = r"\.feature_extractor\."  # §3.3 of wav2vec 2.0: the feature encoder is not trained further


@dataclass(frozen=True)
class Recipe:
    """A paper's way of training.

    Attributes:
        name: on the command line.
        paper: module name in `audiozoo.models`.
        model_class: what is trained.
        objective: what is learnt.
        settings: how.
        size: the configuration to start from where there is no checkpoint.
        new: a regular expression that finds the parameters that a checkpoint of another task lacks.
        config: what the recipe changes in the model's configuration.
        adapted: a regular expression that finds the parameters among which LoRA looks for its own; all by default,
            those too that the recipe freezes.
    """

    name: str
    paper: str
    model_class: str
    objective: Objective
    settings: Settings
    size: str
    new: str | None = None
    config: dict = dataclasses.field(default_factory=dict)
    adapted: str = ""


_CTC = Settings(
    source="wav2vec 2.0, §4.3, BASE: Adam, a rate that rises for 10 %, stays for 40 % and falls, 1,600 s an update "
    "(128 recordings of LibriSpeech), the first 10,000 updates train the output layer alone; its authors' "
    "base_100h.yaml, which holds nothing back: 3e-5, 80,000 updates, betas 0.9 and 0.98, a fall to a twentieth",
    steps=80_000,
    batch_size=128,
    learning_rate=3e-5,
    schedule="tri_stage",
    warmup=0.1,
    optimizer="adam",
    beta2=0.98,
    frozen=CONVOLUTIONS,
    held=r"^(?!lm_head)",
    held_steps=0.125,
    seconds=20.0,
)
_PRETRAINING = Settings(
    source="wav2vec 2.0, §4.2, BASE, as its authors' wav2vec2_base_librispeech.yaml has it: 400,000 updates, Adam with "
    "betas 0.9 and 0.98, a peak of 5e-4 after 8 % of them, linear decay, weight decay 0.01, crops of 15.6 s, 87.5 s on "
    "each of 64 devices",
    steps=400_000,
    batch_size=360,
    learning_rate=5e-4,
    schedule="linear",
    warmup=0.08,
    beta2=0.98,
    epsilon=1e-6,
    weight_decay=0.01,
    decays="all",
    seconds=15.6,
)
_UNITS = dataclasses.replace(
    _PRETRAINING,
    source="HuBERT, BASE, as its authors' hubert_base_librispeech.yaml has it: 400,000 updates of the second iteration "
    "(250,000 of the first), Adam with betas 0.9 and 0.98, a peak of 5e-4 after 8 %, linear decay, weight decay 0.01, "
    "gradients of at most 10, 87.5 s on each of 32 devices",
    batch_size=180,
    clip=10.0,
)
_FROM_WAV2VEC2 = "the numbers of wav2vec 2.0's recipe: "


def _like(settings: Settings, source: str | None = None, **changes: object) -> Settings:
    return dataclasses.replace(settings, source=source or _FROM_WAV2VEC2 + settings.source, **changes)  # type: ignore[arg-type]


_FINETUNING = {
    "wav2vec2": _CTC,
    "sew": _like(
        _CTC, "SEW, its authors' base_100h.yaml: that of " + _CTC.source.replace("base_100h.yaml, which", "file, which")
    ),
    "unispeech": _like(
        _CTC,
        "UniSpeech, its authors' finetune.sh: Adam with betas 0.9 and 0.98, a rate that rises for 2,000 updates to "
        "2e-5, stays for 8,000 and falls to a twentieth in 10,000, the first 2,000 train the output layer alone, 250 "
        "s an update",
        steps=20_000,
        batch_size=48,
        learning_rate=2e-5,
        held_steps=0.1,
    ),
    "wav2vec2_conformer": _like(_CTC, f"our choice, {_FROM_WAV2VEC2}{_CTC.source}"),
    "wav2vec2_bert": _like(_CTC, f"our choice, {_FROM_WAV2VEC2}{_CTC.source}", frozen=None),
}
_MOVING = (
    "; of a frozen backbone the running statistics of batch normalisation move in training, as under transformers' "
    "`freeze_base_model`"
)
_HEAD = r"^lm_head\.|masked_spec_embed"
_CLASSIFIER = r"^(projector|classifier)\.|masked_spec_embed"
_AST_HEAD = r"^classifier\."
_FAMILY = {  # module: prefix of its classes, the size to start from
    "wav2vec2": ("Wav2Vec2", "base"),
    "hubert": ("Hubert", "base"),
    "wavlm": ("WavLM", "base"),
    "sew": ("SEW", "sew_tiny"),
    "unispeech": ("UniSpeech", "large"),
    "unispeech_sat": ("UniSpeechSat", "base"),
    "wav2vec2_conformer": ("Wav2Vec2Conformer", "rel_pos_large"),
    "wav2vec2_bert": ("Wav2Vec2Bert", "w2v_bert_2"),
}
_GAN = Settings(
    source="VITS, §3.3, and its authors' ljs_base.json: AdamW with betas 0.8 and 0.99 and weight decay 0.01, 2e-4 "
    "falling by 0.999^(1/8) a pass, 64 recordings an update on each of four GPUs, 800,000 updates; of 64 recordings in "
    "all, as here, a pass over LJ Speech has 194",
    steps=800_000,
    batch_size=64,
    learning_rate=2e-4,
    schedule="stairs",
    decay=0.999**0.125,
    decay_steps=194,
    beta1=0.8,
    beta2=0.99,
    epsilon=1e-9,
    weight_decay=0.01,
    decays="all",
    seconds=10.0,
)
_AST = Settings(
    source="AST, its authors' run_esc.sh, ESC-50 from AudioSet's weights (`ASTRecipe.esc50`): Adam, 1e-5, times 0.85 a "
    "pass after the fifth, 25 passes of 1,600 recordings, 48 an update; traintest.py: beta 0.95, weight decay 5e-7",
    steps=825,
    batch_size=48,
    learning_rate=1e-5,
    schedule="stairs",
    decay=0.85,
    decay_steps=33,
    decay_start=4 * 33,
    optimizer="adam",
    beta1=0.95,
    weight_decay=5e-7,
    decays="all",
    seconds=10.24,
)

_TRANSLATION = _like(
    _CTC,
    "our choice, with Adam, schedule and 1,600 s an update as " + _CTC.source,
    held=None,
    held_steps=0,
    frozen=r"^encoder\.feature_extractor\.",
)
_SPEECHT5 = Settings(
    source="SpeechT5, its authors' README, pre-training: 800,000 updates, Adam with betas 0.9 and 0.98, a peak of "
    "2e-4 after 64,000, linear decay, weight decay 0.01, gradients of at most 5, crops of 15.6 s, twice 87.5 s on "
    "each of 32 devices",
    steps=800_000,
    batch_size=360,
    learning_rate=2e-4,
    schedule="linear",
    warmup=64_000,
    beta2=0.98,
    epsilon=1e-6,
    weight_decay=0.01,
    decays="all",
    clip=5.0,
    seconds=15.6,
)
_WHISPER = Settings(
    source="Whisper, Table 17: AdamW with betas 0.9 and 0.98, epsilon 1e-6, weight decay 0.1, gradients of at most 1, "
    "a linear decay; the rate, a fraction of the one of Table 18, is for tuning a trained model and not in the paper",
    steps=5000,
    batch_size=32,
    learning_rate=1e-5,
    schedule="linear",
    warmup=0.1,
    beta2=0.98,
    epsilon=1e-6,
    weight_decay=0.1,
    clip=1.0,
    seconds=30.0,
)
_SEAMLESS = Settings(
    source="SeamlessM4T, its authors' trainer (`SeamlessM4TRecipe`): Adam with betas 0.9 and 0.98, 1e-5 after 100 "
    "updates, then with the inverse square root, 5 sentences an update, label smoothing 0.2; the number of updates is "
    "our choice, for they stop early",
    steps=10_000,
    batch_size=5,
    learning_rate=1e-5,
    schedule="inverse_sqrt",
    warmup=100,
    optimizer="adam",
    beta2=0.98,
    seconds=15.0,
)

ROWS = [
    # --- wav2vec 2.0 and what follows it: pre-training, recognition, classification ---
    *(
        Recipe(
            f"{paper}_ctc",
            paper,
            f"{prefix}ForCTC",
            CTC(),
            _FINETUNING.get(paper) or _like(_CTC),
            size,
            new=_HEAD,
        )
        for paper, (prefix, size) in _FAMILY.items()
    ),
    *(
        Recipe(
            f"{paper}_classification",
            paper,
            f"{prefix}ForSequenceClassification",
            Utterance(),
            Settings(
                source="SUPERB (arXiv 2105.01051) asks for a frozen backbone under a mean and a linear layer; its "
                "authors' configuration of speaker identification in s3prl: Adam, 1e-4, 200,000 updates of 32 "
                "recordings of at most 8 s, gradients of at most 1"
                + (_MOVING if paper == "wav2vec2_conformer" else ""),
                steps=200_000,
                batch_size=32,
                learning_rate=1e-4,
                optimizer="adam",
                clip=1.0,
                seconds=8.0,
                frozen=rf"^{paper}\.",
            ),
            size,
            new=_CLASSIFIER,
        )
        for paper, (prefix, size) in _FAMILY.items()
    ),
    Recipe(
        "wav2vec2_pretraining",
        "wav2vec2",
        "Wav2Vec2ForPreTraining",
        Pretraining(end_temperature=0.5),
        _PRETRAINING,
        "base",
    ),
    Recipe("hubert_pretraining", "hubert", "HubertForPreTraining", Pretraining(units=True), _UNITS, "base"),
    Recipe(
        "wavlm_pretraining",
        "wavlm",
        "WavLMForPreTraining",
        Pretraining(units=True, mixing=0.2),
        _like(_UNITS, "WavLM, Algorithm 1: another utterance over 20 % of them; the rest as " + _UNITS.source),
        "base",
    ),
    Recipe(
        "sew_pretraining",
        "sew",
        "SEWForPreTraining",
        Pretraining(end_temperature=0.5),
        _like(
            _PRETRAINING,
            "SEW, its authors' pt-sew.sh: wav2vec 2.0's BASE recipe; the models named `-100k` stopped after 100,000 of "
            "its 400,000 updates",
        ),
        "sew_tiny",
    ),
    Recipe(
        "unispeech_sat_pretraining",
        "unispeech_sat",
        "UniSpeechSatForPreTraining",
        Pretraining(units=True, mixing=0.2, end_temperature=0.5),
        _like(
            _UNITS,
            "UniSpeech-SAT, its authors' code: another utterance over 20 % of them, 100 instances of the batch; the "
            "rest as " + _UNITS.source,
        ),
        "base",
    ),
    Recipe(
        "unispeech_pretraining",
        "unispeech",
        "UniSpeechForPreTraining",
        Pretraining(end_temperature=0.1, phonemes=True, features_penalty=0.0, feature_gradient=1.0, whole=True),
        _like(
            _PRETRAINING,
            "UniSpeech, its authors' one2one_large_pretrain_en1350.sh: Adam with betas 0.9 and 0.98, a peak of 1e-3 "
            "after 25,000 updates, linear decay to 0 at 200,000, weight decay 0.01, recordings of at most 20 s, 75 s "
            "on each of 64 devices",
            steps=200_000,
            batch_size=240,
            learning_rate=1e-3,
            warmup=25_000,
            seconds=20.0,
        ),
        "large",
    ),
    Recipe(
        "wav2vec2_conformer_pretraining",
        "wav2vec2_conformer",
        "Wav2Vec2ConformerForPreTraining",
        Pretraining(end_temperature=0.1, features_penalty=0.0, feature_gradient=1.0),
        _like(
            _PRETRAINING,
            "fairseq's wav2vec2_conformer_large_librivox.yaml: 1,000,000 updates, Adam with betas 0.9 and 0.98, a peak "
            "of 5e-3 after 32,000, linear decay, weight decay 0.01, crops of 20 s, 75 s on each of 128 devices",
            steps=1_000_000,
            batch_size=480,
            learning_rate=5e-3,
            warmup=32_000,
            seconds=20.0,
        ),
        "rel_pos_large",
        config={
            "mask_time_prob": 0.65,
            "layerdrop": 0.0,
            "hidden_dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "conformer_conv_dropout": 0.0,
        },
    ),
    Recipe(
        "wav2vec2_bert_pretraining",
        "wav2vec2_bert",
        "Wav2Vec2BertForPreTraining",
        Pretraining(end_temperature=0.1),
        _like(_PRETRAINING, f"our choice, {_FROM_WAV2VEC2}{_PRETRAINING.source}; masks and temperature as in fairseq2"),
        "w2v_bert_2",
        new=r"^(quantizer|project_hid|project_q|prediction)\.|masked_spec_embed",
        config={"mask_time_prob": 0.65, "layerdrop": 0.0},
    ),
    # --- recognition and translation by a decoder ---
    Recipe(
        "whisper",
        "whisper",
        "WhisperForConditionalGeneration",
        Seq2Seq(features="log_mel"),
        _WHISPER,
        "tiny_en",
    ),
    Recipe(
        "whisper_short",
        "whisper",
        "WhisperForConditionalGeneration",
        Seq2Seq(features="log_mel", allow_short=True),
        dataclasses.replace(
            _WHISPER,
            source="our choice for short recordings on a small machine: windows of 5, 10 … s, not of 30 s, in use, too "
            "(allow_short); the rest as " + _WHISPER.source,
        ),
        "tiny_en",
    ),
    Recipe(
        "xls_r_translation",
        "xls_r",
        "SpeechEncoderDecoderModel",
        Seq2Seq(texts=("translation", "text")),
        _TRANSLATION,
        "xls_r_300m",
        new="enc_to_dec_proj",
    ),
    Recipe(
        "speech_to_text_2",
        "speech_to_text_2",
        "SpeechEncoderDecoderModel",
        Seq2Seq(texts=("translation", "text")),
        dataclasses.replace(
            _TRANSLATION,
            source="Speech2Text2's numbers are not published: " + _TRANSLATION.source,
        ),
        "covost_en_de",
        new="enc_to_dec_proj",
    ),
    Recipe(
        "speech_to_text",
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        Seq2Seq(
            features="filterbank",
            smoothing=0.1,
            augmentation=SpecAugmentPolicy.ld(),
            texts=("text", "translation"),
        ),
        Settings(
            source="fairseq S2T, its authors' librispeech_example.md (`Speech2TextRecipe`): Adam, 2e-3 for the small "
            "model after 10,000 updates, then with the inverse square root, gradients of at most 10, 300,000 updates "
            "of 320,000 frames (260 recordings), under SpecAugment's LD",
            steps=300_000,
            batch_size=260,
            learning_rate=2e-3,
            schedule="inverse_sqrt",
            warmup=10_000,
            optimizer="adam",
            clip=10.0,
            seconds=30.0,
        ),
        "small",
    ),
    Recipe(
        "mms",
        "mms",
        "MMSForCTC",
        Languages(),
        _like(
            _CTC,
            "MMS, §5.1, trains a language's adapters and head in a body that stays as it is; Adam and its schedule as "
            "fairseq's xlsr/config/finetune.yaml has them; 1e-3 and 4,000 updates of 32 recordings are our choice",
            steps=4_000,
            batch_size=32,
            learning_rate=1e-3,
            frozen=r"^(?!lm_head|.*\.adapter_layer\.)",
            held=None,
            held_steps=0,
        ),
        "mms_1b_all",
        new=r"^lm_head\.|\.adapter_layer\.|masked_spec_embed",
    ),
    Recipe("seamless_m4t", "seamless_m4t", "SeamlessM4TForSpeechToText", Translated(), _SEAMLESS, "medium"),
    Recipe("seamless_m4t_v2", "seamless_m4t_v2", "SeamlessM4Tv2ForSpeechToText", Translated(), _SEAMLESS, "large"),
    Recipe(
        "speecht5_recognition",
        "speecht5",
        "SpeechT5ForSpeechToText",
        Seq2Seq(),
        Settings(
            source="SpeechT5, its authors' README, ASR: 80,000 updates, Adam with betas 0.9 and 0.98, a rate that "
            "rises for 10 % to 6e-5, stays for 40 % and falls to a twentieth, weight decay 0.1, gradients of at most "
            "25, the encoder held for 13,000, half CTC, 1,600 s an update (128 recordings of LibriSpeech)",
            steps=80_000,
            batch_size=128,
            learning_rate=6e-5,
            schedule="tri_stage",
            warmup=0.1,
            beta2=0.98,
            weight_decay=0.1,
            decays="all",
            clip=25.0,
            held=r"^speecht5\.encoder\.",
            held_steps=0.1625,
            seconds=20.0,
        ),
        "asr",
        new=r"^ctc_proj\.|masked_spec_embed",
    ),
    # --- sounds ---
    Recipe(
        "ast",
        "audio_spectrogram_transformer",
        "ASTForAudioClassification",
        Spectrogram(),
        _AST,
        "esc50",
        new=_AST_HEAD,
        config={"problem_type": "single_label_classification"},
    ),
    Recipe(
        "ast_tagging",
        "audio_spectrogram_transformer",
        "ASTForAudioClassification",
        Spectrogram(ASTRecipe.audioset()),
        dataclasses.replace(
            _AST,
            source="AST, §3.1 and its authors' run.sh, full AudioSet (`ASTRecipe.audioset`): Adam, 1e-5, halved in "
            "each pass after the second, 5 passes of 2 million recordings, 12 an update; traintest.py: beta 0.95, "
            "weight decay 5e-7",
            steps=830_000,
            batch_size=12,
            warmup=1000,
            decay=0.5,
            decay_steps=166_000,
            decay_start=166_000,
        ),
        "audioset_10_10",
        new=_AST_HEAD,
        config={"problem_type": "multi_label_classification"},
    ),
    Recipe(
        "clap",
        "clap",
        "ClapModel",
        Contrastive(),
        Settings(
            source="CLAP, §4.1 (`ClapRecipe`): Adam with betas 0.99 and 0.9, 1e-4 after a warm-up, cosine decay; its "
            "authors' htsat-roberta-large-dataset-fusion.sh: 96 pairs on each of 24 devices, 3,200 updates of warm-up, "
            "45 passes",
            steps=47_000,
            batch_size=2304,
            learning_rate=1e-4,
            schedule="cosine",
            warmup=3200,
            beta1=0.99,
            beta2=0.9,
            seconds=10.0,
        ),
        "htsat_unfused",
    ),
    # --- music ---
    Recipe(
        "musicgen",
        "musicgen",
        "MusicgenForConditionalGeneration",
        Music(),
        Settings(
            source="MusicGen, §3.1, 300M (`MusicgenRecipe`): a million updates of 192 crops of 30 s, AdamW with betas "
            "0.9 and 0.95 and weight decay 0.1, its rate by D-Adaptation, a cosine after 4,000 updates of warm-up, "
            "gradients of at most 1, a moving average of 0.99, in its authors' code of every tenth update, which is "
            "0.999 of each",
            steps=1_000_000,
            batch_size=192,
            learning_rate=1.0,
            schedule="cosine",
            warmup=4_000,
            optimizer="dadapt_adamw",
            beta2=0.95,
            weight_decay=0.1,
            decays="all",
            clip=1.0,
            frozen=r"^(text_encoder|audio_encoder)\.",
            seconds=30.0,
            average=0.999,
        ),
        "small",
        adapted=r"^decoder\.",
    ),
    Recipe(
        "musicgen_melody",
        "musicgen",
        "MusicgenMelodyForConditionalGeneration",
        Music(MusicgenRecipe.melody()),
        Settings(
            source="MusicGen, §3.1, 1.5B (`MusicgenRecipe.melody`): as without a melody, but for AdamW at 1e-4",
            steps=1_000_000,
            batch_size=192,
            learning_rate=1e-4,
            schedule="cosine",
            warmup=4_000,
            beta2=0.95,
            weight_decay=0.1,
            decays="all",
            clip=1.0,
            frozen=r"^(text_encoder|audio_encoder)\.",
            seconds=30.0,
            average=0.999,
        ),
        "medium",
        adapted=r"^decoder\.",
    ),
    Recipe(
        "pop2piano",
        "pop2piano",
        "Pop2PianoForConditionalGeneration",
        Arrangement(),
        Settings(
            source="Pop2Piano, §4.2, and its authors' config.yaml (`Pop2PianoRecipe`): Adafactor at 1e-3, 32 segments "
            "of two bars an update, gradients of at most 3, 2,000 passes over 4,989 songs",
            steps=312_000,
            batch_size=32,
            learning_rate=1e-3,
            optimizer="adafactor",
            clip=3.0,
            seconds=3600.0,
        ),
        "released",
    ),
    # --- speech and codes ---
    Recipe(
        "speecht5",
        "speecht5",
        "SpeechT5ForTextToSpeech",
        Speaking(),
        Settings(
            source="SpeechT5, its authors' README, TTS: 120,000 updates, Adam with betas 0.9 and 0.98, 1e-4 after "
            "10,000, then with the inverse square root, gradients of at most 25, the encoder held for 20,000, "
            "recordings of at most 30 s, 3.2 million samples on each of 8 devices (256 recordings of LibriTTS)",
            steps=120_000,
            batch_size=256,
            learning_rate=1e-4,
            schedule="inverse_sqrt",
            warmup=10_000,
            optimizer="adam",
            beta2=0.98,
            clip=25.0,
            held=r"^speecht5\.encoder\.",
            held_steps=1 / 6,
            seconds=30.0,
        ),
        "tts",
        config={"use_guided_attention_loss": True},
    ),
    Recipe("speecht5_pretraining", "speecht5", "SpeechT5ForPreTraining", SpeechAndText(), _SPEECHT5, "base"),
    Recipe(
        "bark",
        "bark",
        "BarkModel",
        Stages(),
        Settings(
            source="Bark's training is not published: our choice, the numbers of nanoGPT, whose Transformer it has: "
            "AdamW with betas 0.9 and 0.95 and weight decay 0.1, 6e-4 after 2,000 updates, a cosine, gradients of at "
            "most 1",
            steps=600_000,
            batch_size=480,
            learning_rate=6e-4,
            schedule="cosine",
            warmup=2_000,
            beta2=0.95,
            weight_decay=0.1,
            clip=1.0,
            frozen=r"^codec_model\.",
            seconds=15.0,
        ),
        "bark_small",
    ),
    Recipe("vits", "vits", "VitsModel", Voice(), _GAN, "ljs"),
    Recipe(
        "hifigan",
        "hifigan",
        "HifiGanGenerator",
        Vocoder(),
        dataclasses.replace(
            _GAN,
            source="HiFi-GAN, §3, and its authors' config_v1.json: AdamW with betas 0.8 and 0.99 and weight decay "
            "0.01, 2e-4 falling by 0.999 a pass, 16 segments of 8,192 samples an update, 2.5 million updates",
            steps=2_500_000,
            batch_size=16,
            decay=0.999,
            decay_steps=819,
        ),
        "v1",
    ),
    Recipe(
        "encodec",
        "encodec",
        "EncodecModel",
        Codec(),
        Settings(
            source="EnCodec, §4.4: Adam with betas 0.5 and 0.9, 3e-4, 64 recordings of 1 s an update, 300 passes of "
            "2,000 updates; §3.4: the judge learns in two of three updates, in one of two at 48 kHz",
            steps=600_000,
            batch_size=64,
            learning_rate=3e-4,
            optimizer="adam",
            beta1=0.5,
            beta2=0.9,
            seconds=10.0,
        ),
        "encodec_24khz",
    ),
]

# Of the papers that `audiozoo.load` offers.
RECIPES: dict[str, Recipe] = {row.name: row for row in ROWS if row.paper in {paper.name for paper in PAPERS}}


def recipe(name: str) -> Recipe:
    """A recipe by its name.

    Raises:
        UsageError: if there is none, with the nearest name.
    """
    wanted = name.lower().replace("-", "_")
    if wanted in RECIPES:
        return RECIPES[wanted]
    raise unknown_name(f"There is no recipe {name!r}", wanted, sorted(RECIPES))
