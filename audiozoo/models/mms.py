r"""# MMS: Scaling Speech Technology to 1,000+ Languages

Vineel Pratap, Andros Tjandra, Bowen Shi, Paden Tomasello, Arun Babu, Sayani Kundu, Ali Elkahky, Zhaoheng Ni, Apoorv
Vyas, Maryam Fazel-Zarandi, Alexei Baevski, Yossi Adi, Xiaohui Zhang, Wei-Ning Hsu, Alexis Conneau, Michael Auli, 2023,
arXiv 2305.13516.

One wav2vec 2.0 of a billion parameters for a thousand languages: every block ends in a small bottleneck of the
language's own, two million parameters in all, and every language has a head for its own alphabet. The same network
tells 4,017 languages apart, and one with a romanised alphabet aligns text with speech in a thousand of them, which is
how the training data was made.

    waveform ── wav2vec 2.0 ── N × [block ── + Linear(ReLU(Linear(LN(x)))) of language l] ── head of language l ── CTC
                            ── mean over time ──> one of 4,017 languages
                            ── head of a romanised alphabet ── Viterbi with <star> ──> when each word is said

| paper | here |
| --- | --- |
| §3.1, forced alignment, `<star>` | `audiozoo.decoding.ctc.align`, `audiozoo.processors.mms.AlignmentTokenizer` |
| §4, pre-training; Table 2, sizes | `MMSConfig.mms_300m()`, `.mms_1b()`, `audiozoo.models.wav2vec2` |
| §5.1, language-specific adapters and heads | `MMSForCTC`, `audiozoo.models.wav2vec2.Wav2Vec2AttnAdapterLayer` |
| §6, language identification | `MMSConfig.lid()`, `audiozoo.decoding.encoders.identify` |
| §7, speech synthesis: a VITS for each language | `audiozoo.models.vits` |
| not in the paper; MMS Zero-shot (arXiv 2407.17852): a romanised lexicon | `audiozoo.decoding.ctc.BeamSearch` |

What differs from wav2vec 2.0: `MMSForCTC` holds several languages' adapters and heads at once, and each item of a batch
names its own, where `transformers` has one language at a time in the whole model (`load_adapter`, which
`weights_conversion.wav2vec2.load_adapter` also does).

Checkpoints: `facebook/mms-300m`, `mms-1b`, `mms-1b-{fl102,l1107,all}` and `mms-lid-{126,256,512,1024,2048,4017}`, which
load as wav2vec 2.0, with one language; `mms-meta/mms-zeroshot-300m`; the aligner's `model.pt` with its
`dictionary.txt`; and, as `MMSForCTC`, a directory with a file `adapter.<language>.safetensors` for each language that
is wanted, or fairseq's `mms1b_{fl102,l1107,all}.pt`, which holds all of them
(`weights_conversion.mms.open_checkpoint` picks some, and `unpack_languages` there writes such a directory).

    import audiozoo
    model = audiozoo.load("mms-1b-all", model_class="MMSForCTC")  # a directory with a few languages' files
    processor = audiozoo.load_processor("mms-1b-all")
    inputs = processor([english, french], sampling_rate=16_000)
    logits = model(**inputs, languages=["eng", "fra"]).logits
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from audiozoo.errors import CheckpointError, UsageError
from audiozoo.layers import abstract, check_ids
from audiozoo.layers.losses import ctc_loss
from audiozoo.layers.stacking import unscanned
from audiozoo.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2ForCTC, check_labels
from audiozoo.outputs import CausalLMOutput


@dataclass(frozen=True)
class MMSConfig(Wav2Vec2Config):
    """Sizes of one checkpoint (Table 2 and §5.1): wav2vec 2.0's, and the languages that it holds."""

    languages: tuple[str, ...] = ()  # ISO 639-3 codes, in the order of the stacked adapters
    vocab_sizes: tuple[int, ...] = ()  # letters of each language's head

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.languages) != len(self.vocab_sizes):
            raise CheckpointError(f"{len(self.languages)} languages have {len(self.vocab_sizes)} sizes of alphabets.")

    @classmethod
    def _size(cls, width: int, layers: int, codebooks: int, **changes: Any) -> MMSConfig:
        return cls(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=16,
            intermediate_size=4 * width,
            feat_extract_norm="layer",
            conv_bias=True,
            do_stable_layer_norm=True,
            codevector_dim=codebooks,
            proj_codevector_dim=codebooks,
            **changes,
        )

    @classmethod
    def mms_300m(cls) -> MMSConfig:
        """Table 2, MMS (0.3B): pre-trained on 1,406 languages; the aligner has this size too."""
        return cls._size(1024, 24, 768)

    @classmethod
    def mms_1b(cls) -> MMSConfig:
        """Table 2, MMS (1B): 48 blocks of width 1280; pre-trained on 1,406 languages."""
        return cls._size(1280, 48, 1024)

    @classmethod
    def mms_1b_all(cls) -> MMSConfig:
        """§5.1, the recogniser: MMS (1B) with adapters of width 16, here with English's head of 154 letters."""
        return cls._size(1280, 48, 1024, adapter_attn_dim=16, vocab_size=154)

    @classmethod
    def lid(cls, languages: int = 126) -> MMSConfig:
        """§6, language identification among 126, 256, 512, 1024, 2048 or 4017 languages."""
        labels = tuple(f"LABEL_{i}" for i in range(languages))
        return cls._size(1280, 48, 1024, classifier_proj_size=1024, id2label=labels)


