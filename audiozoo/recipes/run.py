"""From a recipe, data and a place for results to a trained model: what `audiozoo train` does."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from audiozoo import hub, loading, registry, sharding
from audiozoo.checkpoints import check_place, is_native
from audiozoo.decoding.units import KMeans, cepstra
from audiozoo.errors import AudioError, AudiozooError, CheckpointError, UsageError
from audiozoo.layers.abstract import abstract
from audiozoo.models import audio_spectrogram_transformer as ast
from audiozoo.models.speecht5 import SpeechT5Speaking
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.processors.wav2vec2 import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor
from audiozoo.recipes import Recipe
from audiozoo.recipes.generation import Languages
from audiozoo.recipes.objectives import CTC, Contrastive, Pretraining, Spectrogram, Utterance, Vocoder, labels_in
from audiozoo.recipes.settings import Settings
from audiozoo.training import hosts
from audiozoo.training.checkpointing import Checkpoints
from audiozoo.training.data import Batches, Item, find_items
from audiozoo.training.loop import Options, State, Trainer
from audiozoo.training.parameters import Lora, Trainable
from audiozoo.training.reporting import Reporter
from weights_conversion import audio_spectrogram_transformer as ast_files
from weights_conversion import hifigan as vocoder_files


@dataclass
class Run:
    """A recipe with a model, a processor and the loop: ready to train."""

    recipe: Recipe
    settings: Settings
    model: Any
    processor: Any
    trainer: Trainer

    @property
    def network(self) -> str:
        """The name of the network that is wanted."""
        return self.recipe_network(self.trainer)

    @staticmethod
    def recipe_network(trainer: Trainer) -> str:
        """The first phase's."""
        return trainer.task.phases[0].network

    def batches(self, items: Sequence[Item], *, evaluation: bool = False, **options: Any) -> Batches:
        """Batches of recordings as the recipe wants them."""
        prepare = partial(self.recipe.objective.prepare, self.processor, self.model.config)
        odds = partial(self.recipe.objective.odds, self.model.config)
        return Batches(
            items,
            prepare,
            batch_size=self.settings.batch_size,
            sampling_rate=sampling_rate(self.model, self.processor),
            padding=self.recipe.objective.padding(self.processor),
            seconds=self.settings.seconds,
            process=(jax.process_index(), jax.process_count()),
            whole=self.recipe.objective.whole,
            odds=odds,
            mono=self.recipe.objective.mono(self.model.config),
            seed=self.trainer.options.seed,
            **options,
        )

    def trained(self, state: State) -> Any:
        """The model as far as it is trained."""
        return self.trainer.network(state, self.network)


def sampling_rate(model: Any, processor: Any) -> int:
    """Hz of a model's recordings."""
    config = getattr(model, "config", None)
    codec = getattr(config, "codec_config", None)  # Bark's, whose processor knows texts alone
    for owner in (processor, getattr(processor, "feature_extractor", None), config, codec):
        if (rate := getattr(owner, "sampling_rate", None)) is not None:
            return int(rate)
    return 16_000


def resized(model: Any, *, cls: Any = None, dtype: Any = None, **changes: Any) -> Any:
    """The model with another configuration: parameters that keep their shape keep their values, the others are new.

    With `cls` it is of that class, of the same configuration, and keeps the parameters of the same names.

    It computes in `dtype`, or in the model's own where that can be read off it; many a model hands it on to its layers.
    AST's positions are cut or interpolated for spectrograms of another size, as in its §2.2.
    """
    sizes = {n: changes[n] for n in ("max_length", "num_mel_bins", "time_stride", "frequency_stride") if n in changes}
    if sizes and isinstance(model, ast.ASTModel | ast.ASTForAudioClassification):
        model = ast.resized(model, **sizes)
    kind, config = cls or type(model), dataclasses.replace(model.config, **changes)
    values = {name: leaf[...] for name, leaf in loading.variables(model).items()}
    dtype = getattr(model, "dtype", None) if dtype is None else dtype
    param_dtype = next(iter(values.values())).dtype

    def create(rngs: Any) -> Any:
        return kind(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    new = abstract(create)
    shapes = {name: leaf.shape for name, leaf in loading.variables(new).items()}
    kept = {name: values[name] for name, shape in shapes.items() if name in values and values[name].shape == shape}

    def draw() -> dict[str, jax.Array]:
        return {name: leaf[...] for name, leaf in loading.variables(create(nnx.Rngs(0))).items() if name not in kept}

    # Compiled, so that what is kept is not drawn as well.
    new = loading.with_variables(new, kept | jax.jit(draw)())
    same = ("generation_config",) if kind is type(model) and hasattr(model, "generation_config") else ()
    return loading.finish(new, {name: getattr(model, name) for name in same})


def drawn(create: Callable[[Any], Any], seed: int, mesh: Mesh | None) -> Any:
    """A model that begins with nothing: on the host and from there into the shards of a mesh, else where it will be."""
    if mesh is None:
        return create(nnx.Rngs(seed))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        whole = create(nnx.Rngs(seed))
    return sharding.shard(whole, mesh, sharding.TRAINING_RULES)


def letters(texts: Sequence[str]) -> Wav2Vec2CTCTokenizer:
    """A vocabulary of the letters of some texts, the blank first, `|` between words."""
    found = sorted({letter for text in texts for letter in text} - {" ", "|"})
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *found]
    return Wav2Vec2CTCTokenizer({name: index for index, name in enumerate(names)})


