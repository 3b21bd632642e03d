"""CTC decoding against brute force: all alignments and all texts of small problems."""

from __future__ import annotations

import gzip
import itertools
import math
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from audiozoo.decoding import ctc
from audiozoo.errors import SourceError, UsageError
from audiozoo.layers.losses import ctc_loss

VOCABULARY = ["<pad>", "|", "A", "B"]


def random_log_probs(frames: int, size: int, seed: int, sharp: float = 2.0) -> np.ndarray:
    logits = sharp * np.random.default_rng(seed).standard_normal((frames, size))
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def collapsed(path) -> tuple[int, ...]:
    return tuple(k for k, _ in itertools.groupby(path) if k != 0)


def texts_by_brute_force(log_probs: np.ndarray) -> dict[tuple[int, ...], float]:
    """Every label sequence with its probability, by enumerating every path."""
    frames, size = log_probs.shape
    result: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(size), repeat=frames):
        labels = collapsed(path)
        logp = float(log_probs[np.arange(frames), path].sum())
        result[labels] = np.logaddexp(result.get(labels, -np.inf), logp)
    return result


# --- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_removes_repeats_and_blanks():
    path = np.array([0, 2, 2, 0, 2, 1, 1, 3, 0, 0])
    logits = np.eye(4)[path][None]
    (spans,) = ctc.greedy(logits)
    assert [(s.text, s.start, s.end) for s in spans] == [(2, 1, 3), (2, 4, 5), (1, 5, 7), (3, 7, 8)]
    (shorter,) = ctc.greedy(logits, np.array([3]))
    assert [(s.text, s.start, s.end) for s in shorter] == [(2, 1, 3)]
    letters = [ctc.Span(VOCABULARY[s.text], s.start, s.end) for s in spans]
    assert [(w.text, w.start, w.end) for w in ctc.words_of(letters, "|")] == [("AA", 1, 5), ("B", 7, 8)]
    assert ctc.collapse([]) == []
    spans = [ctc.Span("A", 0, 3, 0.9), ctc.Span("B", 3, 4, 0.5)]
    assert ctc.words_of(spans, "|")[0].score == pytest.approx((3 * 0.9 + 0.5) / 4)  # a mean over frames


# --- language model --------------------------------------------------------------------------------------------------

ARPA = """
\\data\\
ngram 1=6
ngram 2=4
ngram 3=1

\\1-grams:
-1.2 <unk>
-99 <s> -0.30
-0.9 </s>
-0.7 A -0.25
-0.8 AB -0.15
-1.1 B

\\2-grams:
-0.4 <s> A -0.10
-0.5 A B -0.05
-0.6 A </s>
-0.2 B AB

\\3-grams:
-0.1 <s> A B

\\end\\
"""


def test_ngrams_back_off():
    model = ctc.NgramModel.from_arpa(f" {line} " for line in ARPA.splitlines())
    assert model.order == 3
    assert model.case is str.upper  # `<s>` is no word
    assert ctc.NgramModel({("好",): (-1.0, 0.0)}).case is None

    def log10(history, word):
        return model.score(history, word)[0] / math.log(10)

    assert log10(("<s>",), "A") == pytest.approx(-0.4)
    assert log10(("<s>", "A"), "B") == pytest.approx(-0.1)
    assert log10(("A",), "AB") == pytest.approx(-0.25 - 0.8)  # b(A) p(AB)
    assert log10(("<s>", "A"), "A") == pytest.approx(-0.10 - 0.25 - 0.7)  # b(<s> A) b(A) p(A)
    assert log10(("A", "B"), "A") == pytest.approx(-0.05 - 0.7)  # B has no back-off weight
    assert log10((), "nonsense") == pytest.approx(-1.2)
    assert model.score(("<s>", "A"), "B")[1] == ("A", "B")
    assert model.score(("A",), "nonsense")[1] == ("A", "<unk>")


