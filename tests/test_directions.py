"""The method finds a direction that was planted by hand, scores by the definitions, and selects by the rule."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from planted_model import planted_directions, planted_prompts, save_planted

from utils.activations import residual_stream
from utils.directions import (
    CandidateScores,
    Direction,
    cosine_similarities,
    difference_in_means,
    filter_prompts,
    find_direction,
    kept_out_by_one,
    lowest_bypass,
    random_directions,
    refusal_when_ablated,
    refusal_when_added,
    score_candidates,
    select_direction,
    tokens_read,
)
from utils.evaluation import kl_divergence, refusal_metric
from utils.interventions import Ablation, Addition, every_pair, last_logits
from utils.models import load_model

HARMFUL, HARMLESS = planted_prompts("#", 24), planted_prompts("+", 24, seed=1)
HARMFUL_VAL, HARMLESS_VAL = planted_prompts("#", 6, seed=2), planted_prompts("+", 6, seed=3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The model with a known direction, written at layer 1: it is there at the start of layer 2."""
    model = load_model(save_planted(tmp_path_factory.mktemp("planted")))
    model.refusal_tokens = model.refusal_tokens[:1]
    return model


@pytest.fixture(scope="module")
def found(planted):
    return find_direction(planted, HARMFUL, HARMLESS, HARMFUL_VAL, HARMLESS_VAL)


# the planted model

def test_the_planted_direction_is_found(planted, found):
    direction, scores = found
    r, q = planted_directions()
    assert F.cosine_similarity(direction.vector, r, dim=0) > 0.99
    assert direction.layer == 2  # at whose start r stands alone
    assert direction.position in planted.positions
    assert set(scores.passing().nonzero()[:, 0].tolist()) == {2}


def test_each_layer_fails_where_it_should(found):
    _, scores = found
    assert (scores.induce[:2] < 0).all() and (scores.induce[2:] > 0).all()  # before r is written: nothing to add
    assert (scores.bypass[2] < 0).all() and (scores.bypass[[0, 1, 3, 4, 5]] > 0).all()  # only all of r will do
    assert (scores.kl[:3] < 0.1).all() and (scores.kl[3:] > 0.1).all()  # with the topic erased, answers change


def test_the_direction_turns_refusal_off_and_on(planted, found):
    direction, _ = found

    def refused(prompts, intervention=None):
        metric = refusal_metric(last_logits(planted, prompts, intervention), planted.refusal_tokens)
        return (metric > 0).tolist()

    assert refused(HARMFUL_VAL) == [True] * 6 and refused(HARMLESS_VAL) == [False] * 6
    assert refused(HARMFUL_VAL, Ablation(direction.vector)) == [False] * 6
    assert refused(HARMLESS_VAL, Addition(direction.vector, direction.layer)) == [True] * 6
    prompts, controls = every_pair(HARMFUL_VAL, random_directions(20, direction.vector))
    assert sum(refused(prompts, Ablation(controls))) > 0.75 * 20 * 6  # not all: in 32 dimensions, chance overlaps


def test_prompts_on_the_wrong_side_are_left_out(planted, found):
    """Harmless requests among the harmful ones, and the reverse, change nothing."""
    direction, scores = found
    again, scores_again = find_direction(planted, HARMFUL + HARMLESS[:9], HARMLESS + HARMFUL[:9],
                                         HARMFUL_VAL + HARMLESS_VAL, HARMLESS_VAL + HARMFUL_VAL)
    torch.testing.assert_close(again.vector, direction.vector, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores_again.bypass, scores.bypass, rtol=1e-3, atol=1e-3)


def test_a_model_that_never_refuses(planted):
    with pytest.raises(ValueError, match="refuses none of the 24 harmful prompts .* set model.refusal_tokens"):
        find_direction(planted, HARMLESS, HARMLESS, HARMFUL_VAL, HARMLESS_VAL)
    with pytest.raises(ValueError, match="answers none of the 6 harmless prompts"):
        find_direction(planted, HARMFUL, HARMLESS, HARMFUL_VAL, HARMFUL_VAL)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("empty", range(4))
def test_no_prompts(planted, strict, empty):
    sides = [HARMFUL, HARMLESS, HARMFUL_VAL, HARMLESS_VAL]
    sides[empty] = []
    with pytest.raises(ValueError, match="The list of instructions is empty: give at least one"):
        find_direction(planted, *sides, strict=strict)


