"""What is measured, against the definitions written out: every pair, every threshold, every frame."""

import itertools
import math
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audiozoo.errors import UsageError
from audiozoo.text import character_error_rate, word_error_rate
from audiozoo.training import metrics

SCORES = st.integers(0, 6)  # few, so that many are equal


@given(st.lists(st.tuples(st.booleans(), SCORES), min_size=1, max_size=12).filter(lambda p: any(r for r, _ in p)))
def test_average_precision_is_the_mean_precision_at_each_relevant_item(pairs):
    relevant, scores = map(np.asarray, zip(*pairs, strict=True))
    precisions = []
    for is_relevant, score in pairs:
        if is_relevant:
            found = [r for r, other in pairs if other >= score]
            precisions.append(sum(found) / len(found))
    np.testing.assert_allclose(metrics.average_precision(relevant, scores), np.mean(precisions), rtol=1e-12)


def test_mean_average_precision_leaves_out_classes_without_an_item():
    targets = np.asarray([[1, 0, 0], [0, 1, 0], [1, 1, 0]])
    scores = np.asarray([[0.9, 0.8, 0.3], [0.2, 0.7, 0.9], [0.1, 0.6, 0.1]])
    # Class 0: found 1st of 1 and 3rd of 3, with two right. Class 1: 2nd and 3rd.
    expected = ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    np.testing.assert_allclose(metrics.mean_average_precision(targets, scores), expected, rtol=1e-12)
    assert math.isnan(metrics.average_precision(np.zeros(3, bool), np.arange(3)))
    with pytest.raises(UsageError, match="of any class"):
        metrics.mean_average_precision(np.zeros((2, 2), bool), np.zeros((2, 2)))


@given(
    st.lists(st.tuples(st.booleans(), SCORES), min_size=2, max_size=12).filter(lambda p: len({s for s, _ in p}) == 2)
)
def test_equal_error_rate_is_where_the_lines_of_the_two_rates_cross(pairs):
    same, scores = map(np.asarray, zip(*pairs, strict=True))
    points = []  # (false acceptances, false refusals) of each threshold, strictest first
    for threshold in [math.inf, *sorted(set(scores.tolist()), reverse=True)]:
        accepted = scores >= threshold
        points.append(((accepted & ~same).sum() / (~same).sum(), (~accepted & same).sum() / same.sum()))
    crossings = []
    for (a0, r0), (a1, r1) in itertools.pairwise(points):
        if (a0 - r0) <= 0 <= (a1 - r1) and (a1 - r1) > (a0 - r0):
            t = (r0 - a0) / ((r0 - a0) + (a1 - r1))
            crossings.append(a0 + t * (a1 - a0))
    rate, threshold = metrics.equal_error_rate(same, scores)
    np.testing.assert_allclose(rate, crossings[0], rtol=1e-12, atol=1e-12)
    assert threshold in scores
    assert 0 <= rate <= 1


def test_equal_error_rates_that_are_known():
    same = np.asarray([1, 1, 0, 0], bool)
    assert metrics.equal_error_rate(same, np.asarray([0.9, 0.8, 0.2, 0.1])) == (0.0, 0.8)
    assert metrics.equal_error_rate(same, np.asarray([0.1, 0.2, 0.8, 0.9]))[0] == 1.0
    assert metrics.equal_error_rate(same, np.asarray([0.9, 0.4, 0.6, 0.1]))[0] == 0.5
    assert metrics.equal_error_rate(same, np.zeros(4))[0] == 0.5
    for alike in (np.ones(3, bool), np.zeros(3, bool)):
        with pytest.raises(UsageError, match="same and of different"):
            metrics.equal_error_rate(alike, np.arange(3))


def test_si_snr_is_the_ratio_to_what_no_gain_explains():
    rng = np.random.default_rng(0)
    s, noise = rng.normal(size=(2, 400)), 0.3 * rng.normal(size=(2, 400))
    estimate = 0.5 * s + noise + 7
    ratios = []
    for target, made in zip(s - s.mean(axis=1, keepdims=True), estimate, strict=True):
        # The gain and the offset of least squares.
        fit, *_ = np.linalg.lstsq(np.stack([target, np.ones(400)], axis=1), made, rcond=None)
        rest = made - fit[0] * target - fit[1]
        ratios.append(10 * np.log10(np.sum((fit[0] * target) ** 2) / np.sum(rest**2)))
    np.testing.assert_allclose(metrics.si_snr(s, estimate), np.mean(ratios), rtol=1e-9)
    np.testing.assert_allclose(metrics.si_snr(s, -3 * estimate), np.mean(ratios), rtol=1e-9)  # scale-invariant
    assert metrics.si_snr(s[0], 2 * s[0] + 1) > 200
    assert math.isnan(metrics.si_snr(np.zeros(8), np.ones(8)))


