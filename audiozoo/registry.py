"""The one table: which paper holds which classes, sizes, tasks and published checkpoints, under which licences.

Importing it imports no model: classes are named, and resolved when they are asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from audiozoo.errors import unknown_name


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        name: hub id, or the file name that the original project gives it.
        size: name of the configuration that it runs.
        licence: the licence its publisher states for the weights.
    """

    name: str
    size: str
    licence: str


@dataclass(frozen=True)
class Paper:
    """One paper of the zoo.

    Attributes:
        name: module name, in `audiozoo.models` and in `weights_conversion`.
        title: short name.
        paper: full title.
        year: of the first version.
        arxiv: identifier, or empty if there is no paper.
        classes: model classes, the main one first, named as in `transformers`.
        config: configuration class.
        sizes: classmethods of the configuration.
        tasks: what it does for a user.
        checkpoints: what has been published.
        processor: `module:Class` of its processor.
        shown_with: the paper whose notebook shows this one, if it has none of its own.
    """

    name: str
    title: str
    paper: str
    year: int
    arxiv: str
    classes: tuple[str, ...]
    config: str
    sizes: tuple[str, ...]
    tasks: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    processor: str
    shown_with: str = ""

    @property
    def module(self) -> Any:
        """The paper's model file."""
        return importlib.import_module(f"audiozoo.models.{self.name}")

    @property
    def notebook(self) -> str:
        """The notebook that shows it."""
        return self.shown_with or self.name

    @property
    def conversion(self) -> Any:
        """The paper's conversion module."""
        return importlib.import_module(f"weights_conversion.{self.name}")

    def model_class(self, name: str) -> Any:
        """One of the paper's classes."""
        return getattr(self.module, name)

    @property
    def config_class(self) -> Any:
        """The paper's configuration class."""
        return getattr(self.module, self.config)

    @property
    def processor_class(self) -> Any:
        """The paper's processor class."""
        module, name = self.processor.split(":")
        return getattr(importlib.import_module(module), name)


def _whisper_checkpoints() -> tuple[Checkpoint, ...]:
    sizes = {
        "tiny": "tiny",
        "tiny.en": "tiny_en",
        "base": "base",
        "base.en": "base_en",
        "small": "small",
        "small.en": "small_en",
        "medium": "medium",
        "medium.en": "medium_en",
        "large": "large",
        "large-v2": "large_v2",
        "large-v3": "large_v3",
        "large-v3-turbo": "large_v3_turbo",
    }
    openai = [
        Checkpoint(f"openai/whisper-{name}", size, "MIT" if name == "large-v3-turbo" else "Apache-2.0")
        for name, size in sizes.items()
    ]
    first = {"large": "large-v1"}
    files = [Checkpoint(f"{first.get(name, name)}.pt", size, "MIT") for name, size in sizes.items()]
    distil = [
        Checkpoint(f"distil-whisper/distil-{name}", f"distil_{size}", "MIT")
        for name, size in (
            ("small.en", "small_en"),
            ("medium.en", "medium_en"),
            ("large-v2", "large_v2"),
            ("large-v3", "large_v3"),
        )
    ]
    faster = [
        Checkpoint(f"Systran/faster-whisper-{first.get(name, name)}", size, "MIT")
        for name, size in sizes.items()
        if "turbo" not in name
    ]
    return (*openai, *files, *distil, *faster)


def _ast_checkpoints() -> tuple[Checkpoint, ...]:
    hub = {
        "audioset-10-10-0.4593": "audioset_10_10",
        "audioset-10-10-0.450": "audioset_10_10",
        "audioset-10-10-0.448": "audioset_10_10",
        "audioset-10-10-0.448-v2": "audioset_10_10",
        "audioset-12-12-0.447": "audioset_12_12",
        "audioset-14-14-0.443": "audioset_14_14",
        "audioset-16-16-0.442": "audioset_16_16",
        "speech-commands-v2": "speech_commands_v2",
    }
    files = {
        "audioset_10_10_0.4593": "audioset_10_10",
        "audioset_10_10_0.4495": "audioset_10_10",
        "audioset_10_10_0.4483": "audioset_10_10",
        "audioset_10_10_0.4475": "audioset_10_10",
        "audioset_12_12_0.4467": "audioset_12_12",
        "audioset_14_14_0.4431": "audioset_14_14",
        "audioset_16_16_0.4422": "audioset_16_16",
        "speechcommands_10_10_0.9812": "speech_commands_v2",
    }
    return (
        *(Checkpoint(f"MIT/ast-finetuned-{name}", size, "BSD-3-Clause") for name, size in hub.items()),
        *(Checkpoint(f"{name}.pth", size, "BSD-3-Clause") for name, size in files.items()),
    )