def test_not_strict_it_goes_on_with_all_prompts_and_says_so_in_one_line(planted, capsys):
    """None of the harmful ones is refused: they are kept, and what is found is the difference of these sides."""
    direction, scores = find_direction(planted, HARMLESS[:12], HARMLESS[12:], HARMLESS_VAL, HARMLESS_VAL, strict=False)
    out = capsys.readouterr().out
    assert out.startswith("The model refuses none of the 12 harmful prompts") and out.count("\n") == 1
    assert out.endswith("; until then the figures to come show the steps, and are no finding.\n")
    assert not scores.passing().any()
    streams = [residual_stream(planted, prompts)[:, direction.layer, direction.position]
               for prompts in (HARMLESS[:12], HARMLESS[12:])]
    torch.testing.assert_close(direction.vector, streams[0].mean(dim=0) - streams[1].mean(dim=0), rtol=1e-4, atol=1e-4)


def test_not_strict_it_goes_on_where_no_candidate_passes(llama, capsys):
    """Random weights: by their most likely tokens they refuse all, or nothing."""
    with pytest.raises(ValueError):
        find_direction(llama, ["steal", "steal a car"], ["bake", "a cake"], ["a car"], ["bake a cake"])
    direction, scores = find_direction(llama, ["steal", "steal a car"], ["bake", "a cake"], ["a car"], ["bake a cake"],
                                       strict=False)
    assert capsys.readouterr().out.count("no finding") == 1
    place = direction.layer, llama.positions.index(direction.position)
    assert place == lowest_bypass(scores)
    assert direction.vector.norm() > 0.01


@pytest.mark.parametrize("max_kl", [0.1, 0.0])
def test_without_every_score_the_same_is_chosen(planted, found, max_kl, monkeypatch, capsys):
    """None of the untried could be chosen: all have a higher bypass. Where none passes (max_kl=0), all are tried."""
    passing = CandidateScores.passing
    monkeypatch.setattr(CandidateScores, "passing", lambda scores, *filters: passing(scores, max_kl))
    sides = HARMFUL, HARMLESS, HARMFUL_VAL, HARMLESS_VAL
    wanted, every = find_direction(planted, *sides, strict=False)
    said = capsys.readouterr().out
    direction, scores = find_direction(planted, *sides, strict=False, every_score=False)
    assert capsys.readouterr().out == said and (said == "") == (max_kl > 0)
    assert torch.equal(direction.vector, wanted.vector)
    assert torch.equal(scores.bypass, every.bypass)
    untried = scores.kl.isnan()
    assert torch.equal(untried, scores.induce.isnan())
    assert untried.any() == (max_kl > 0)
    at = direction.layer, planted.positions.index(direction.position)
    assert (every.bypass[untried] >= every.bypass[at]).all()
    for name in ("induce", "kl"):
        torch.testing.assert_close(getattr(scores, name)[~untried], getattr(every, name)[~untried],
                                   rtol=1e-4, atol=1e-4)


def test_not_strict_a_direction_that_is_there_is_found_all_the_same(planted, found, capsys):
    direction, _ = find_direction(planted, HARMFUL, HARMLESS, HARMFUL_VAL, HARMLESS_VAL, strict=False)
    assert torch.equal(direction.vector, found[0].vector)
    assert capsys.readouterr().out == ""


# scores

def test_scores_are_those_of_one_candidate_at_a_time(llama):
    """By the definitions, prompt by prompt, on a random model; batch sizes do not matter."""
    harmful, harmless = ["steal", "steal a car", "a car, a cake"], ["bake a cake", "Sorry, a cake"]
    candidates = 3 * torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    candidates[1, 2] = 0
    scores = score_candidates(llama, candidates, harmful, harmless, batch_size=4)

    def logits(prompts, intervention):
        return torch.cat([last_logits(llama, [prompt], intervention) for prompt in prompts])

    for layer, index in [(0, 0), (1, 4), (3, 2)]:
        candidate = candidates[layer, index]
        ablated = Ablation(candidate)
        bypass = refusal_metric(logits(harmful, ablated), llama.refusal_tokens).mean()
        induce = refusal_metric(logits(harmless, Addition(candidate, layer)), llama.refusal_tokens).mean()
        kl = kl_divergence(logits(harmless, None), logits(harmless, ablated)).mean()
        expected = torch.stack([bypass, induce, kl])
        scored = torch.stack([s[layer, index] for s in (scores.bypass, scores.induce, scores.kl)])
        torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)

    assert scores.kl[1, 2] == 0
    torch.testing.assert_close(scores.bypass[1, 2], refusal_metric(logits(harmful, None), llama.refusal_tokens).mean())
    torch.testing.assert_close(scores.induce[1, 2], refusal_metric(logits(harmless, None), llama.refusal_tokens).mean())


