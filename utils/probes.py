"""Linear probes: what can be read off an activation by a weighted sum, and what the words alone would give.

A probe is a scikit-learn pipeline, so it has `predict`, `predict_proba` and `score`. Labels are true or false.
"""
import random

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from utils.evaluation import Rate


def fit_probe(x, labels):
    """Logistic regression on activations x [n, d_model], each entry scaled to variance 1 first -> the probe.

    C = 0.1: some weight on small coefficients, for there are about as many entries as prompts.
    Raises ValueError if all labels are the same.
    """
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(x.numpy(), list(labels))


def probe_direction(probe):
    """The probe's direction among the activations, of length 1, pointing to True -> [d_model].

    The coefficients belong to scaled entries: dividing by the scale takes them back.
    """
    scaler, regression = (step for _, step in probe.steps)
    return F.normalize(torch.tensor(regression.coef_[0] / scaler.scale_, dtype=torch.float32), dim=0)


def probe_accuracy(probe, x, labels):
    """Rate of right predictions on activations (or texts, for `fit_words`)."""
    return Rate.of(bool(guess) == bool(label) for guess, label in zip(probe.predict(x), labels, strict=True))


def fit_words(texts, labels):
    """The baseline: logistic regression on which words a text holds, in no order -> a probe that reads texts."""
    return make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=1000)).fit(texts, list(labels))


def shuffle_balanced(labels, seed=0):
    """Labels for a control: in each true group and in each false one, half are flipped, drawn at random -> a list.

    So the new labels tell nothing of the old ones, not even by chance, as a plain shuffle may.
    """
    rng, shuffled = random.Random(seed), [bool(label) for label in labels]
    for side in (True, False):
        places = [place for place, label in enumerate(labels) if bool(label) == side]
        for place in rng.sample(places, len(places) // 2):
            shuffled[place] = not side
    return shuffled


def calibration(probabilities, labels, n_bins=5):
    """Are 8 of 10 prompts that a probe calls "80% harmful" harmful? -> [(mean probability, Rate of true labels)].

    The probabilities are sorted into n_bins equal intervals from 0 to 1; an empty one is left out.
    """
    bins = [[] for _ in range(n_bins)]
    for probability, label in zip(probabilities, labels, strict=True):
        bins[min(int(probability * n_bins), n_bins - 1)].append((probability, label))
    return [(sum(p for p, _ in some) / len(some), Rate.of(label for _, label in some)) for some in bins if some]