def test_retrieval_by_counting():
    rng = np.random.default_rng(0)
    similarities, relevant = rng.normal(size=(6, 14)), rng.random((6, 14)) < 0.2
    relevant[np.arange(6), np.arange(6)] = True
    found = metrics.recalls(similarities, relevant, (1, 5))
    hits, average = {1: 0, 5: 0}, []
    for row, right in zip(similarities, relevant, strict=True):
        ranking = sorted(range(14), key=lambda i: -row[i])
        for k in hits:
            hits[k] += any(right[i] for i in ranking[:k])
        places = [place for place, i in enumerate(ranking[:10], 1) if right[i]]
        average.append(sum(n / place for n, place in enumerate(places, 1)) / min(right.sum(), 10))
    expected = {"recall@1": hits[1] / 6, "recall@5": hits[5] / 6, "map@10": np.mean(average)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12)
    targets, scores = np.asarray([1, 2, 2]), np.asarray([[0, 1, 0], [3, 2, 1], [3, 1, 2]])
    assert [metrics.accuracy(targets, scores, top=top) for top in (1, 2, 3)] == [1 / 3, 2 / 3, 1]
    assert metrics.accuracy(np.asarray([0, 1]), np.zeros((2, 20))) == 0.5  # of equal scores the first class


def test_error_rates_are_jiwers_and_agree_with_our_own():
    said = ["the cat sat on the mat", "", "you don't say"]
    heard = ["oh the cat sit on mat", "hm", "you do not say"]
    found = metrics.error_rates(said, heard)
    ours = word_error_rate(said, heard)
    assert found["wer"] == pytest.approx(ours.rate, abs=1e-12)
    assert found["cer"] == pytest.approx(float(character_error_rate(said, heard)), abs=1e-12)
    assert (found["substitutions"], found["deletions"], found["insertions"], found["words"]) == (2, 1, 3, 9)
    with pytest.raises(UsageError, match="no word"):
        metrics.error_rates(["", " "], ["a", "b"])


def test_bleu_is_sacrebleus_and_agrees_with_its_formula():
    words = "the quick brown fox jumps over the dog", "the quick brown fox leaps over a dog"
    wanted, came = map(str.split, words)
    precisions = []
    for n in range(1, 5):
        grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (wanted, came)]
        precisions.append((grams[0] & grams[1]).total() / grams[1].total())
    found = metrics.translation_scores([" ".join(wanted)], [" ".join(came)])
    np.testing.assert_allclose(found["bleu"], 100 * math.prod(precisions) ** 0.25, rtol=1e-9)
    assert 0 < found["chrf"] < 100
    bleu = {
        name: metrics.translation_scores(["你好吗朋友"], ["你好吗们友"], tokenize=name)["bleu"]
        for name in ("char", "13a")
    }
    assert bleu["char"] > 10 > bleu["13a"]  # four of five characters, and no word
    with pytest.raises(UsageError, match="no tokenizer 'klingon'"):
        metrics.translation_scores(["a"], ["a"], tokenize="klingon")


@pytest.mark.parametrize("name", ["jiwer", "sacrebleu"])
def test_a_missing_package_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=rf'the package {name}: pip install "audiozoo\[train\]"'):
        (metrics.error_rates if name == "jiwer" else metrics.translation_scores)(["a"], ["a"])


def test_units_are_judged_by_their_joint_distribution_with_phones():
    phones, units = list("aaabbbcc"), [0, 0, 1, 1, 1, 2, 2, 2]
    found = metrics.unit_quality(phones, units)
    best = sum(max(Counter(p for p, u in zip(phones, units, strict=True) if u == z).values()) for z in set(units)) / 8
    assert found["phone_purity"] == pytest.approx(best, abs=1e-12)
    best = sum(max(Counter(u for p, u in zip(phones, units, strict=True) if p == y).values()) for y in "abc") / 8
    assert found["cluster_purity"] == pytest.approx(best, abs=1e-12)

    def entropy(values):
        return -sum(n / 8 * math.log(n / 8) for n in Counter(values).values())

    # I(y; z) = H(y) + H(z) - H(y, z)
    information = entropy(phones) + entropy(units) - entropy(zip(phones, units, strict=True))
    assert found["pnmi"] == pytest.approx(information / entropy(phones), abs=1e-12)
    assert metrics.unit_quality(list("aab"), [5, 5, 7]) == {
        "phone_purity": 1,
        "cluster_purity": 1,
        "pnmi": pytest.approx(1),
    }
    assert math.isnan(metrics.unit_quality(list("aa"), [1, 2])["pnmi"])  # nothing to be told about
    for none in (("ab", [1, 2, 3]), ("", [])):
        with pytest.raises(UsageError, match=f"{len(none[0])} phones and {len(none[1])} units"):
            metrics.unit_quality(*none)


def test_boundaries():
    wanted = [{"start": 0.0, "end": 1.0}, {"start": 1.0, "end": 1.5}]
    found = [{"start": 0.1, "end": 0.9}, {"start": 1.0, "end": 1.7}]
    np.testing.assert_allclose(metrics.boundary_errors(wanted, found), [0.1, 0.1, 0, 0.2], atol=1e-12)
    with pytest.raises(UsageError, match="2 words to be found and 1"):
        metrics.boundary_errors(wanted, found[:1])
