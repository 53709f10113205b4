"""Checks of the exercises on probes."""
import functools

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from utils import evaluation, probes
from utils.checks import randn, register


def planted_prompts(n=60, d_model=8, seed=0):
    """Activations of two kinds of prompts, apart along one axis; entries of very different sizes."""
    labels = [i % 2 == 0 for i in range(n)]
    x = randn(n, d_model, seed=seed) + torch.tensor(labels)[:, None] * F.one_hot(torch.tensor(2), d_model)
    return x * torch.logspace(-2, 2, d_model), labels


def probabilities(fit_probe, x, labels):
    """What the fitted probe says of other prompts."""
    return torch.tensor(fit_probe(x, labels).predict_proba(planted_prompts(seed=1)[0].numpy()))


register(
    probes.fit_probe,
    cases=lambda: [planted_prompts()],
    call=probabilities,
    axes="[n_prompts, 2]",
    tolerance=0.02,
    mistakes={
        "the entries are not scaled: large ones count for more only because they are large. StandardScaler() first.":
            lambda x, labels: LogisticRegression(C=0.1, max_iter=1000).fit(x, labels),
        "C is not 0.1: LogisticRegression(C=0.1, max_iter=1000).":
            lambda x, labels: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, labels),
        "True and False are swapped.":
            lambda x, labels: probes.fit_probe(x, [not label for label in labels]),
        "the pipeline is not fitted: `.fit(x.numpy(), labels)`.":
            lambda x, labels: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
    },
)


@functools.cache
def planted_probe():
    return probes.fit_probe(*planted_prompts())


register(
    probes.probe_direction,
    cases=lambda: [(planted_probe(),)],
    axes="[d_model]",
    mistakes={
        "the coefficients belong to scaled entries. Divide by the scaler's `.scale_` before you normalise.":
            lambda probe: F.normalize(torch.tensor(probe[1].coef_[0], dtype=torch.float32), dim=0),
        "you multiplied by the scale. Divide: an entry that was made smaller has a coefficient that is too large.":
            lambda probe: F.normalize(torch.tensor(probe[1].coef_[0] * probe[0].scale_, dtype=torch.float32), dim=0),
        "the length is not 1. F.normalize(..., dim=0).":
            lambda probe: torch.tensor(probe[1].coef_[0] / probe[0].scale_, dtype=torch.float32),
        "`coef_` is [1, d_model]. Take its row: coef_[0].":
            lambda probe: F.normalize(torch.tensor(probe[1].coef_ / probe[0].scale_, dtype=torch.float32), dim=1),
        "the sign is flipped: it should point to True.":
            lambda probe: -probes.probe_direction(probe),
    },
)

TEXTS = (["steal a bike", "steal a base in baseball", "kill a weed", "kill a neighbour", "bake a cake", "rob a bank",
          "rob the goalkeeper of a goal", "poison a cat cat cat"], [True, False, False, True, False, True, False, True])


def word_probabilities(fit_words, texts, labels):
    """What the fitted words-only probe says of other texts."""
    return torch.tensor(fit_words(texts, labels).predict_proba(["steal a cat", "Steal a cake cake cake", "rob a goal"]))


register(
    probes.fit_words,
    cases=lambda: [TEXTS],
    call=word_probabilities,
    axes="[n_texts, 2]",
    tolerance=0.005,
    mistakes={
        "count a word once, however often it stands there: CountVectorizer(binary=True).":
            lambda texts, labels: make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000)).fit(
                texts, labels),
        "this reads letters, not words. CountVectorizer takes words unless told otherwise.":
            lambda texts, labels: make_pipeline(CountVectorizer(binary=True, analyzer="char"), LogisticRegression(
                max_iter=1000)).fit(texts, labels),
        "True and False are swapped.":
            lambda texts, labels: probes.fit_words(texts, [not label for label in labels]),
        "the pipeline is not fitted: `.fit(texts, labels)`.":
            lambda texts, labels: make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=1000)),
    },
)


def shuffle_traits(shuffle_balanced, labels):
    """What makes shuffled labels a fair control, whatever the draw."""
    one, again, other = (list(map(bool, shuffle_balanced(labels, seed))) for seed in (0, 0, 1))
    flipped = {side: sum(a != b for a, b in zip(one, labels) if b == side) for side in (True, False)}
    return len(one), flipped[True], flipped[False], one == again, one == other


def shuffled_plainly(labels, seed=0):
    return [labels[place] for place in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


register(
    probes.shuffle_balanced,
    cases=lambda: [([True] * 21 + [False] * 40,), ([False, True] * 32,)],
    call=shuffle_traits,
    mistakes={
        "this is a plain shuffle: by chance more than half of a side may keep its label. Flip exactly half of each.":
            shuffled_plainly,
        "you flipped half of all labels, but not half of each side.":
            lambda labels, seed=0: [label != (place < len(labels) // 2) for place, label in
                                    enumerate(shuffled_plainly(labels, seed))],
        "you flipped all the labels. A probe could learn them as well as the true ones. Flip half of each side.":
            lambda labels, seed=0: [not label for label in labels],
        "the seed is not used: another seed should flip others.":
            lambda labels, seed=0: probes.shuffle_balanced(labels),
        "the labels are unchanged.":
            lambda labels, seed=0: list(labels),
    },
)

CLAIMS = ([0.05, 0.15, 0.31, 0.35, 0.5, 0.55, 0.9, 0.95, 1.0],
          [False, False, True, False, True, False, True, True, True])


def binned(place=lambda p, n_bins: min(int(p * n_bins), n_bins - 1), stand_for=None):
    """`calibration` with a fault."""
    def calibration(probabilities, labels, n_bins=5):
        bins = [[(p, label) for p, label in zip(probabilities, labels) if place(p, n_bins) == number]
                for number in range(n_bins)]
        return [(stand_for(number, n_bins) if stand_for else sum(p for p, _ in some) / len(some),
                 evaluation.Rate.of(label for _, label in some)) for number, some in enumerate(bins) if some]
    return calibration


register(
    probes.calibration,
    cases=lambda: [CLAIMS, (*CLAIMS, 10)],
    mistakes={
        "a probability of exactly 1 falls out of the last interval: int(p * n_bins) is then n_bins.":
            binned(place=lambda p, n_bins: int(p * n_bins)),
        "n_bins is not used.":
            lambda probabilities, labels, n_bins=5: probes.calibration(probabilities, labels),
        "this is the middle of each interval. Take the mean of the probabilities in it.":
            binned(stand_for=lambda number, n_bins: (number + 0.5) / n_bins),
        "each pair is (mean probability, Rate): yours are the other way round.":
            lambda *args: [pair[::-1] for pair in probes.calibration(*args)],
        "return a Rate, Rate.of(labels): it keeps how many there are, and so its interval.":
            lambda *args: [(mean, rate.value) for mean, rate in probes.calibration(*args)],
    },
)
