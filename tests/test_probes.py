"""Probes find what was planted, the words-only baseline sees words alone, and the controls tell nothing."""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.evaluation import Rate
from utils.probes import calibration, fit_probe, fit_words, probe_accuracy, probe_direction, shuffle_balanced


def planted(n=400, d_model=10, seed=0):
    """Activations that differ by side along one direction only, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(d_model, generator=torch.Generator().manual_seed(9)), dim=0)
    labels = [bool(i % 2) for i in range(n)]
    x = torch.randn(n, d_model, generator=generator) + 4 * torch.tensor(labels)[:, None] * direction
    return x, labels, direction


def test_a_probe_finds_the_planted_direction():
    x, labels, direction = planted()
    probe = fit_probe(x, labels)
    assert probe_direction(probe) @ direction > 0.95
    assert probe_direction(probe).norm().item() == pytest.approx(1, abs=1e-5)
    other, other_labels, _ = planted(seed=1)
    assert probe_accuracy(probe, other, other_labels).value > 0.95


@given(st.floats(0.01, 100), st.floats(-5, 5))
def test_a_probe_does_not_mind_units(scale, shift):
    x, labels, _ = planted(n=60)
    one, other = fit_probe(x, labels), fit_probe(scale * x + shift, labels)
    torch.testing.assert_close(torch.tensor(one.predict_proba(x)), torch.tensor(other.predict_proba(scale * x + shift)),
                               rtol=0, atol=1e-2)
    assert probe_direction(one) @ probe_direction(other) > 0.999


def test_labels_that_are_all_the_same():
    with pytest.raises(ValueError, match="class"):
        fit_probe(torch.randn(4, 3), [True] * 4)


def test_words_alone():
    texts, labels = ["kill a man", "rob a man", "kill a weed", "bake a man"], [True, True, False, False]
    probe = fit_words(texts, labels)
    again = [" ".join(reversed(text.split())) for text in texts]  # in another order
    assert probe.predict_proba(again).tolist() == probe.predict_proba(texts).tolist()
    assert probe_accuracy(probe, ["rob"], [True]) == Rate(1, 1)


def test_accuracy_counts_the_right_ones():
    class Probe:
        def predict(self, x):
            return [value > 0 for value in x]
    assert probe_accuracy(Probe(), [1, -1, 2, -2], [True, True, True, False]) == Rate(3, 4)
    with pytest.raises(ValueError):
        probe_accuracy(Probe(), [1, -1], [True])


@given(st.lists(st.booleans(), max_size=50), st.integers(0, 9))
def test_a_balanced_shuffle_flips_half_of_each_side(labels, seed):
    shuffled = shuffle_balanced(labels, seed)
    for side in (True, False):
        flipped = [new != old for new, old in zip(shuffled, labels) if old == side]
        assert sum(flipped) == len(flipped) // 2
    assert shuffled == shuffle_balanced(labels, seed)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50), st.integers(1, 10))
def test_every_prompt_is_in_one_interval(claims, n_bins):
    found = calibration(*zip(*claims), n_bins)
    assert sum(rate.n for _, rate in found) == len(claims)
    assert sum(rate.successes for _, rate in found) == sum(label for _, label in claims)
    means = [mean for mean, _ in found]
    assert means == sorted(means)


def test_calibration_of_nothing():
    assert calibration([], []) == []