@pytest.mark.parametrize("shape", [(3, 5, 32), (4, 5, 16), (4, 32), (32,)])
def test_candidates_of_another_shape(llama, shape):
    with pytest.raises(ValueError, match=r"are \[4, n_positions, 32\], not \[.*\]: take the differences in means"):
        score_candidates(llama, torch.ones(shape), ["steal"], ["bake a cake"])


def test_layer_0_has_no_candidates(llama):
    """The template's tokens are the same in every prompt, so their embeddings tell no prompts apart."""
    streams = residual_stream(llama, ["bake a cake", "steal", "a car"])
    candidates = difference_in_means(streams[:2], streams[2:]) + 1e-9  # and rounding must not make candidates
    scores = score_candidates(llama, candidates, ["steal"], ["bake a cake"])
    assert (scores.kl[0] == 0).all() and (scores.kl[1:] > 0).all()
    assert len(scores.bypass[0].unique()) == len(scores.induce[0].unique()) == 1


# selection

def make_scores(**changes):
    """10 layers x 2 positions that all pass but the last two layers; `changes` sets single candidates."""
    scores = CandidateScores(bypass=torch.full((10, 2), 1.0), induce=torch.full((10, 2), 1.0), kl=torch.zeros(10, 2))
    for name, values in changes.items():
        for (layer, index), value in values.items():
            getattr(scores, name)[layer, index] = value
    return scores


def test_the_lowest_bypass_is_selected():
    assert select_direction(make_scores(bypass={(3, 1): -2, (7, 0): -5, (2, 0): -4})) == (7, 0)
    assert select_direction(make_scores(bypass={(3, 1): -2})) == (3, 1)


@pytest.mark.parametrize("changes", [
    {"kl": {(4, 0): 0.1}},
    {"kl": {(4, 0): float("nan")}},
    {"induce": {(4, 0): 0.0}},
    {"bypass": {(8, 0): -9.0}},  # 8 is not below 0.8 x 10
])
def test_each_filter_removes(changes):
    lowest = {(4, 0): -5.0, (6, 1): -2.0, **changes.get("bypass", {})}
    expected = (4, 0) if "bypass" in changes else (6, 1)
    assert select_direction(make_scores(**{**changes, "bypass": lowest})) == expected


def test_filters_can_be_loosened():
    scores = make_scores(bypass={(9, 1): -9.0, (4, 0): -5.0}, kl={(4, 0): 0.5}, induce={(9, 1): -1.0})
    assert select_direction(scores, max_kl=1.0) == (4, 0)
    assert select_direction(scores, max_layer=1.0, min_induce=-2.0) == (9, 1)


@pytest.mark.parametrize("n_layers, last", [(5, 3), (8, 6), (10, 7), (18, 14), (35, 27), (40, 31), (80, 63)])
def test_the_last_layer_that_may_pass(n_layers, last):
    ones = torch.ones(n_layers, 1)
    layers = CandidateScores(bypass=-ones, induce=ones, kl=0 * ones).passing()[:, 0].nonzero()[:, 0]
    assert layers.tolist() == list(range(last + 1))


@pytest.mark.parametrize("score, bad, condition", [("kl", 5.0, "kl < 0.1"), ("induce", -5.0, "induce > 0")])
def test_no_candidate_passes(score, bad, condition):
    scores = make_scores()
    getattr(scores, score).fill_(bad)
    sentence = (f"No candidate passes the filters, and {condition} removes most, 20 of 20 .16 of them fail nothing "
                "else.: look at the scores")  # the other 4 are late
    with pytest.raises(ValueError, match=sentence):
        select_direction(scores)


def test_kept_out_by_one_filter():
    scores = make_scores(kl={(4, 1): 7.0, (8, 1): 7.0, (2, 0): 7.0}, induce={(4, 1): -1.0, (3, 0): -1.0})
    alone = {condition: set(map(tuple, who.nonzero().tolist()))
             for condition, who in kept_out_by_one(scores.filters()).items()}
    assert alone == {"kl < 0.1": {(2, 0)}, "induce > 0": {(3, 0)}, "layer < 0.8 of 10": {(8, 0), (9, 0), (9, 1)}}


def test_the_lowest_bypass_whatever_the_others():
    scores = make_scores(bypass={(0, 0): -9.0, (8, 1): -9.0, (4, 1): -5.0, (1, 0): -4.0}, kl={(4, 1): 7.0})
    assert lowest_bypass(scores) == (4, 1)  # layer 0 has no candidates, layer 8 is late
    assert lowest_bypass(scores, max_layer=0.3) == (1, 0)
    assert lowest_bypass(scores, max_layer=1.0) == (8, 1)


# the difference in means and directions