def build(
    recipe: Recipe,
    items: Sequence[Item],
    *,
    init: str | Path | None = None,
    size: str | None = None,
    processor: Any = None,
    model: Any = None,
    settings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    options: Options | None = None,
    lora: Lora | None = None,
    mesh: Mesh | None = None,
    dtype: Any = None,
) -> Run:
    """A recipe made ready.

    Args:
        recipe: a row of `RECIPES`.
        items: the recordings, from which letters, labels and clusters are learnt where a checkpoint brings none.
        init: a checkpoint to go on from, of the same model or of one below another head; for AST a DeiT, too;
            beside a `g_…` of HiFi-GAN's authors, its `do_…`.
        size: a named configuration, to begin with nothing.
        processor: instead of the checkpoint's.
        model: instead of `init` and `size`.
        settings: changes to the recipe's.
        config: changes to the model's configuration.
        options: of the loop.
        lora: train low-rank factors, and the new head.
        mesh: devices.
        dtype: of the computation; parameters are float32.

    Raises:
        UsageError: a setting does not exist, or the data lacks what the recipe learns.
    """
    numbers = _changed(recipe.settings, settings or {}, "setting of a recipe")
    if size is not None and not (model is None and init is None):
        raise UsageError("A size is of a model that begins with nothing: leave it out, or what is gone on from.")
    given = model is not None
    _check_mesh(mesh, numbers.batch_size)
    changes: dict[str, Any] = {**recipe.config, **(config or {})}
    if model is None and init is not None:
        model, found = _begun(recipe, hub.resolve(str(init)), changes, (options or Options()).seed, dtype, mesh)
        processor = found if processor is None else processor
    base = _named(recipe, size) if model is None else model.config
    base = _changed(base, changes, f"field of {type(base).__name__}")
    processor = _of_size(processor, base) if processor else _new_processor(recipe, base)
    if isinstance(recipe.objective, Contrastive):
        _check_fusion(processor.feature_extractor, numbers.seconds)
    changes = _learnt(recipe, items, processor, base) | changes
    base = _changed(base, changes, f"field of {type(base).__name__}")
    if model is None:
        cls = registry.paper(recipe.paper).model_class(recipe.model_class)
        model = drawn(lambda rngs: cls(base, dtype=dtype, rngs=rngs), (options or Options()).seed, mesh)
    elif base != model.config or (given and dtype is not None):
        model = resized(model, dtype=dtype, **{n: getattr(base, n) for n in changes})
    if isinstance(recipe.objective, Pretraining) and recipe.objective.units:
        _clusters(processor, items, base)
    recipe = dataclasses.replace(recipe, objective=recipe.objective.knowing(model))
    frozen = numbers.frozen
    trainable = Trainable(frozen=frozen)
    if lora is not None:
        lora = dataclasses.replace(lora, within=lora.within or recipe.adapted)
        trainable = Trainable(pattern=recipe.new, frozen=frozen, lora=lora)
    task = recipe.objective.task(model, processor, numbers, trainable, dtype)
    if init is not None and isinstance(recipe.objective, Vocoder):
        task = dataclasses.replace(task, networks=_with_judge(task.networks, hub.resolve(str(init))))
    how = as_stacked(with_average(options, numbers), type(model), model.config)
    return Run(recipe, numbers, model, processor, Trainer(task, how, mesh=mesh))