def _wav2vec2_checkpoints() -> tuple[Checkpoint, ...]:
    hub = {
        "base": "base",
        "base-960h": "base",
        "base-100h": "base",
        "base-10k-voxpopuli": "base",
        "large": "large",
        "large-960h": "large",
        "large-lv60": "large_lv60",
        "large-960h-lv60": "large_lv60",
        "large-960h-lv60-self": "large_lv60",
        "large-robust": "large_lv60",
        "large-xlsr-53": "large_xlsr_53",
        "lv-60-espeak-cv-ft": "large_espeak",
        "xlsr-53-espeak-cv-ft": "large_espeak",
    }
    files = {
        "wav2vec_small.pt": "base",
        "wav2vec_small_10m.pt": "base",
        "wav2vec_small_100h.pt": "base",
        "wav2vec_small_960h.pt": "base",
        "libri960_big.pt": "large",
        "wav2vec_big_10m.pt": "large",
        "wav2vec_big_100h.pt": "large",
        "wav2vec_big_960h.pt": "large",
        "wav2vec_vox_new.pt": "large_lv60",
        "wav2vec_vox_10m_new.pt": "large_lv60",
        "wav2vec_vox_100h_new.pt": "large_lv60",
        "wav2vec2_vox_960h_new.pt": "large_lv60",
        "wav2vec_vox_10m_pl.pt": "large_lv60",
        "wav2vec_vox_100h_pl.pt": "large_lv60",
        "wav2vec_vox_960h_pl.pt": "large_lv60",
        "w2v_large_lv_fsh_swbd_cv.pt": "large_lv60",
        "xlsr_53_56k.pt": "large_xlsr_53",
    }
    other = {"base-10k-voxpopuli": "CC-BY-NC-4.0"}
    return (
        *(Checkpoint(f"facebook/wav2vec2-{n}", size, other.get(n, "Apache-2.0")) for n, size in hub.items()),
        *(Checkpoint(name, size, "MIT") for name, size in files.items()),
    )


def _wav2vec2_conformer_checkpoints() -> tuple[Checkpoint, ...]:
    sizes = {"rel-pos": "rel_pos_large", "rope": "rope_large"}
    return (
        *(
            Checkpoint(f"facebook/wav2vec2-conformer-{positions}-large{tuned}", size, "Apache-2.0")
            for positions, size in sizes.items()
            for tuned in ("", "-100h-ft", "-960h-ft")
        ),
        *(Checkpoint(f"LL_{p.replace('-', '')}_PT_no_FT", size, "MIT") for p, size in sizes.items()),
    )


def _xls_r_checkpoints() -> tuple[Checkpoint, ...]:
    sizes = ("300m", "1b", "2b")
    return (
        *(
            Checkpoint(f"facebook/wav2vec2-xls-r-{s}{t}", f"xls_r_{s}", "Apache-2.0")
            for s in sizes
            for t in _DIRECTIONS
        ),
        Checkpoint("facebook/wav2vec2-xls-r-2b-22-to-16", "xls_r_2b", "Apache-2.0"),
        Checkpoint("xlsr2_300m.pt", "xls_r_300m", "MIT"),
        Checkpoint("xlsr2_960m_1000k.pt", "xls_r_1b", "MIT"),
        Checkpoint("xlsr2_2B_1000k.pt", "xls_r_2b", "MIT"),
        *(Checkpoint(f"xls_r_{s}_{pair}.pt", f"xls_r_{s}", "MIT") for s in sizes for pair in ("21_en", "en_15")),
        Checkpoint("xls_r_2b_22_16.pt", "xls_r_2b", "MIT"),
        Checkpoint("xlsr_300m_voxlingua107_ft.pt", "xls_r_300m", "MIT"),
    )


_DIRECTIONS = ("", "-21-to-en", "-en-to-15")  # pre-trained; translating


def _speech_to_text_checkpoints() -> tuple[Checkpoint, ...]:
    mustc = ("de", "es", "fr", "it", "nl", "pt", "ro", "ru")
    covost = ("ca-en", "de-en", "es-en", "fr-en", "en-ca", "en-de", "en-et", "en-fa")
    hub = {f"s2t-{size}-librispeech-asr": size for size in ("small", "medium", "large")}
    hub |= {f"s2t-small-mustc-en-{language}-st": "small" for language in mustc}
    hub |= {"s2t-medium-mustc-multilingual-st": "medium"}
    hub |= {f"s2t-small-covost2-{pair}-st": "small" for pair in covost}
    files = {f"librispeech_transformer_{size[0]}.pt": size for size in ("small", "medium", "large")}
    files |= {f"mustc_{language}_{task}_transformer_s.pt": "small" for language in mustc for task in ("asr", "st")}
    files |= {"mustc_multilingual_st_transformer_m.pt": "medium"}
    files |= {f"covost2_{pair.replace('-', '_')}_st_transformer_s.pt": "small" for pair in covost}
    return (
        *(Checkpoint(f"facebook/{name}", size, "MIT") for name, size in hub.items()),
        *(Checkpoint(name, size, "MIT") for name, size in files.items()),
    )