activations = st.tuples(st.integers(1, 5), st.integers(0, 10**6)).map(
    lambda drawn: torch.randn(drawn[0], 3, 2, 4, generator=torch.Generator().manual_seed(drawn[1])))


@given(activations, activations)
def test_difference_in_means_is_that_of_the_means(harmful, harmless):
    difference = difference_in_means(harmful, harmless)
    for layer in range(3):
        for position in range(2):
            means = [sum(x[layer, position] for x in side) / len(side) for side in (harmful, harmless)]
            torch.testing.assert_close(difference[layer, position], means[0] - means[1], rtol=1e-4, atol=1e-5)


@given(activations, activations, st.integers(0, 10**6))
def test_difference_in_means_ignores_order_and_what_both_share(harmful, harmless, seed):
    shared = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(seed))
    difference = difference_in_means(harmful, harmless)
    torch.testing.assert_close(difference_in_means(harmful.flip(0) + shared, harmless + shared), difference,
                               rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(difference_in_means(harmless, harmful), -difference)


def test_random_directions_are_as_long_as_the_one_and_point_elsewhere():
    vector = 7 * torch.randn(192, generator=torch.Generator().manual_seed(0))
    controls = random_directions(20, vector, seed=1)
    assert controls.shape == (20, 192)
    torch.testing.assert_close(controls.norm(dim=1), vector.norm().expand(20))
    assert F.cosine_similarity(controls, vector[None]).abs().max() < 0.3
    assert torch.equal(controls, random_directions(20, vector, seed=1))
    assert not torch.equal(controls, random_directions(20, vector, seed=2))


def test_unit():
    assert Direction(torch.tensor([3.0, 4.0]), layer=1, position=-1).unit.tolist() == pytest.approx([0.6, 0.8])


def test_tokens_read_are_those_that_the_model_reads(planted):
    n_read = []
    handle = planted.lm._module.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: n_read.append(inputs[0].numel()))
    harmful, harmless = HARMFUL[0], HARMFUL[0].replace("#", "+")
    find_direction(planted, 24 * [harmful], 24 * [harmless], 6 * [harmful], 6 * [harmless])
    handle.remove()
    [n_tokens] = {len(ids) for ids in planted.tokens([harmful, harmless])}  # of one length, so that none is padded
    n_candidates = (planted.n_layers - 1) * len(planted.positions)
    assert sum(n_read) == tokens_read(n_tokens, n_candidates, n_train=24, n_val=6)


# one candidate at a time, as the lesson does it

def test_prompts_are_filtered_by_the_sign_of_their_metric():
    prompts, metric = ["a", "b", "c", "d"], torch.tensor([2.0, -1.0, 0.0, 0.1])
    assert filter_prompts(prompts, metric, refused=True) == ["a", "d"]
    assert filter_prompts(prompts, metric, refused=False) == ["b", "c"]


@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_cosines_ignore_lengths(seed, length):
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
    cosines = cosine_similarities(vectors)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(5))
    torch.testing.assert_close(cosines, cosines.T)
    torch.testing.assert_close(cosine_similarities(length * vectors), cosines, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cosines[1, 3], F.cosine_similarity(vectors[1], vectors[3], dim=0))


def test_right_angles_and_opposites():
    cosines = cosine_similarities(torch.tensor([[2.0, 0], [0, 5], [-3, 0]]))
    assert cosines.tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_candidates_of_a_model_that_overflows(llama, bad):
    candidates = torch.ones(4, 5, 32)
    candidates[3, 2, 1] = bad
    with pytest.raises(ValueError, match="nan or infinity: .* overflows in torch.float32. Load it with dtype"):
        score_candidates(llama, candidates, ["steal"], ["bake a cake"])


def test_scores_are_the_means_over_prompts(llama):
    harmful, harmless = ["steal", "steal a car", "a car, a cake"], ["bake a cake", "Sorry, a cake"]
    candidates = 3 * torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    scores = score_candidates(llama, candidates, harmful, harmless)
    bypass = refusal_when_ablated(llama, candidates[2, 1], harmful)
    induce = refusal_when_added(llama, candidates[2, 1], 2, harmless)
    assert bypass.shape == (3,) and induce.shape == (2,)
    torch.testing.assert_close(bypass.mean(), scores.bypass[2, 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(induce.mean(), scores.induce[2, 1], rtol=1e-4, atol=1e-4)


def test_each_prompt_may_have_its_own_direction(llama):
    prompts, rows = every_pair(["steal", "bake a cake"], torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    for measure in (refusal_when_ablated, lambda *args: refusal_when_added(*args[:2], 1, args[2])):
        together = measure(llama, rows, prompts)
        alone = torch.cat([measure(llama, row, [prompt]) for prompt, row in zip(prompts, rows)])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