def _begun(
    recipe: Recipe, path: Path, changes: Mapping[str, Any], seed: int, dtype: Any, mesh: Mesh | None
) -> tuple[Any, Any]:
    """A checkpoint's model, with new parameters where `recipe.new` allows them, and its processor."""
    paper = registry.paper(recipe.paper)
    if paper.config_class is ast.ASTConfig and ast_files.is_deit(path):  # §2.2 of AST: from weights for images
        wanted = _changed(paper.config_class(), changes, "field of ASTConfig")
        sizes = {name: getattr(wanted, name) for name in changes}
        model = drawn(lambda rngs: ast_files.from_deit(path, rngs=rngs, dtype=dtype, **sizes), seed, mesh)
        return model, ast_files.features_of(model.config)
    rules = None if mesh is None else sharding.TRAINING_RULES  # straight into the shards that it is trained in
    if path.is_dir() and is_native(path):  # what `train` or `save` wrote
        model = loading.load(path, dtype=dtype, mesh=mesh, rules=rules)
        return _headed(recipe, model, path, dtype), loading.processor_of(path, paper)
    model = loading.load(
        path,
        model_class=recipe.model_class,
        initialize=recipe.new and f".*(?:{recipe.new}).*",  # which finds a part of a name
        dtype=dtype,
        mesh=mesh,
        rules=rules,
    )
    return model, loading.processor_of(path, paper)


def _with_judge(networks: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """A vocoder's networks, with the discriminators of HiFi-GAN's authors where they lie beside the generator."""
    if (file := vocoder_files.discriminators_beside(path)) is None:
        return networks
    wanted = loading.variables(networks["judge"])
    read = vocoder_files.read_discriminators(file, wanted)
    values = {name: jnp.asarray(array, wanted[name].dtype) for name, array in read.items()}
    return {**networks, "judge": loading.with_variables(networks["judge"], values)}


def _headed(recipe: Recipe, model: Any, path: Path, dtype: Any) -> Any:
    """A model of the recipe's class with the body of `model`, where that is one below another head.

    Raises:
        CheckpointError: more than `recipe.new` would be new.
    """
    paper, kind = registry.paper(recipe.paper), type(model).__name__
    if kind == recipe.model_class:
        return model
    if type(model.config) is paper.config_class:
        cls, known = paper.model_class(recipe.model_class), loading.variables(model)
        wanted = loading.variables(abstract(lambda rngs: cls(model.config, rngs=rngs)))
        if all(name in known or (recipe.new and re.search(recipe.new, name)) for name in wanted):
            return resized(model, cls=cls, dtype=dtype)
    raise CheckpointError(f"{path} holds a {kind}, which is not the body of a {recipe.model_class}.")


def as_stacked(options: Options, cls: type, config: Any) -> Options:
    """The options, without a stack where the loss reads what lies between its blocks (SpeechT5's guided attention)."""
    guided = issubclass(cls, SpeechT5Speaking) and config.use_guided_attention_loss
    return dataclasses.replace(options, stack=False) if guided else options


def with_average(options: Options | None, settings: Settings) -> Options:
    """The options, with the recipe's moving average where they name none."""
    options = options or Options()
    return options if options.average is not None else dataclasses.replace(options, average=settings.average)


def _named(recipe: Recipe, size: str | None) -> Any:
    paper = registry.paper(recipe.paper)
    if size is not None and size not in paper.sizes:
        raise UsageError(f"{paper.title} has no size {size!r}; it has {', '.join(paper.sizes)}.")
    return getattr(paper.config_class, size or recipe.size)()


def _changed(base: Any, changes: Mapping[str, Any], what: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(base)}
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no {what}; there are {', '.join(sorted(known))}.")
    plain: dict[str, Any] = {}
    for name, value in changes.items():
        before = getattr(base, name)
        kind = next((k for k in (bool, int | float, str, tuple) if isinstance(before, k)), None)
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, float) and value.is_integer() and isinstance(before, int):
            value = int(value)  # 1e5 steps
        fits = isinstance(value, kind or object) and (kind is bool or before is None or not isinstance(value, bool))
        if not fits and not (value is None and known[name].default is None):
            raise UsageError(f"{name} cannot be {value!r}: by default it is {before!r}.")
        plain[name] = value
    return dataclasses.replace(base, **plain)