def _wavlm_checkpoints() -> tuple[Checkpoint, ...]:
    sizes = {"base": "base", "base-plus": "base_plus"}
    heads = [(f"{name}{head}", size) for name, size in sizes.items() for head in ("", "-sd", "-sv")]
    files = {"WavLM-Base.pt": "base", "WavLM-Base+.pt": "base_plus", "WavLM-Large.pt": "large"}
    files |= {"wavlm_large_finetune.pth": "large"}
    return (
        *(Checkpoint(f"microsoft/wavlm-{name}", size, _UNISPEECHS) for name, size in (*heads, ("large", "large"))),
        *(Checkpoint(name, size, _UNISPEECHS) for name, size in files.items()),
    )


def _unispeech_sat_checkpoints() -> tuple[Checkpoint, ...]:
    sizes = {"base": "base", "base-plus": "base_plus", "large": "large"}
    heads = [(f"{name}{head}", size) for name, size in sizes.items() for head in ("", "-sd", "-sv")]
    files = {"Base": "base", "Base+": "base_plus", "Large": "large"}
    return (
        *(Checkpoint(f"microsoft/unispeech-sat-{name}", size, _UNISPEECHS) for name, size in heads),
        Checkpoint("microsoft/unispeech-sat-base-100h-libri-ft", "base", _UNISPEECHS),
        *(Checkpoint(f"UniSpeech-SAT-{name}.pt", size, _UNISPEECHS) for name, size in files.items()),
    )


# The model cards of WavLM, UniSpeech and UniSpeech-SAT point to the licence of the repository microsoft/UniSpeech.
_UNISPEECHS = "CC-BY-SA-3.0"


def _sew_checkpoints() -> tuple[Checkpoint, ...]:
    updates = {
        "sew-tiny": ("100k",),
        "sew-small": ("100k",),
        "sew-mid": ("100k",),
        "sew-d-tiny": ("100k",),
        "sew-d-small": ("100k",),
        "sew-d-mid": ("100k", "400k"),
        "sew-d-mid-k127": ("100k", "400k"),
        "sew-d-base": ("100k",),
        "sew-d-base-plus": ("100k", "400k"),
    }
    trained = [(f"{name}-{n}", name.replace("-", "_")) for name, some in updates.items() for n in some]
    tuned = [t for t in trained if t[0] in ("sew-tiny-100k", "sew-d-tiny-100k", "sew-d-mid-400k")]
    return (
        *(Checkpoint(f"asapp/{name}", size, "Apache-2.0") for name, size in trained),
        *(Checkpoint(f"asapp/{name}-ft-ls100h", size, "Apache-2.0") for name, size in tuned),
        *(Checkpoint(f"{name.replace('-plus', '+')}.pt", size, "MIT") for name, size in trained),
    )


def _encodec_checkpoints() -> tuple[Checkpoint, ...]:
    unstated = "not stated for the weights; the project is MIT, CC-BY-NC-4.0 at first"
    return (
        Checkpoint("facebook/encodec_24khz", "encodec_24khz", unstated),
        Checkpoint("facebook/encodec_48khz", "encodec_48khz", unstated),
        Checkpoint("facebook/encodec_32khz", "encodec_32khz", "CC-BY-NC-4.0"),
        Checkpoint("encodec_24khz-d7cc33bc.th", "encodec_24khz", unstated),
        Checkpoint("encodec_48khz-7e698e3e.th", "encodec_48khz", unstated),
        Checkpoint("encodec_lm_24khz-1608e3c0.th", "encodec_24khz", unstated),
        Checkpoint("encodec_lm_48khz-7add9fc3.th", "encodec_48khz", unstated),
        Checkpoint("compression_state_dict.bin", "encodec_32khz", "CC-BY-NC-4.0"),
    )


def _musicgen_checkpoints() -> tuple[Checkpoint, ...]:
    licence = "CC-BY-NC-4.0"
    sizes = {name: name.replace("-", "_") for name in ("small", "medium", "large")}
    sizes |= {f"stereo-{name}": f"stereo_{size}" for name, size in sizes.items()}
    sizes |= {"melody": "medium", "melody-large": "large"}
    sizes |= {"stereo-melody": "stereo_medium", "stereo-melody-large": "stereo_large"}
    return (
        *(Checkpoint(f"facebook/musicgen-{name}", size, licence) for name, size in sizes.items()),
        Checkpoint("facebook/audiogen-medium", "audiogen_medium", licence),
    )