def is_of_a_language(path: Sequence[Any]) -> bool:
    """§5.1: whether a parameter belongs to one language: its adapters and its head."""
    return "adapter_layer" in path or path[0] == "lm_head"


def languages_first(path: Sequence[Any], value: Array) -> Array:
    """§5.1: a language's parameters with the languages in front, also where the blocks are stacked before them."""
    return value.swapaxes(0, 1) if "stacked" in path else value


class MMSForCTC(Wav2Vec2ForCTC):
    """§5.1: a recogniser of several languages at once: every item of a batch goes through its own adapters and head.

    Adapters and heads have a leading axis, one entry a language; heads are padded to the largest alphabet, and a
    language's scores of letters that it does not have are the least that there are.
    """

    def __init__(self, config: MMSConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if not config.languages:
            raise UsageError("MMSForCTC needs languages; one alone is a Wav2Vec2ForCTC.")
        if config.adapter_attn_dim is None or not config.do_stable_layer_norm:
            raise UsageError("MMSForCTC needs adapter_attn_dim, and blocks that normalise first.")
        widest = dataclasses.replace(config, vocab_size=max(config.vocab_sizes))
        super().__init__(widest, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        count = len(config.languages)
        for path, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            if is_of_a_language(path):
                owner: Any = self
                for part in path[:-1]:
                    owner = owner[part] if isinstance(part, int) else getattr(owner, str(part))
                setattr(owner, str(path[-1]), nnx.Param(jnp.broadcast_to(leaf[...], (count, *leaf.shape))))
        self.config = widest

    def language_index(self, languages: str | Sequence[str] | Int[Array, " batch"], batch: int) -> Int[Array, " batch"]:
        """§5.1: which adapters each item of a batch goes through.

        Args:
            languages: codes, or their indices in `config.languages`; one code is everybody's.
            batch: items.

        Raises:
            UsageError: for a language that the model does not hold, or not as many as there are items.
        """
        known = self.config.languages
        if isinstance(languages, str):
            languages = [languages] * batch
        if isinstance(languages, Sequence):
            if missing := sorted({str(x) for x in languages if isinstance(x, str)} - set(known)):
                raise UsageError(f"The model holds no {', '.join(missing)}; it holds {', '.join(known)}.")
            languages = jnp.asarray([known.index(x) if isinstance(x, str) else x for x in languages])
        index = jnp.asarray(languages, jnp.int32)
        if index.shape != (batch,):
            raise UsageError(f"{index.size} languages are given for {batch} recordings.")
        check_ids(index, len(known))
        return index

    def speaking(self, language: str) -> Wav2Vec2ForCTC:
        """§5.1: a recogniser of one of the languages alone, for instance for export."""
        index = int(self.language_index([language], 1)[0])
        size = self.config.vocab_sizes[index]
        fields = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(Wav2Vec2Config)}
        config = Wav2Vec2Config(**(fields | {"vocab_size": size}))
        flat = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(unscanned(self), nnx.Param))}
        graphdef, state = nnx.split(abstract(lambda rngs: Wav2Vec2ForCTC(config, dtype=self.lm_head.dtype, rngs=rngs)))
        own = []
        for path, leaf in nnx.to_flat_state(state):
            value = flat[path][index] if is_of_a_language(path) else flat[path]
            own.append((path, leaf.replace(value[..., :size] if path[0] == "lm_head" else value)))
        merged: Any = nnx.merge(graphdef, nnx.from_flat_state(own))
        return merged

    def __call__(  # type: ignore[override]
        self,
        input_values: Float[Array, "batch samples"],
        attention_mask: Int[Array, "batch samples"] | None = None,
        labels: Int[Array, "batch tokens"] | None = None,
        *,
        languages: str | Sequence[str] | Int[Array, " batch"],
        key: jax.Array | None = None,
        **options: Any,
    ) -> CausalLMOutput:
        """Letters for each frame, of each item's own language, and, with `labels`, the CTC loss.

        Args:
            input_values: waveforms at 16 kHz.
            attention_mask: 1 for a sample of the recording, 0 for padding behind it.
            labels: targets; -100 and the blank (`pad_token_id`) are left out.
            languages: of each item, by code or index; see `language_index`.
            key: switches dropout, layer drop and masking on.
            options: see `Wav2Vec2Model`.

        Raises:
            UsageError: see `language_index`; or if a label is no letter of its language.
        """
        config, batch = self.config, len(input_values)
        index = self.language_index(languages, batch)
        if labels is not None and not isinstance(index, jax.core.Tracer):
            for row, language in zip(labels, index, strict=True):
                size = config.vocab_sizes[language]
                check_labels(row, size, f"{config.languages[language]} has {size} letters")
        parts: Any = nnx.split(self, lambda path, _: is_of_a_language(path), ...)
        graphdef, own, common = parts
        flat = [(p, leaf.replace(languages_first(p, leaf[...])[index])) for p, leaf in nnx.to_flat_state(own)]
        own = nnx.from_flat_state(flat)  # (batch, …)
        keys = None if key is None else jax.random.split(key, batch)
        rows: dict[str, Any] = {"attention_mask": attention_mask}
        rows |= {name: options.pop(name) for name in ("mask_time_indices", "mask_feature_indices") if name in options}

        def one(own: Any, values: jax.Array, key: jax.Array | None, masks: dict[str, Any]) -> CausalLMOutput:
            model = nnx.merge(graphdef, own, common)
            alone = jax.tree.map(lambda row: row[None], masks)
            output = Wav2Vec2ForCTC.__call__(model, values[None], key=key, **alone, **options)
            return jax.tree.map(lambda x: x[0], output)

        output = jax.vmap(one)(own, input_values, keys, rows)
        sizes = jnp.asarray(config.vocab_sizes)[index]
        letters = jnp.arange(output.logits.shape[-1]) < sizes[:, None, None]
        logits = jnp.where(letters, output.logits, jnp.finfo(output.logits.dtype).min)
        loss = None
        if labels is not None:
            spoken = attention_mask is not None
            loss = ctc_loss(
                logits,
                jnp.asarray(labels),
                self.backbone.frame_mask(attention_mask, logits.shape[1]).sum(axis=1) if spoken else None,
                blank=config.pad_token_id,
                reduction=config.ctc_loss_reduction,
                zero_infinity=config.ctc_zero_infinity,
            )
        return CausalLMOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