def _check_mesh(mesh: Mesh | None, batch_size: int) -> None:
    if mesh is None:
        if jax.process_count() > 1:
            raise UsageError("Several processes train one model on a mesh of all their devices: give one, as data=-1.")
        return
    parts = sharding.shards(sharding.batch_sharding(mesh, ("data", "fsdp")))
    if batch_size % parts:
        raise UsageError(
            f"A batch of {batch_size} cannot be divided among the {parts} parts of the mesh: set batch_size."
        )
    if parts % jax.process_count():
        raise UsageError(
            f"The mesh divides a batch into {parts} parts for {jax.process_count()} hosts; each host needs as many as "
            "any other: `tensor` lies within a host."
        )


def _check_fusion(extractor: Any, seconds: float) -> None:
    if extractor.truncation == "fusion" and seconds <= extractor.max_length_s:
        raise UsageError(
            f"This CLAP fuses what is longer than {extractor.max_length_s} s, and recordings are cut to {seconds:g} s, "
            "so that it would learn no fusion: set seconds to the longest that it shall hear."
        )


def _new_processor(recipe: Recipe, config: Any) -> Any:
    """The processor of a model that begins with nothing, as far as it can be known."""
    paper = registry.paper(recipe.paper)
    if isinstance(recipe.objective, CTC | Pretraining | Utterance):
        return paper.processor_class(Wav2Vec2FeatureExtractor())
    if isinstance(recipe.objective, Vocoder):
        return paper.processor_class.with_hop(config.sampling_rate, config.model_in_dim, config.samples_per_frame)
    if recipe.paper in ("audio_spectrogram_transformer", "encodec"):
        names = {"num_mel_bins", "max_length", "sampling_rate"} & {f.name for f in dataclasses.fields(config)}
        arguments = {name: getattr(config, name) for name in names}
        if recipe.paper == "encodec":
            arguments |= {"feature_size": config.audio_channels}
        return paper.processor_class(**arguments)
    raise UsageError(
        f"{paper.title} reads text, and a model that begins with nothing has no vocabulary: give a checkpoint "
        "directory as init, whose processor is used."
    )


def _of_size(processor: Any, config: Any) -> Any:
    """A checkpoint's processor, with AST's spectrograms as large as the model now reads them."""
    if isinstance(processor, ASTFeatureExtractor):
        processor = copy.copy(processor)
        processor.max_length, processor.num_mel_bins = config.max_length, config.num_mel_bins
    return processor


def _learnt(recipe: Recipe, items: Sequence[Item], processor: Any, config: Any) -> dict[str, Any]:
    """What the data says about the model: its languages, its letters, its labels."""
    if isinstance(recipe.objective, Languages):
        return _languages(items, processor, config)
    if isinstance(recipe.objective, CTC):
        texts = [item.fields["text"] for item in items if isinstance(item.fields.get("text"), str)]
        if not texts:
            raise UsageError("This recipe learns from recordings with texts, and there is none.")
        if getattr(processor, "_tokenizer", None) is None:
            processor._tokenizer = letters(texts)
        tokenizer = processor.tokenizer
        _check_letters(tokenizer, texts)
        size = len(tokenizer.tokens())
        if size < config.vocab_size <= len(tokenizer.tokens(added=True)):
            size = config.vocab_size  # a head with columns for special tokens behind the vocabulary stays
        found = {"vocab_size": size, "pad_token_id": tokenizer.pad_token_id}
        return {name: value for name, value in found.items() if getattr(config, name) != value}
    if isinstance(recipe.objective, Utterance | Spectrogram):
        several = isinstance(recipe.objective, Spectrogram) and recipe.objective.several
        names = {name for item in items for name in labels_in(item.fields, config.id2label, several) or ()}
        if not names:
            raise UsageError("This recipe learns labels, and no recording has one.")
        if not names <= set(config.id2label):
            return {"id2label": tuple(sorted(names))}
    return {}


def _check_letters(tokenizer: Wav2Vec2CTCTokenizer, texts: Sequence[str], some: int = 100) -> None:
    """Capitals and small letters are different letters: what is unknown would be learnt as `<unk>`."""
    ids = [index for row in tokenizer(texts[:some])["input_ids"] for index in row]
    if 2 * np.isin(ids, tokenizer.special_ids()).sum() > len(ids):
        known = [token for token in tokenizer.tokens() if token.isalpha()][:5]
        raise UsageError(
            f"Most letters of the texts, such as {texts[0][:40]!r}, are not in the vocabulary, which has "
            f"{', '.join(known)} …: write them alike."
        )