PAPERS: tuple[Paper, ...] = (
    Paper(
        name="whisper",
        title="Whisper",
        paper="Robust Speech Recognition via Large-Scale Weak Supervision",
        year=2022,
        arxiv="2212.04356",
        classes=(
            "WhisperForConditionalGeneration",
            "WhisperForAudioClassification",
            "WhisperForCausalLM",
            "WhisperModel",
        ),
        config="WhisperConfig",
        sizes=(
            "tiny",
            "tiny_en",
            "base",
            "base_en",
            "small",
            "small_en",
            "medium",
            "medium_en",
            "large",
            "large_v2",
            "large_v3",
            "large_v3_turbo",
            "distil_small_en",
            "distil_medium_en",
            "distil_large_v2",
            "distil_large_v3",
        ),
        tasks=("transcription", "translation into English", "language identification", "alignment", "classification"),
        checkpoints=_whisper_checkpoints(),
        processor="audiozoo.processors.whisper:WhisperProcessor",
    ),
    Paper(
        name="audio_spectrogram_transformer",
        title="Audio Spectrogram Transformer",
        paper="AST: Audio Spectrogram Transformer",
        year=2021,
        arxiv="2104.01778",
        classes=("ASTForAudioClassification", "ASTModel"),
        config="ASTConfig",
        sizes=(
            "audioset_10_10",
            "audioset_12_12",
            "audioset_14_14",
            "audioset_16_16",
            "esc50",
            "speech_commands_v2",
            "tiny",
            "small",
        ),
        tasks=("tagging", "classification", "embedding"),
        checkpoints=_ast_checkpoints(),
        processor="audiozoo.processors.audio_spectrogram_transformer:ASTFeatureExtractor",
    ),
    Paper(
        name="clap",
        title="CLAP",
        paper=(
            "Large-Scale Contrastive Language-Audio Pretraining with Feature Fusion and Keyword-to-Caption Augmentation"
        ),
        year=2022,
        arxiv="2211.06687",
        classes=("ClapModel", "ClapAudioModelWithProjection", "ClapTextModelWithProjection"),
        config="ClapConfig",
        sizes=("htsat_unfused", "htsat_fused", "larger", "largest"),
        tasks=("zero-shot classification", "retrieval", "embedding of sounds and texts", "tagging over time"),
        checkpoints=(
            Checkpoint("laion/clap-htsat-unfused", "htsat_unfused", "Apache-2.0"),
            Checkpoint("laion/clap-htsat-fused", "htsat_fused", "Apache-2.0"),
            Checkpoint("laion/larger_clap_general", "larger", "Apache-2.0"),
            Checkpoint("laion/larger_clap_music", "larger", "Apache-2.0"),
            Checkpoint("laion/larger_clap_music_and_speech", "larger", "Apache-2.0"),
            Checkpoint("630k-best.pt", "htsat_unfused", "CC0-1.0"),
            Checkpoint("630k-audioset-best.pt", "htsat_unfused", "CC0-1.0"),
            Checkpoint("630k-fusion-best.pt", "htsat_fused", "CC0-1.0"),
            Checkpoint("630k-audioset-fusion-best.pt", "htsat_fused", "CC0-1.0"),
            Checkpoint("music_audioset_epoch_15_esc_90.14.pt", "larger", "CC0-1.0"),
            Checkpoint("music_speech_epoch_15_esc_89.25.pt", "larger", "CC0-1.0"),
            Checkpoint("music_speech_audioset_epoch_15_esc_89.98.pt", "larger", "CC0-1.0"),
        ),
        processor="audiozoo.processors.clap:ClapProcessor",
    ),
    Paper(
        name="pop2piano",
        title="Pop2Piano",
        paper="Pop2Piano: Pop Audio-based Piano Cover Generation",
        year=2022,
        arxiv="2211.00895",
        classes=("Pop2PianoForConditionalGeneration",),
        config="Pop2PianoConfig",
        sizes=("released",),
        tasks=("piano arrangement", "beat tracking", "notes to tokens and back"),
        checkpoints=(
            Checkpoint("sweetcocoa/pop2piano", "released", "MIT"),
            Checkpoint("model-1999-val_0.67311615.ckpt", "released", "MIT"),
        ),
        processor="audiozoo.processors.pop2piano:Pop2PianoProcessor",
    ),
    Paper(
        name="vits",
        title="VITS",
        paper="Conditional Variational Autoencoder with Adversarial Learning for End-to-End Text-to-Speech",
        year=2021,
        arxiv="2106.06103",
        classes=("VitsModel",),
        config="VitsConfig",
        sizes=("mms", "ljs", "vctk", "piper_x_low", "piper_low", "piper_medium", "piper_high"),
        tasks=("speech synthesis", "voice conversion", "training"),
        checkpoints=(
            Checkpoint("facebook/mms-tts-eng", "mms", "CC-BY-NC-4.0"),
            Checkpoint("kakao-enterprise/vits-ljs", "ljs", "MIT"),
            Checkpoint("kakao-enterprise/vits-vctk", "vctk", "MIT"),
            Checkpoint("pretrained_ljs.pth", "ljs", "MIT"),
            Checkpoint("pretrained_vctk.pth", "vctk", "MIT"),
            Checkpoint("en_US-joe-medium.onnx", "piper_medium", "CC0 (its card says; fine-tuned from lessac)"),
        ),
        processor="audiozoo.processors.vits:VitsProcessor",
    ),
    Paper(
        name="speecht5",
        title="SpeechT5",
        paper="SpeechT5: Unified-Modal Encoder-Decoder Pre-Training for Spoken Language Processing",
        year=2021,
        arxiv="2110.07205",
        classes=(
            "SpeechT5ForTextToSpeech",
            "SpeechT5ForSpeechToText",
            "SpeechT5ForSpeechToSpeech",
            "SpeechT5ForSpeechEnhancement",
            "SpeechT5ForSequenceClassification",
            "SpeechT5ForPreTraining",
            "SpeechT5LanguageModel",
            "SpeechT5Model",
        ),
        config="SpeechT5Config",
        sizes=("base", "large", "asr", "tts", "vc"),
        tasks=(
            "speech synthesis",
            "voice conversion",
            "transcription",
            "enhancement",
            "identification",
            "pre-training",
        ),
        checkpoints=(
            Checkpoint("microsoft/speecht5_asr", "asr", "MIT"),
            Checkpoint("microsoft/speecht5_tts", "tts", "MIT"),
            Checkpoint("microsoft/speecht5_vc", "vc", "MIT"),
            Checkpoint("speecht5_base.pt", "base", "MIT"),
            Checkpoint("speecht5_large.pt", "large", "MIT"),
            Checkpoint("speecht5_base_asr.pt", "asr", "MIT"),
            Checkpoint("speecht5_tts.pt", "tts", "MIT"),
            Checkpoint("speecht5_vc.pt", "vc", "MIT"),
            Checkpoint("speecht5_sid.pt", "base", "MIT"),
        ),
        processor="audiozoo.processors.speecht5:SpeechT5Processor",
    ),
    Paper(
        name="hifigan",
        title="HiFi-GAN",
        paper="HiFi-GAN: Generative Adversarial Networks for Efficient and High Fidelity Speech Synthesis",
        year=2020,
        arxiv="2010.05646",
        classes=("HifiGanGenerator", "SpeechT5HifiGan"),
        config="HifiGanConfig",
        sizes=("v1", "v2", "v3", "speecht5"),
        tasks=("vocoding", "training"),
        checkpoints=(
            Checkpoint("microsoft/speecht5_hifigan", "speecht5", "MIT"),
            Checkpoint("generator_v1", "v1", "MIT"),
            Checkpoint("generator_v2", "v2", "MIT"),
            Checkpoint("generator_v3", "v3", "MIT"),
        ),
        processor="audiozoo.processors.hifigan:HifiGanProcessor",
    ),
    Paper(
        name="wav2vec2",
        title="wav2vec 2.0",
        paper="wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations",
        year=2020,
        arxiv="2006.11477",
        classes=(
            "Wav2Vec2ForCTC",
            "Wav2Vec2ForPreTraining",
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2ForAudioFrameClassification",
            "Wav2Vec2ForXVector",
            "Wav2Vec2ForSpeakerVerification",
            "Wav2Vec2Model",
        ),
        config="Wav2Vec2Config",
        sizes=("base", "large", "large_lv60", "large_xlsr_53", "large_espeak"),
        tasks=("transcription", "alignment", "identification", "embedding", "pre-training"),
        checkpoints=_wav2vec2_checkpoints(),
        processor="audiozoo.processors.wav2vec2:Wav2Vec2Processor",
    ),
    Paper(
        name="hubert",
        title="HuBERT",
        paper="HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden Units",
        year=2021,
        arxiv="2106.07447",
        classes=(
            "HubertForCTC",
            "HubertForPreTraining",
            "HubertForSequenceClassification",
            "HubertForAudioFrameClassification",
            "HubertForXVector",
            "HubertForSpeakerVerification",
            "HubertModel",
        ),
        config="HubertConfig",
        sizes=("base", "large", "xlarge"),
        tasks=("units", "transcription", "embedding", "classification", "pre-training"),
        checkpoints=(
            Checkpoint("facebook/hubert-base-ls960", "base", "Apache-2.0"),
            Checkpoint("facebook/hubert-large-ll60k", "large", "Apache-2.0"),
            Checkpoint("facebook/hubert-large-ls960-ft", "large", "Apache-2.0"),
            Checkpoint("facebook/hubert-xlarge-ll60k", "xlarge", "Apache-2.0"),
            Checkpoint("facebook/hubert-xlarge-ls960-ft", "xlarge", "Apache-2.0"),
            Checkpoint("hubert_base_ls960.pt", "base", "MIT"),
            Checkpoint("hubert_large_ll60k.pt", "large", "MIT"),
            Checkpoint("hubert_large_ll60k_finetune_ls960.pt", "large", "MIT"),
            Checkpoint("hubert_xtralarge_ll60k.pt", "xlarge", "MIT"),
            Checkpoint("hubert_xtralarge_ll60k_finetune_ls960.pt", "xlarge", "MIT"),
        ),
        processor="audiozoo.processors.wav2vec2:Wav2Vec2Processor",
    ),
    Paper(
        name="wavlm",
        title="WavLM",
        paper="WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing",
        year=2021,
        arxiv="2110.13900",
        classes=(
            "WavLMForXVector",
            "WavLMForSpeakerVerification",
            "WavLMForPreTraining",
            "WavLMForCTC",
            "WavLMForSequenceClassification",
            "WavLMForAudioFrameClassification",
            "WavLMModel",
        ),
        config="WavLMConfig",
        sizes=("base", "base_plus", "large"),
        tasks=("speaker embedding", "embedding", "transcription", "classification", "units", "pre-training"),
        checkpoints=_wavlm_checkpoints(),
        processor="audiozoo.processors.wav2vec2:Wav2Vec2Processor",
    ),
    Paper(
        name="sew",
        title="SEW",
        paper="Performance-Efficiency Trade-offs in Unsupervised Pre-training for Speech Recognition",
        year=2021,
        arxiv="2109.06870",
        classes=(
            "SEWForCTC",
            "SEWForPreTraining",
            "SEWForSequenceClassification",
            "SEWModel",
            "SEWDForCTC",
            "SEWDForPreTraining",
            "SEWDForSequenceClassification",
            "SEWDModel",
        ),
        config="SEWConfig",
        sizes=(
            "sew_tiny",
            "sew_small",
            "sew_mid",
            "sew_d_tiny",
            "sew_d_small",
            "sew_d_mid",
            "sew_d_mid_k127",
            "sew_d_base",
            "sew_d_base_plus",
        ),
        tasks=("transcription", "alignment", "classification", "embedding", "pre-training"),
        checkpoints=_sew_checkpoints(),
        processor="audiozoo.processors.wav2vec2:Wav2Vec2Processor",
    ),
    Paper(
        name="unispeech",
        title="UniSpeech",
        paper="UniSpeech: Unified Speech Representation Learning with Labeled and Unlabeled Data",
        year=2021,
        arxiv="2101.07597",
        classes=(
            "UniSpeechForCTC",
            "UniSpeechForPreTraining",
            "UniSpeechForSequenceClassification",
            "UniSpeechModel",
        ),
        config="UniSpeechConfig",
        sizes=("large",),
        tasks=("transcription in phonemes", "alignment", "embedding", "classification", "pre-training"),
        checkpoints=(
            Checkpoint("microsoft/unispeech-large-1500h-cv", "large", _UNISPEECHS),
            Checkpoint("microsoft/unispeech-large-multi-lingual-1500h-cv", "large", _UNISPEECHS),
            Checkpoint("CommonVoiceEnglishPretrainedModel/checkpoint_best.pt", "large", _UNISPEECHS),
            Checkpoint("CommonVoiceMultilingualPretrainedModel/checkpoint_best.pt", "large", _UNISPEECHS),
        ),
        processor="audiozoo.processors.wav2vec2:Wav2Vec2Processor",
    ),
    Paper(
        name="unispeech_sat",
        title="UniSpeech-SAT",
        paper="UniSpeech-SAT: Universal Speech Representation Learning with Speaker Aware Pre-Training",
        year=2021,
        arxiv="2110.05752",
        classes=(
            "UniSpeechSatForXVector",
            "UniSpeechSatForSpeakerVerification",
            "UniSpeechSatForPreTraining",
            "UniSpeechSatForCTC",
            "UniSpeechSatForSequenceClassification",
            "UniSpeechSatForAudioFrameClassification",
            "UniSpeechSatModel",
        ),
        config="UniSpeechSatConfig",
        sizes=("base", "base_plus", "large"),
        tasks=("speaker embedding", "embedding", "transcription", "classification", "units", "pre-training"),
        checkpoints=_unispeech_sat_checkpoints(),
        processor="audiozoo.processors.wav2vec2:Wav2Vec2Processor",
    ),
    Paper(
        name="wav2vec2_conformer",
        title="wav2vec2-Conformer",
        paper="fairseq S2T: Fast Speech-to-Text Modeling with fairseq",
        year=2020,
        arxiv="2010.05171",
        classes=(
            "Wav2Vec2ConformerForCTC",
            "Wav2Vec2ConformerForPreTraining",
            "Wav2Vec2ConformerForSequenceClassification",
            "Wav2Vec2ConformerForAudioFrameClassification",
            "Wav2Vec2ConformerForXVector",
            "Wav2Vec2ConformerModel",
        ),
        config="Wav2Vec2ConformerConfig",
        sizes=("rel_pos_large", "rope_large"),
        tasks=("transcription", "alignment", "classification", "embedding", "pre-training"),
        checkpoints=_wav2vec2_conformer_checkpoints(),
        processor="audiozoo.processors.wav2vec2:Wav2Vec2Processor",
        shown_with="wav2vec2",
    ),
    Paper(
        name="wav2vec2_bert",
        title="w2v-BERT 2.0",
        paper="w2v-BERT: Combining Contrastive Learning and Masked Language Modeling for Self-Supervised Speech "
        "Pre-Training",
        year=2021,
        arxiv="2108.06209",
        classes=(
            "Wav2Vec2BertModel",
            "Wav2Vec2BertForPreTraining",
            "Wav2Vec2BertForCTC",
            "Wav2Vec2BertForSequenceClassification",
            "Wav2Vec2BertForAudioFrameClassification",
            "Wav2Vec2BertForXVector",
        ),
        config="Wav2Vec2BertConfig",
        sizes=("w2v_bert_2", "w2v_bert_2_300m"),
        tasks=("embedding", "transcription", "alignment", "classification", "speaker embedding", "pre-training"),
        checkpoints=(
            Checkpoint("facebook/w2v-bert-2.0", "w2v_bert_2", "MIT"),
            Checkpoint("conformer_shaw.pt", "w2v_bert_2", "MIT"),
        ),
        processor="audiozoo.processors.wav2vec2_bert:Wav2Vec2BertProcessor",
    ),
    Paper(
        name="xls_r",
        title="XLS-R",
        paper="XLS-R: Self-supervised Cross-lingual Speech Representation Learning at Scale",
        year=2021,
        arxiv="2111.09296",
        classes=("SpeechEncoderDecoderModel",),
        config="SpeechEncoderDecoderConfig",
        sizes=("xls_r_300m", "xls_r_1b", "xls_r_2b"),
        tasks=("speech translation", "transcription", "language identification", "embedding"),
        checkpoints=_xls_r_checkpoints(),
        processor="audiozoo.processors.xls_r:XLSRProcessor",
    ),
    Paper(
        name="speech_to_text",
        title="fairseq S2T",
        paper="fairseq S2T: Fast Speech-to-Text Modeling with fairseq",
        year=2020,
        arxiv="2010.05171",
        classes=("Speech2TextForConditionalGeneration", "Speech2TextModel"),
        config="Speech2TextConfig",
        sizes=("small", "medium", "large"),
        tasks=("transcription", "speech translation", "simultaneous translation"),
        checkpoints=_speech_to_text_checkpoints(),
        processor="audiozoo.processors.speech_to_text:Speech2TextProcessor",
    ),
    Paper(
        name="speech_to_text_2",
        title="Speech2Text2",
        paper="Large-Scale Self- and Semi-Supervised Learning for Speech Translation",
        year=2021,
        arxiv="2104.06678",
        classes=("Speech2Text2ForCausalLM",),
        config="Speech2Text2Config",
        sizes=("covost_en_de",),
        tasks=("speech translation", "decoding with a language model"),
        checkpoints=tuple(
            Checkpoint(f"facebook/s2t-wav2vec2-large-en-{language}", "covost_en_de", "MIT")
            for language in ("de", "tr", "ca", "ar")
        ),
        processor="audiozoo.processors.speech_to_text_2:Speech2Text2Processor",
    ),
    Paper(
        name="mms",
        title="MMS",
        paper="Scaling Speech Technology to 1,000+ Languages",
        year=2023,
        arxiv="2305.13516",
        classes=("MMSForCTC",),
        config="MMSConfig",
        sizes=("mms_300m", "mms_1b", "mms_1b_all", "lid"),
        tasks=("transcription in 1,107 languages", "language identification", "alignment"),
        checkpoints=(
            Checkpoint("facebook/mms-300m", "mms_300m", "CC-BY-NC-4.0"),
            Checkpoint("facebook/mms-1b", "mms_1b", "CC-BY-NC-4.0"),
            *(Checkpoint(f"facebook/mms-1b-{n}", "mms_1b_all", "CC-BY-NC-4.0") for n in ("fl102", "l1107", "all")),
            *(Checkpoint(f"facebook/mms-lid-{n}", "lid", "CC-BY-NC-4.0") for n in (126, 256, 512, 1024, 2048, 4017)),
            Checkpoint("ctc_alignment_mling_uroman/model.pt", "mms_300m", "CC-BY-NC-4.0"),
        ),
        processor="audiozoo.processors.mms:MMSProcessor",
    ),
    Paper(
        name="encodec",
        title="EnCodec",
        paper="High Fidelity Neural Audio Compression",
        year=2022,
        arxiv="2210.13438",
        classes=("EncodecModel", "EncodecLanguageModel"),
        config="EncodecConfig",
        sizes=("encodec_24khz", "encodec_48khz", "encodec_32khz", "audiogen_16khz"),
        tasks=("compression to files", "tokens of sound", "streaming", "training of codecs"),
        checkpoints=_encodec_checkpoints(),
        processor="audiozoo.processors.encodec:EncodecFeatureExtractor",
    ),
    Paper(
        name="bark",
        title="Bark",
        paper=(
            "Bark (Suno; no paper), after AudioLM: a Language Modeling Approach to Audio Generation, arXiv 2209.03143"
        ),
        year=2023,
        arxiv="",
        classes=("BarkModel", "BarkSemanticModel", "BarkCoarseModel", "BarkFineModel"),
        config="BarkConfig",
        sizes=("bark", "bark_small"),
        tasks=("speech synthesis with voices and non-speech sounds", "long texts", "continuation"),
        checkpoints=(
            Checkpoint("suno/bark", "bark", "MIT"),
            Checkpoint("suno/bark-small", "bark_small", "MIT"),
            *(Checkpoint(f"{stage}_2.pt", "bark", "MIT") for stage in ("text", "coarse", "fine")),
            *(Checkpoint(f"{stage}.pt", "bark_small", "MIT") for stage in ("text", "coarse", "fine")),
        ),
        processor="audiozoo.processors.bark:BarkProcessor",
    ),
    Paper(
        name="musicgen",
        title="MusicGen",
        paper="Simple and Controllable Music Generation",
        year=2023,
        arxiv="2306.05284",
        classes=(
            "MusicgenForConditionalGeneration",
            "MusicgenMelodyForConditionalGeneration",
            "MusicgenForCausalLM",
            "MusicgenMelodyForCausalLM",
        ),
        config="MusicgenConfig",
        sizes=(
            "small",
            "medium",
            "large",
            "stereo_small",
            "stereo_medium",
            "stereo_large",
            "audiogen_medium",
        ),
        tasks=("music from text", "music along a melody", "continuation", "sound effects from text", "training"),
        checkpoints=_musicgen_checkpoints(),
        processor="audiozoo.processors.musicgen:MusicgenProcessor",
    ),
    Paper(
        name="seamless_m4t",
        title="SeamlessM4T",
        paper="SeamlessM4T: Massively Multilingual & Multimodal Machine Translation",
        year=2023,
        arxiv="2308.11596",
        classes=(
            "SeamlessM4TModel",
            "SeamlessM4TForTextToText",
            "SeamlessM4TForSpeechToText",
            "SeamlessM4TForTextToSpeech",
            "SeamlessM4TForSpeechToSpeech",
        ),
        config="SeamlessM4TConfig",
        sizes=("medium", "large"),
        tasks=("speech translation", "text translation", "speech to speech", "text to speech", "training"),
        checkpoints=(
            Checkpoint("facebook/hf-seamless-m4t-medium", "medium", "CC-BY-NC-4.0"),
            Checkpoint("facebook/hf-seamless-m4t-large", "large", "CC-BY-NC-4.0"),
            Checkpoint("multitask_unity_medium.pt", "medium", "CC-BY-NC-4.0"),
            Checkpoint("multitask_unity_large.pt", "large", "CC-BY-NC-4.0"),
        ),
        processor="audiozoo.processors.seamless_m4t:SeamlessM4TProcessor",
    ),
    Paper(
        name="seamless_m4t_v2",
        title="SeamlessM4T v2",
        paper="Seamless: Multilingual Expressive and Streaming Speech Translation",
        year=2023,
        arxiv="2312.05187",
        classes=(
            "SeamlessM4Tv2Model",
            "SeamlessM4Tv2ForTextToText",
            "SeamlessM4Tv2ForSpeechToText",
            "SeamlessM4Tv2ForTextToSpeech",
            "SeamlessM4Tv2ForSpeechToSpeech",
            "SeamlessM4Tv2CodeHifiGan",
        ),
        config="SeamlessM4Tv2Config",
        sizes=("large",),
        tasks=("speech translation", "text translation", "speech to speech", "text to speech", "training"),
        checkpoints=(
            Checkpoint("facebook/seamless-m4t-v2-large", "large", "CC-BY-NC-4.0"),
            Checkpoint("seamlessM4T_v2_large.pt", "large", "CC-BY-NC-4.0"),
            Checkpoint("vocoder_v2.pt", "large", "CC-BY-NC-4.0"),
        ),
        processor="audiozoo.processors.seamless_m4t:SeamlessM4TProcessor",
    ),
)