def test_arpa_files(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    with gzip.open(tmp_path / "lm.arpa.gz", "wt") as file:
        file.write(ARPA)
    for name in ("lm.arpa", "lm.arpa.gz"):
        assert ctc.NgramModel.from_arpa(tmp_path / name).score(("A",), "B")[0] == pytest.approx(-0.5 * math.log(10))
    with pytest.raises(SourceError, match="no language model"):
        ctc.NgramModel.from_arpa(tmp_path / "other.arpa")
    for first, second in (
        ("\\one-grams:", ""),
        ("-1 -1", ""),
        *(("\\1-grams:", x) for x in ("- A", "-1", "-1 A -1 -1")),
    ):
        (tmp_path / "bad.arpa").write_text(f"{first}\n{second}\n")
        with pytest.raises(SourceError, match=f"line {1 + bool(second)} is not in ARPA format"):
            ctc.NgramModel.from_arpa(tmp_path / "bad.arpa")
    (tmp_path / "bad.arpa").write_bytes(b"mmap lm \xff")
    with pytest.raises(SourceError, match="binary models of KenLM are not read"):
        ctc.NgramModel.from_arpa(tmp_path / "bad.arpa")
    with pytest.raises(SourceError, match="no n-gram"):
        ctc.NgramModel.from_arpa(["\\data\\"])


# --- beam search -----------------------------------------------------------------------------------------------------

WIDE = {"beam_width": 10_000, "beam_prune_logp": -math.inf, "token_min_logp": -math.inf}


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_is_exact(seed):
    log_probs = random_log_probs(6, 4, seed)
    wanted = texts_by_brute_force(log_probs)
    search = ctc.BeamSearch(VOCABULARY, alpha=0.0, beta=0.0)
    found = search(log_probs, n_best=10_000, **WIDE)
    assert {h.tokens for h in found} == set(wanted)
    for hypothesis in found:
        assert hypothesis.logit_score == pytest.approx(wanted[hypothesis.tokens], abs=1e-9)
    assert found[0].tokens == max(wanted, key=wanted.get)
    total = np.logaddexp.reduce([h.logit_score for h in found])
    assert total == pytest.approx(0.0, abs=1e-9)
    # The same number by another way: the loss.
    loss = ctc_loss(jnp.asarray(log_probs)[None], jnp.asarray([found[0].tokens]), reduction="none")[0]
    assert float(loss) == pytest.approx(-found[0].logit_score, abs=1e-4)


def words(tokens) -> list[str]:
    return "".join(" " if VOCABULARY[t] == "|" else VOCABULARY[t] for t in tokens).split()


def language_score(model, tokens, alpha, beta, offset, hotwords, weight) -> float:
    history, score = ("<s>",), 0.0
    for word in words(tokens):
        logp, history = model.score(history, word)
        if word not in model:
            logp += offset * math.log(10)
        score += alpha * logp + beta + weight * (word in hotwords)
    return score + alpha * model.score(history, "</s>")[0]


@pytest.mark.parametrize("hotwords", [(), ("BA", "B")], ids=["no hot word", "hot words"])
@pytest.mark.parametrize("seed", range(3))
def test_shallow_fusion_is_exact(seed, hotwords):
    model = ctc.NgramModel.from_arpa(ARPA.splitlines())
    log_probs = random_log_probs(6, 4, 10 + seed)
    options = {"alpha": 0.7, "beta": 0.9, "unknown_offset": -2.0}
    search = ctc.BeamSearch(VOCABULARY, language_model=model, hotwords=hotwords, hotword_weight=1.5, **options)
    wanted = {
        tokens: logp + language_score(model, tokens, 0.7, 0.9, -2.0, hotwords, 1.5)
        for tokens, logp in texts_by_brute_force(log_probs).items()
    }
    found = search(log_probs, n_best=10_000, **WIDE)
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(wanted[hypothesis.tokens], abs=1e-9)
    assert [h.tokens for h in found[:20]] == sorted(wanted, key=wanted.get, reverse=True)[:20]
    search.score_boundary = False
    ends = {h.tokens: h.lm_score for h in search(log_probs, n_best=10_000, **WIDE)}
    assert ends[()] == 0.0
    assert found[0].lm_score < ends[found[0].tokens]


def test_a_narrow_beam_finds_what_greedy_misses():
    # Two alignments of "A" together beat the one empty path that greedy takes.
    log_probs = np.log(np.array([[0.6, 0.0001, 0.3999 - 0.0001, 0.0001], [0.6, 0.0001, 0.3999 - 0.0001, 0.0001]]))
    assert ctc.greedy(log_probs[None])[0] == []
    (best,) = ctc.BeamSearch(VOCABULARY, alpha=0, beta=0)(log_probs, beam_width=3)
    assert best.text == "A"


def test_what_a_narrow_beam_keeps():
    log_probs = random_log_probs(6, 4, 5)
    search = ctc.BeamSearch(VOCABULARY)
    assert len(search(log_probs, n_best=3)) == 3
    assert len(search(log_probs, n_best=9, beam_width=2)) == 2
    assert len(search(log_probs, n_best=9, beam_prune_logp=0.0)) == 1
    (only,) = search(log_probs, token_min_logp=0.0)  # of each frame the best token
    assert only.tokens == tuple(span.text for span in ctc.greedy(log_probs[None])[0])


def test_a_hot_word_under_way_gets_its_share():
    log_probs = np.log(np.array([[0.02, 0.02, 0.5, 0.44], [0.02, 0.02, 0.9, 0.06]]))
    for weight, text in ((0.2, "A"), (0.5, "BA")):  # half of it makes up for ln 0.5 - ln 0.44 = 0.13, or not
        search = ctc.BeamSearch(VOCABULARY, hotwords=["BA"], hotword_weight=weight)
        assert search(log_probs, beam_width=1)[0].text == text
    search = ctc.BeamSearch(VOCABULARY, hotwords=["B", "BA"], hotword_weight=0.2)
    assert search(log_probs, beam_width=1)[0].text == "BA"  # the larger share of what two have in common


def test_hot_words_and_language_models_change_the_text():
    log_probs = np.log(np.array([[0.02, 0.01, 0.5, 0.47], [0.9, 0.04, 0.03, 0.03]]))
    assert ctc.BeamSearch(VOCABULARY)(log_probs)[0].text == "A"
    assert ctc.BeamSearch(VOCABULARY, hotwords=["B"], hotword_weight=3.0)(log_probs)[0].text == "B"
    only_b = ctc.NgramModel({("A",): (-9.0, 0.0), ("B",): (-0.1, 0.0)})
    assert ctc.BeamSearch(VOCABULARY, language_model=only_b)(log_probs)[0].text == "B"
    assert ctc.BeamSearch(VOCABULARY, skip=(2,))(log_probs)[0].text == "B"
    assert ctc.BeamSearch(VOCABULARY, skip=(2,))(log_probs, token_min_logp=-0.7)[0].text == ""  # nothing else is tried


@pytest.mark.parametrize("hotwords", [(), ("two",)], ids=["no hot word", "hot word"])
@pytest.mark.parametrize("seed", range(2))
def test_a_lexicon_is_exact(seed, hotwords, tmp_path):
    """Of all texts in the lexicon's words the best, by brute force; words that are spelled alike, as the model says."""
    (tmp_path / "lexicon.txt").write_text("one A |\ntwo A B |\nzwo A B |\ntwo A B\nthree B B\n\n")
    lexicon = ctc.read_lexicon(tmp_path / "lexicon.txt")
    assert lexicon == {"A": ["one"], "AB": ["two", "zwo"], "BB": ["three"]}
    model = ctc.NgramModel(
        {("one",): (-0.3, -0.1), ("two",): (-0.9, 0.0), ("zwo",): (-0.8, 0.0), ("one", "two"): (-0.1, 0)}
    )
    log_probs = random_log_probs(6, 4, 30 + seed)
    wanted = {}
    for tokens, logp in texts_by_brute_force(log_probs).items():
        for written in itertools.product(*(lexicon.get(word, []) for word in words(tokens))):
            history, score = model.start(), logp
            for word in written:
                own, history = model.score(history, word)
                score += 0.7 * ((0.0 if own == -math.inf else own) - (word == "three") * 10 * math.log(10))
                score += 0.9 + 1.5 * (word in hotwords)
            wanted[tokens, " ".join(written)] = score
    options = {"alpha": 0.7, "beta": 0.9, "hotwords": hotwords, "hotword_weight": 1.5}
    search = ctc.BeamSearch(VOCABULARY, language_model=model, lexicon=lexicon, **options)
    found = search(log_probs, n_best=10_000, **WIDE)
    best = max(wanted, key=wanted.get)
    assert (found[0].tokens, found[0].text) == best
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(wanted[hypothesis.tokens, hypothesis.text], abs=1e-9)
    assert {h.tokens for h in found} == {tokens for tokens, _ in wanted}
    assert {h.text for h in found if words(h.tokens) == ["AB"]} == {"two" if hotwords else "zwo"}
    # Cut off in the middle of a word, what is whole is left.
    log_probs = np.log(np.full((3, 4), 0.001) + np.eye(4)[[2, 1, 3]])
    (best,) = ctc.BeamSearch(VOCABULARY, lexicon=lexicon)(log_probs, token_min_logp=-1.0)
    assert (best.text, best.lm_score) == ("one", 1.5)  # the bonus of a word is without a model, too
    # What leads out of the lexicon is passed over.
    assert (
        ctc.BeamSearch(VOCABULARY, lexicon={"A": ["one"]})(log_probs[[0, 2, 1]], token_min_logp=-1.0)[0].text == "one"
    )
    with pytest.raises(ValueError, match="not in the lexicon"):
        ctc.BeamSearch(VOCABULARY, lexicon=lexicon, hotwords=["four"])
    (tmp_path / "lexicon.txt").write_text("one |\n")
    with pytest.raises(SourceError, match="line 1 has no tokens behind 'one'"):
        ctc.read_lexicon(tmp_path / "lexicon.txt")
    for content, message in ((b"\n", "is empty"), (b"\xff A\n", "cannot be read as UTF-8 text")):
        (tmp_path / "lexicon.txt").write_bytes(content)
        with pytest.raises(SourceError, match=message):
            ctc.read_lexicon(tmp_path / "lexicon.txt")
    with pytest.raises(SourceError, match="cannot be read"):
        ctc.read_lexicon(tmp_path / "other.txt")


def test_a_long_recording_takes_its_time_and_no_more():
    """Four times as long, about four times the time: no step costs more behind a long text."""

    def seconds(frames: int) -> float:
        path = np.tile([2, 0, 3, 1], frames // 4)
        log_probs = np.log(np.eye(4)[path] * 0.9 + 0.025)
        started = time.process_time()
        (best,) = ctc.BeamSearch(VOCABULARY)(log_probs, beam_width=5)
        assert best.tokens == tuple(t for t in path if t)
        return time.process_time() - started

    seconds(100)
    assert min(seconds(4_000) for _ in range(2)) < 8 * min(seconds(1_000) for _ in range(2))


def test_phrases_and_cases():
    """Of a phrase every word is hot; small letters are those of the vocabulary in capitals, and of the model alike."""
    frames = np.full((4, 4), 0.02)
    frames[[0, 1, 2, 3], [2, 1, 2, 0]] = 0.5  # "A A", if nothing is hot
    frames[[0, 2], [3, 3]] = 0.44
    log_probs = np.log(frames)
    assert ctc.BeamSearch(VOCABULARY)(log_probs)[0].text == "A A"
    assert ctc.BeamSearch(VOCABULARY, hotwords=["b b"], hotword_weight=3.0)(log_probs)[0].text == "B B"
    longer = ctc.BeamSearch([*VOCABULARY, "<unk>"], skip=(4,), hotwords=["b b"], hotword_weight=3.0)
    (best,) = longer(log_probs)  # what is no letter has no case, nor need it be among the logits
    assert (best.text, best.lm_score) == ("B B", 0.0)
    assert longer.text([1, 2, 1, 1, 3, 1]) == "A B"
    small = ctc.NgramModel({("a",): (-9.0, 0.0), ("b",): (-0.1, 0.0)})
    assert small.case is str.lower
    best = ctc.BeamSearch(VOCABULARY, language_model=small, alpha=1.0, beta=0.0)(log_probs)[0]
    assert best.text == "B B"
    assert best.lm_score == pytest.approx(-0.2 * math.log(10))
    assert ctc.NgramModel({("Abc",): (-1.0, 0.0)}).case is None
    either = ctc.NgramModel({("a",): (-0.1, 0.0), ("b",): (-0.1, 0.0)})  # where letters differ in case, words do
    assert ctc.BeamSearch(["<pad>", "|", "A", "b"], language_model=either)(log_probs)[0].text == "b b"
    with pytest.raises(ValueError, match="'B2' cannot be heard: the vocabulary has no '2'"):
        ctc.BeamSearch(VOCABULARY, hotwords=["b2"])


def test_phonemes_are_words_without_a_delimiter():
    model = ctc.NgramModel({("A",): (-3.0, 0.0), ("B",): (-0.1, 0.0)})
    log_probs = np.log(np.array([[0.02, 0.01, 0.5, 0.47]]))
    search = ctc.BeamSearch(VOCABULARY, delimiter=None, language_model=model, alpha=1.0)
    assert search(log_probs)[0].text == "B"
    assert search.text([2, 3]) == "A B"
    with pytest.raises(UsageError, match="'AB' cannot be heard: the vocabulary has no 'AB'"):
        ctc.BeamSearch(VOCABULARY, delimiter=None, hotwords=["AB"])


def test_logits_of_another_vocabulary():
    for shape in ((3, 5), (3, 3), (4,)):
        with pytest.raises(UsageError, match=r"\(frames, 4\) are wanted"):
            ctc.BeamSearch(VOCABULARY)(np.zeros(shape))


# --- forced alignment ------------------------------------------------------------------------------------------------


def alignment_by_brute_force(log_probs: np.ndarray, targets: list[int]) -> float:
    """The best of all paths that collapse to the targets."""
    frames, size = log_probs.shape
    best = -np.inf
    for path in itertools.product(range(size), repeat=frames):
        if collapsed(path) == tuple(targets):
            best = max(best, float(log_probs[np.arange(frames), path].sum()))
    return best


def check(alignment: ctc.ForcedAlignment, item: int, log_probs: np.ndarray, targets: list[int]) -> float:
    """The alignment's path says the targets; returns its log probability."""
    states = alignment.states[item, : len(log_probs)]
    extended = [0]
    for token in targets:
        extended += [token, 0]
    path = [extended[s] for s in states]
    assert collapsed(path) == tuple(targets)
    scores = log_probs[np.arange(len(path)), path]
    np.testing.assert_allclose(alignment.scores[item, : len(path)], scores, rtol=1e-5)
    return float(scores.sum())


def test_alignment_is_the_best_of_all():
    cases = [[2, 3, 1], [2, 2], [3], [1, 2, 1, 2], []]
    batch = np.stack([random_log_probs(6, 4, 20 + i) for i in range(len(cases))]).astype(np.float32)
    lengths = np.array([6, 5, 6, 6, 4])
    targets = np.zeros((len(cases), 4), np.int64)
    for row, case in zip(targets, cases, strict=True):
        row[: len(case)] = case
    found = ctc.forced_alignment(batch, targets, lengths, np.array([len(c) for c in cases]))
    assert found.exact
    for item, case in enumerate(cases):
        log_probs = batch[item, : lengths[item]]
        assert check(found, item, log_probs, case) == pytest.approx(alignment_by_brute_force(log_probs, case), abs=1e-4)
        assert (found.states[item, lengths[item] :] == -1).all()
        spans = found.spans(item, case)
        assert [s.text for s in spans] == case
        for before, after in itertools.pairwise(spans):
            assert before.end <= after.start


def viterbi_in_numpy(log_probs: np.ndarray, targets: list[int]) -> float:
    extended = [0]
    for token in targets:
        extended += [token, 0]
    ext = np.array(extended)
    skip = np.zeros(len(ext), bool)
    skip[2:] = (ext[2:] != 0) & (ext[2:] != ext[:-2])
    alpha = np.full(len(ext), -np.inf)
    alpha[:2] = log_probs[0, ext[:2]]
    for frame in log_probs[1:]:
        one = np.concatenate([[-np.inf], alpha[:-1]])
        two = np.where(skip, np.concatenate([[-np.inf, -np.inf], alpha[:-2]]), -np.inf)
        alpha = np.maximum(np.maximum(alpha, one), two) + frame[ext]
    return float(alpha[-2:].max())


def speech_like(frames: int, tokens: int, size: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Emissions of a text: its tokens at random places among blanks, blurred by noise."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(1, size, tokens)
    places = np.sort(rng.choice(frames // 2, tokens, replace=False)) * 2
    logits = rng.standard_normal((frames, size))
    logits[:, 0] += 4
    logits[places, 0] -= 4
    logits[places, targets] += 6
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32), targets.tolist()


def test_an_alignment_of_few_bits_or_many_is_that_of_its_numbers():
    rng = np.random.default_rng(0)
    scores = jnp.asarray(random_log_probs(300, 12, 0)[None], jnp.bfloat16)
    targets = rng.integers(1, 12, (1, 60))
    found, wanted = (ctc.forced_alignment(s, targets) for s in (scores, scores.astype(jnp.float32)))
    np.testing.assert_array_equal(found.states, wanted.states)
    with jax.enable_x64(True):
        double = ctc.forced_alignment(np.asarray(scores, np.float64), targets)
    np.testing.assert_array_equal(double.states, wanted.states)


def test_a_window_finds_the_same_alignment():
    log_probs, targets = speech_like(3000, 900, 12, 0)
    wanted = viterbi_in_numpy(log_probs.astype(np.float64), targets)
    whole = ctc.forced_alignment(log_probs[None], np.array([targets]))
    windowed = ctc.forced_alignment(log_probs[None], np.array([targets]), window=510)
    assert whole.exact
    assert check(whole, 0, log_probs, targets) == pytest.approx(wanted, abs=1e-2)
    np.testing.assert_array_equal(windowed.states, whole.states)


def test_what_is_called_exact_is():
    """A narrow window over noisy speech: where it says that nothing better left it, nothing did."""
    found = []
    for seed in range(18):
        log_probs, targets = speech_like(640, 90, 6, 100 + seed)
        log_probs += np.random.default_rng(seed).standard_normal(log_probs.shape).astype(np.float32)
        log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        windowed = ctc.forced_alignment(log_probs[None], np.array([targets]), window=(48, 64, 96)[seed % 3])
        best = viterbi_in_numpy(log_probs.astype(np.float64), targets)
        found.append((windowed.exact, check(windowed, 0, log_probs, targets) > best - 1e-2))
    assert set(found) == {(True, True), (False, True), (False, False)}


def heard(size: int, blocks: int, said: dict[int, dict[int, float]]) -> np.ndarray:
    """Blocks of 64 frames of silence, but for those that say tokens with these probabilities, and nothing else."""
    probabilities = np.full((64 * blocks, size), 1e-9, np.float32)
    probabilities[:, 0] = 1
    for frame, tokens in said.items():
        probabilities[frame, 0] = 1e-9
        probabilities[frame, list(tokens)] = list(tokens.values())
    return np.log(np.maximum(probabilities, 1e-9))


def saying(tokens: list[int], block: int, probability: float) -> dict[int, dict[int, float]]:
    """Each token in a frame of its own, with silence for the rest of its probability and between them."""
    return {64 * block + 1 + 2 * i: {0: 1 - probability, t: probability} for i, t in enumerate(tokens)}


def test_what_leaves_a_window():
    """A window of 16 states follows the best alignment so far: half of it lies before that, and half behind."""
    text = [1, 2] * 10
    follows = [3, 4, 5, 3, 4, 5, 3, 4, 5, 3, 4, 5]
    # Said twice, and more clearly the second time, for which it would have to wait at the start of the window's way.
    log_probs = heard(6, 3, saying(text, 0, 0.8) | saying(text, 1, 0.9) | saying(follows, 2, 0.99))
    # Five tokens, the last of them in the first block's last frame; of the next four the fourth comes without a blank
    # between, at the end of the second block: it alone is outside, and said again in the third.
    fast = {frame: {1 + i % 3: 1.0} for i, frame in enumerate((3, 13, 23, 33, 63, 73, 83, 126, 127))}
    fast |= {127: {3: 0.9, 2: 0.1}, 128: {0: 0.5, 3: 0.5}, 140: {1: 1.0}, 200: {2: 1.0}, 210: {3: 1.0}}
    jumps = heard(6, 4, fast)
    for scores, targets in ((log_probs, text + follows), (jumps, [1, 2, 3] * 4)):
        best = viterbi_in_numpy(scores.astype(np.float64), targets)
        found = ctc.forced_alignment(scores[None], np.array([targets]), window=16)
        assert check(found, 0, scores, targets) < best - 0.5
        assert not found.exact
    log_probs, targets = speech_like(256, 40, 6, 318)  # the last state alone is outside
    log_probs += np.random.default_rng(218).standard_normal(log_probs.shape).astype(np.float32)
    log_probs -= np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
    found = ctc.forced_alignment(log_probs[None], np.array([targets]), window=16)
    assert check(found, 0, log_probs, targets) < viterbi_in_numpy(log_probs.astype(np.float64), targets) - 1e-2
    assert not found.exact


def test_a_window_never_moves_back(monkeypatch):
    """Ten tokens are guessed too early, where the window follows them, and heard later."""
    text, follows = list(range(1, 21)), [21, 22, 23] * 5
    early = saying(text[:10], 0, 0.9) | {21 + frame: said for frame, said in saying(text[10:], 0, 0.55).items()}
    rest = saying(text[10:15], 1, 0.99) | saying(text[15:] + follows, 2, 0.99)
    log_probs, targets = heard(24, 3, early | rest), text + follows
    single, widths = ctc._single, []
    monkeypatch.setattr(ctc, "_single", lambda width, blank: widths.append(width) or single(width, blank))
    found, whole = (ctc.forced_alignment(log_probs[None], np.array([targets]), window=w) for w in (64, 4096))
    np.testing.assert_array_equal(found.states, whole.states)
    assert widths == [64, 132]  # the window follows at once
    assert 64 < np.flatnonzero(whole.states[0] == 21)[0] < 128


def test_an_improbable_beginning_hides_no_differences():
    """Each block counts from the best score before it: single precision holds no hour's sum."""
    log_probs, targets = speech_like(128, 20, 6, 5)
    before = np.full((64, 7), -1e8, np.float32)
    before[:, 1:6] -= 1e6
    before[:, 6] = 0.0  # what the text does not say
    scores = np.concatenate([before, np.pad(log_probs, ((0, 0), (0, 1)), constant_values=-20.0)])
    found = ctc.forced_alignment(scores[None], np.array([targets]))
    alone = ctc.forced_alignment(log_probs[None], np.array([targets]))
    np.testing.assert_array_equal(found.states[0, 64:], alone.states[0])


def test_an_hour_is_bounded():
    """180,000 frames and 50,000 letters fit into 300 MB, and what a frame takes does not grow with the text."""

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    hour = (of(jnp.float32, 2816, 64, 32), of(jnp.int32, 100_356), of(jnp.int32), of(jnp.int32))
    memory = ctc._viterbi.lower(*hour, window=4096, blank=0).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 300e6
    log_probs, targets = speech_like(6_000, 1_600, 32, 3)

    def seconds(window):
        start = time.perf_counter()
        assert ctc.forced_alignment(log_probs[None], np.array([targets]), window=window).exact
        return time.perf_counter() - start

    windowed, whole = (min(seconds(window) for _ in range(3)) for window in (256, 4096))
    assert windowed < whole / 2


def test_a_window_too_small_grows():
    # All the text is in the last frames: the window cannot follow it there.
    log_probs, targets = speech_like(600, 250, 12, 1)
    silence = np.full((1400, 12), -8.0, np.float32)
    silence[:, 0] = -0.004
    log_probs = np.concatenate([silence, log_probs])
    found = ctc.forced_alignment(log_probs[None], np.array([targets]), window=64)
    wanted = viterbi_in_numpy(log_probs.astype(np.float64), targets)
    assert check(found, 0, log_probs, targets) == pytest.approx(wanted, abs=1e-1)


def test_any_token_may_be_the_blank():
    """All that is said with the tokens the other way round, in which the blank is the last."""
    log_probs = random_log_probs(6, 4, 7).astype(np.float32)
    other = log_probs[:, ::-1]
    (spans,), (reversed_spans,) = ctc.greedy(log_probs[None]), ctc.greedy(other[None], blank=3)
    assert [(3 - s.text, s.start, s.end) for s in spans] == [(s.text, s.start, s.end) for s in reversed_spans]
    (best,) = ctc.BeamSearch(VOCABULARY, hotwords=["BA"])(log_probs, **WIDE)
    (reversed_best,) = ctc.BeamSearch(VOCABULARY[::-1], blank=3, hotwords=["BA"])(other, **WIDE)
    assert (best.text, pytest.approx(best.score)) == (reversed_best.text, reversed_best.score)
    for targets in ([2, 2], [2, 3, 1], [3]):
        found = ctc.forced_alignment(log_probs[None], np.array([targets]))
        reversed_found = ctc.forced_alignment(other[None], 3 - np.array([targets]), blank=3)
        np.testing.assert_array_equal(found.states, reversed_found.states)
        np.testing.assert_array_equal(found.scores, reversed_found.scores)
    with pytest.raises(UsageError, match="the blank is no token to align"):
        ctc.forced_alignment(other[None], np.array([[2, 3]]), blank=3)


def test_star_takes_what_the_text_leaves_out():
    log_probs, targets = speech_like(200, 60, 8, 2)
    star = np.concatenate([log_probs, np.zeros((200, 1), np.float32)], axis=1)
    found = ctc.forced_alignment(star[None], np.array([[8, *targets[20:40], 8]]))
    spans = found.spans(0, [8, *targets[20:40], 8])
    whole = ctc.forced_alignment(log_probs[None], np.array([targets])).spans(0, targets)
    assert [(s.start, s.end) for s in spans[2:-2]] == [(s.start, s.end) for s in whole[21:39]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[2, 2, 2]], "The recording has 4 frames, too few for its text, which takes 5"),
        ([[2, 1, 2], [2, 2, 1]], "Item 1 has 3 frames, too few for its text, which takes 4"),
        ([[0, 1, 2]], "no token"),
        ([[4, 1, 2]], "outside"),
        ([[-1, 1, 2]], "outside"),
    ],
)
def test_impossible_targets(targets, message):
    log_probs = np.stack([random_log_probs(4, 4, 0)] * len(targets))
    with pytest.raises(UsageError, match=message):
        ctc.forced_alignment(log_probs, np.array(targets), np.array([4, 3])[: len(targets)])


def test_a_text_of_as_many_tokens_as_there_is_room_for():
    log_probs = random_log_probs(5, 4, 0)
    assert ctc.forced_alignment(log_probs[None], np.array([[2, 2, 2]])).states[0].tolist() == [1, 2, 3, 4, 5]
    log_probs, targets = speech_like(200, 32, 8, 4)  # and of the number that arrays are made for, with a last blank
    found = ctc.forced_alignment(log_probs[None], np.array([targets]))
    assert found.states[0, -1] == 64
    check(found, 0, log_probs, targets)
    log_probs[:, targets[0]] = -np.inf  # what cannot be said
    assert not ctc.forced_alignment(log_probs[None], np.array([targets])).exact


# --- long recordings -------------------------------------------------------------------------------------------------


class Config:
    """What `chunked_logits` asks of a configuration."""

    inputs_to_logits_ratio = 20
    feat_extract_norm = "layer"


def test_pieces_make_the_whole():
    """A model whose frames see only their own samples gives in pieces what it gives at once."""
    from flax import nnx

    class Local(nnx.Module):
        def __init__(self):
            self.config = Config()
            self.weight = nnx.Param(jnp.arange(25.0)[:, None] * jnp.ones((1, 3)))

        @property
        def backbone(self):
            return self

        def frame_lengths(self, samples):
            return (samples - 25) // 20 + 1

        def __call__(self, values, mask=None):
            frames = (values.shape[1] - 25) // 20 + 1
            windows = values[:, jnp.arange(frames)[:, None] * 20 + jnp.arange(25)]
            return type("Output", (), {"logits": windows @ self.weight[...]})

    model = Local()
    for samples in (400, 4_000, 7_013):
        wave = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
        whole = np.asarray(model(jnp.asarray(wave)[None]).logits[0])
        options = {"chunk_length_s": 1.0, "stride_length_s": 0.2, "sampling_rate": 1000, "batch_size": 2}
        np.testing.assert_allclose(ctc.chunked_logits(model, wave, **options), whole, rtol=1e-5, atol=1e-4)
    for chunk, stride, told in ((1.0, 0.5, "leave nothing"), (math.inf, 0.2, "no end"), (1.0, math.nan, "no end")):
        with pytest.raises(UsageError, match=told):
            ctc.chunked_logits(model, wave, chunk_length_s=chunk, stride_length_s=stride, sampling_rate=1000)


def test_convolutions_behind_the_transformer_make_fewer_rows():
    config = SimpleNamespace(inputs_to_logits_ratio=320, add_adapter=True, adapter_stride=2, num_adapter_layers=3)
    assert ctc._samples_a_row(SimpleNamespace(config=config)) == 2560


def test_ctc_loss_is_the_sum_over_paths():
    log_probs = random_log_probs(5, 4, 3)
    texts = texts_by_brute_force(log_probs)
    labels = np.full((len(texts), 5), -100)
    for row, text in zip(labels, texts, strict=True):
        row[: len(text)] = text
    with jax.enable_x64(True):
        batch = jnp.broadcast_to(jnp.asarray(log_probs), (len(texts), *log_probs.shape))
        losses = jax.jit(lambda x: ctc_loss(x, jnp.asarray(labels), reduction="none"))(batch)
    np.testing.assert_allclose(losses, [-logp for logp in texts.values()], rtol=1e-9, atol=1e-9)