def _languages(items: Sequence[Item], processor: Any, config: Any) -> dict[str, Any]:
    """The languages of the data, each with its own letters, where the model does not hold them all."""
    texts: dict[str, list[str]] = {}
    for item in items:
        if "language" in item.fields and "text" in item.fields:
            texts.setdefault(str(item.fields["language"]), []).append(str(item.fields["text"]))
    if not texts:
        raise UsageError("This recipe learns from recordings with a text and a language, and there is none.")
    if set(texts) <= set(config.languages):
        for name, written in texts.items():
            tokenizer = copy.copy(processor.tokenizer)
            tokenizer.set_target_lang(name)
            _check_letters(tokenizer, written)
        return {}
    names = tuple(sorted(texts))
    if getattr(processor, "_tokenizer", None) is None or not set(names) <= set(processor.tokenizer.languages):
        vocab = {name: letters(texts[name]).vocab for name in names}
        processor._tokenizer = Wav2Vec2CTCTokenizer(vocab, target_lang=names[0])
    sizes = tuple(max(processor.tokenizer.vocab[name].values()) + 1 for name in names)
    return {"languages": names, "vocab_sizes": sizes, "pad_token_id": processor.tokenizer.pad_token_id}


def _clusters(processor: Any, items: Sequence[Item], config: Any, recordings: int = 100) -> None:
    """HuBERT, §IV-B: without given units, clusters of MFCCs of some of the recordings."""
    if any("units" in item.fields for item in items):  # which have other numbers; what has none is left out
        return
    from audiozoo.audio import files

    count = config.num_clusters if isinstance(config.num_clusters, int) else config.num_clusters[0]
    order = np.random.default_rng(0).permutation(len(items))[:recordings]
    frames = []
    for item in (items[i] for i in order):
        with contextlib.suppress(AudiozooError, OSError):  # counted and named when its batch is read
            frames.append(np.asarray(cepstra(jnp.asarray(files.read(item.source())))))
    if not frames:
        raise AudioError(f"Of {len(order)} recordings none can be read, so there is nothing to find clusters in.")
    processor.clusters = KMeans.fit(jax.random.key(0), jnp.asarray(np.concatenate(frames)), count, iterations=20)