def paper(name: str) -> Paper:
    """The paper of that module name or title.

    Raises:
        UsageError: if there is none, with the nearest name.
    """
    wanted = name.lower().replace("-", "_").replace(" ", "_")
    for entry in PAPERS:
        if wanted in {entry.name, entry.title.lower().replace(" ", "_")}:
            return entry
    raise unknown_name(f"There is no paper {name!r} in the zoo", wanted, [entry.name for entry in PAPERS])


def paper_of_class(name: str) -> Paper:
    """The paper that holds a model class.

    Raises:
        UsageError: if no paper does.
    """
    for entry in PAPERS:
        if name in entry.classes:
            return entry
    classes = [c for entry in PAPERS for c in entry.classes]
    raise unknown_name(f"No paper of the zoo has a class {name!r}", name, classes)


def markdown_table() -> str:
    """The README's table of papers."""
    rows = ["| paper | year | tasks | sizes | checkpoints | code | notebook |", "| --- " * 7 + "|"]
    for entry in PAPERS:
        link = f"[{entry.title}](https://arxiv.org/abs/{entry.arxiv})" if entry.arxiv else entry.title
        rows.append(
            f"| {link} | {entry.year} | {', '.join(entry.tasks)} | {len(entry.sizes)} | {len(entry.checkpoints)} "
            f"| [{entry.name}.py](audiozoo/models/{entry.name}.py) "
            f"| [{entry.notebook}.ipynb](notebooks/{entry.notebook}.ipynb) |"
        )
    return "\n".join(rows) + "\n"