def train(
    recipe: Recipe,
    data: str | Path,
    out: str | Path,
    *,
    evaluation: str | Path | None = None,
    held_out: float = 0.0,
    language: str | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    log_every: int = 10,
    keep: int = 2,
    limit: int = 10,
    tensorboard: bool = False,
    console: Console | None = None,
    report: Callable[[int, dict[str, float]], None] | None = None,
    **how: Any,
) -> Any:
    """Train, or go on with a run that was stopped.

    Args:
        recipe: a row of `RECIPES`.
        data: see `find_items`.
        out: `checkpoints/`, `metrics.jsonl`, `run.json` and at the end `model/`, a native checkpoint.
        evaluation: data to evaluate on.
        held_out: share of `data` to evaluate on instead.
        language: of the texts of recordings that do not say theirs.
        evaluate_every: steps between evaluations and checkpoints; a twentieth of all by default.
        patience: evaluations without improvement after which to stop.
        log_every: steps between reports.
        keep: checkpoints to keep besides the best.
        limit: recordings that may be unreadable.
        tensorboard: write event files too.
        console: where progress is shown.
        report: called with every report, besides.
        how: of `build`.

    Returns:
        The trained model: after an evaluation the best, else the last.

    Raises:
        AudiozooError: one sentence for each thing that can be wrong.
    """
    out = Path(out)
    for name, value in {"evaluate_every": evaluate_every, "patience": patience, "log_every": log_every}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} is at least 1, not {value}.")
    if not 0 <= held_out < 1:
        raise UsageError(f"The share that is held out lies in [0, 1), not at {held_out}.")
    if evaluation is not None and held_out:
        raise UsageError("Evaluation is on data of its own, or on a share that is held out: give one of the two.")
    if patience is not None and evaluation is None and not held_out:
        raise UsageError(
            "Patience counts evaluations, and there is nothing to evaluate on: give evaluation or held_out."
        )
    check_place(out / "model", overwrite=True)
    items, held = _divided(data, evaluation, held_out)
    if language is not None:
        items, held = ([_with_language(item, language) for item in part] for part in (items, held))
    run = build(recipe, [*items, *held], **how)
    checkpoints = Checkpoints(out / "checkpoints", keep=keep)
    _check_recipe(out / "run.json", run)
    batches = run.batches(items, limit=limit)
    stream = batches.training()
    state = checkpoints.restore(run.trainer.abstract(), stream)
    _remember(out / "run.json", run)  # not before: a checkpoint that does not fit keeps what it was begun with
    for message in checkpoints.messages if console is not None else []:
        console.print(message, style="yellow", highlight=False)  # type: ignore[union-attr]
    if state is None:
        state = run.trainer.init()
    elif console is not None:
        console.print(f"going on from step {int(state.step)}", highlight=False)
    steps = run.settings.steps
    every = evaluate_every or max(steps // 20, 1)
    judged = run.batches(held, limit=limit) if held else None
    first = jax.process_index() == 0
    with Reporter(
        out if first else out / f"process-{jax.process_index()}",
        steps=steps,
        start=int(state.step),
        tensorboard=tensorboard and first,
        console=console if first else None,
    ) as write:

        def told(step: int, metrics: dict[str, float]) -> None:
            write(step, metrics)
            if report is not None:
                report(step, metrics)

        try:
            state = run.trainer.fit(
                state,
                stream,
                steps=steps,
                evaluation=None if judged is None else (lambda: judged.evaluation(run.trainer.parts)),
                evaluate_every=every,
                patience=patience,
                log_every=log_every,
                report=told,
                checkpoints=checkpoints,
            )
        except BaseException as error:  # Ctrl-C and SIGTERM too: what is being written becomes whole
            checkpoints.close()
            if console is not None and isinstance(error, KeyboardInterrupt | SystemExit):
                console.print("stopped: the same command goes on from the last checkpoint, if any", highlight=False)
            raise
    for part in (batches, judged) if console is not None else ():
        if part is not None and (part.unreadable or part.left_out):
            where = "" if part is batches else " in evaluation"
            console.print(f"left out{where}: {part.report()}", markup=False, highlight=False)  # type: ignore[union-attr]
    if judged is not None:
        state = _best(checkpoints, run.trainer, state, console)
    checkpoints.close()
    model = hosts.whole(run.trained(state))
    if first:
        _save(model, run.processor, out / "model")
    hosts.wait("saved")
    return model


def _best(checkpoints: Checkpoints, trainer: Trainer, state: State, console: Console | None) -> State:
    """The state of the best checkpoint; `state`, the last, if there is none, or none that can be read."""
    best = checkpoints.best()
    if best is None or best == int(state.step) or best not in checkpoints.steps():
        return state
    try:
        return checkpoints.restore(trainer.abstract(), step=best)
    except CheckpointError as error:
        if console is not None:
            console.print(f"{error} The last one's model is saved in its place.", style="yellow", highlight=False)
        return state


def _divided(data: str | Path, evaluation: str | Path | None, held_out: float) -> tuple[list[Item], list[Item]]:
    """What to train on, and what to evaluate on: data of its own, a share of the former, or nothing.

    Raises:
        UsageError: if the share leaves nothing to train on.
    """
    items = find_items(data)
    if evaluation is not None:
        return items, find_items(evaluation)
    if not held_out:
        return items, []
    order = np.random.default_rng(1).permutation(len(items))
    count = max(1, round(held_out * len(items)))
    if count == len(items):
        raise UsageError(f"{data} holds {count} recordings, and all would be held out: none is left to train on.")
    return [items[i] for i in sorted(order[count:])], [items[i] for i in sorted(order[:count])]


def _with_language(item: Item, language: str) -> Item:
    return dataclasses.replace(item, fields={"language": language, **item.fields})


def _save(model: Any, processor: Any, directory: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        if hasattr(processor, "save"):
            processor.save(temporary)
        files = [path for path in sorted(Path(temporary).iterdir()) if path.is_file() and path.name != "config.json"]
        loading.save(model, directory, files=files, overwrite=True)


def _check_recipe(path: Path, run: Run) -> None:
    """A directory of another recipe is not gone on with."""
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8")).get("recipe")
        except ValueError:
            before = None
        if before not in (None, run.recipe.name):
            raise CheckpointError(f"{path.parent} holds a run of the recipe {before}; give another place.")


def _remember(path: Path, run: Run) -> None:
    """Write down what is run."""
    says = {
        "recipe": run.recipe.name,
        "model_class": run.recipe.model_class,
        "settings": dataclasses.asdict(run.settings),
    }
    path.write_text(json.dumps(says, indent=2) + "\n", encoding="utf-8")


__all__ = ["Run", "build", "letters", "resized", "train"]
