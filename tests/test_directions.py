"""The method finds a direction that was planted by hand, scores by the definitions, and selects by the rule."""
import pytest
import torch
import torch.nn.functional as F
from exact import Float64, assert_same
from hypothesis import given
from hypothesis import strategies as st
from planted_model import planted_directions, planted_prompts, save_planted

from utils.activations import residual_stream
from utils.candidates import AT_A_TIME, CandidateScores, heat, kept_out_by_one, spread
from utils.directions import (
    Direction,
    cosine_similarities,
    difference_in_means,
    filter_prompts,
    find_direction,
    kept_prompts,
    lowest_bypass,
    mean_of_kept,
    nearest_miss,
    random_directions,
    refusal_when_ablated,
    refusal_when_added,
    select_direction,
)
from utils.evaluation import refusal_metric
from utils.interventions import Ablation, Addition, every_pair, last_logits
from utils.models import load_model

HARMFUL, HARMLESS = planted_prompts("#", 24), planted_prompts("+", 24, seed=1)
HARMFUL_VAL, HARMLESS_VAL = planted_prompts("#", 6, seed=2), planted_prompts("+", 6, seed=3)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def sides(harmful, harmless):
    return {"harmful": harmful, "harmless": harmless}


pytestmark = pytest.mark.usefixtures("exact")
TRAIN, VAL = sides(HARMFUL, HARMLESS), sides(HARMFUL_VAL, HARMLESS_VAL)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The model with a known direction, written at layer 1: it is there at the start of layer 2."""
    model = load_model(save_planted(tmp_path_factory.mktemp("planted")), dtype=torch.float64)
    model.refusal_tokens = model.refusal_tokens[:1]
    return model


@pytest.fixture(scope="module")
def found(planted):
    with Float64():
        return find_direction(planted, TRAIN, VAL, screen=None)


# the planted model

def test_the_planted_direction_is_found(planted, found):
    direction, scores = found
    r, q = planted_directions().double()
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
    again, scores_again = find_direction(
        planted, sides(HARMFUL + HARMLESS[:9], HARMLESS + HARMFUL[:9]),
        sides(HARMFUL_VAL + HARMLESS_VAL, HARMLESS_VAL + HARMFUL_VAL), screen=None)
    assert_same(again.vector, direction.vector)
    assert_same(scores_again.bypass, scores.bypass)


def test_a_model_that_never_refuses(planted):
    with pytest.raises(ValueError, match="refuses none of the 24 harmful prompts .* set model.refusal_tokens"):
        find_direction(planted, sides(HARMLESS, HARMLESS), VAL)
    with pytest.raises(ValueError, match="answers none of the 6 harmless prompts"):
        find_direction(planted, TRAIN, sides(HARMFUL_VAL, HARMFUL_VAL))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("empty", range(4))
def test_no_prompts(planted, strict, empty):
    prompts = [HARMFUL, HARMLESS, HARMFUL_VAL, HARMLESS_VAL]
    prompts[empty] = []
    with pytest.raises(ValueError, match="The list of instructions is empty: give at least one"):
        find_direction(planted, sides(*prompts[:2]), sides(*prompts[2:]), strict=strict)


def test_not_strict_it_goes_on_with_all_prompts_and_says_so_in_one_line(planted, capsys):
    """None of the harmful ones is refused: they are kept, and what is found is the difference of these sides."""
    direction, scores = find_direction(planted, sides(HARMLESS[:12], HARMLESS[12:]), sides(HARMLESS_VAL, HARMLESS_VAL),
                                       strict=False)
    out = capsys.readouterr().out
    assert out.startswith("The model refuses none of the 12 harmful prompts") and out.count("\n") == 1
    assert out.endswith("; until then the figures to come show the steps, and are no finding.\n")
    assert not scores.passing().any()
    streams = [residual_stream(planted, prompts)[:, direction.layer, direction.position]
               for prompts in (HARMLESS[:12], HARMLESS[12:])]
    assert_same(direction.vector, streams[0].mean(dim=0) - streams[1].mean(dim=0))


def test_not_strict_it_goes_on_where_no_candidate_passes(llama, capsys):
    """Random weights: by their most likely tokens they refuse all, or nothing."""
    train, val = sides(["steal", "steal a car"], ["bake", "a cake"]), sides(["a car"], ["bake a cake"])
    with pytest.raises(ValueError):
        find_direction(llama, train, val)
    direction, scores = find_direction(llama, train, val, strict=False)
    assert capsys.readouterr().out.count("no finding") == 1
    place = direction.layer, llama.positions.index(direction.position)
    assert place == lowest_bypass(scores)
    assert direction.vector.norm() > 0.01


@pytest.mark.parametrize("screen", [5, 12, 1000])
def test_the_screen_finds_what_the_sweep_finds(planted, found, screen):
    direction, scores = find_direction(planted, TRAIN, VAL, screen=screen)
    wanted, every = found
    assert (direction.layer, direction.position) == (wanted.layer, wanted.position)
    assert torch.equal(direction.vector, wanted.vector)
    n_scored = (~scores.bypass[1:].isnan()).sum()  # layer 0 has no candidates
    assert 0 < n_scored <= screen and n_scored <= 2 * AT_A_TIME
    for name in ("bypass", "induce", "kl"):
        measured, exact = getattr(scores, name), getattr(every, name)
        assert_same(measured[~measured.isnan()], exact[~measured.isnan()])


def test_a_heat_ranks_by_bypass_on_its_prompts(planted, found):
    candidates = randn(planted.n_layers, len(planted.positions), planted.d_model)
    places = [(1, 0), (4, 2), (2, 1), (3, 3)]
    exact = {place: refusal_when_ablated(planted, candidates[place], HARMFUL_VAL).mean().item() for place in places}
    for batch_size in (5, 64):
        order = heat(planted, candidates, HARMFUL_VAL, places, batch_size)
        assert order == sorted(places, key=exact.get) and len(set(exact.values())) == 4
    assert heat(planted, candidates, HARMFUL_VAL, []) == []


@given(st.integers(0, 40), st.integers(1, 20))
def test_spread_takes_prompts_from_everywhere(n_prompts, n):
    drawn = spread(range(n_prompts), n)
    assert len(drawn) == min(n, n_prompts) and drawn == sorted(set(drawn))
    assert not drawn or max(b - a for a, b in zip(drawn, [*drawn[1:], n_prompts])) <= -(-n_prompts // len(drawn))


def test_where_the_first_group_fails_the_next_is_scored(planted, monkeypatch, found):
    """Whatever passes is found, be it the last of all finalists."""
    [first, last] = found[0].layer, planted.positions.index(found[0].position)
    passing = CandidateScores.passing
    monkeypatch.setattr("utils.candidates.heat", lambda model, candidates, prompts, finalists, batch_size: sorted(
        finalists, key=lambda place: place == (first, last)))  # the one that is wanted comes last

    def only_the_last(scores, *limits):
        allowed = torch.zeros_like(scores.bypass, dtype=torch.bool)
        allowed[first, last] = True
        return passing(scores, *limits) & allowed
    monkeypatch.setattr(CandidateScores, "passing", only_the_last)
    direction, scores = find_direction(planted, TRAIN, VAL, screen=12)
    assert (direction.layer, direction.position) == (found[0].layer, found[0].position)
    assert (~scores.bypass[1:].isnan()).sum() == 12


def test_the_screen_stops_at_the_candidate_that_is_chosen(planted, found):
    direction, scores = find_direction(planted, TRAIN, VAL, screen=1000)
    at = direction.layer, planted.positions.index(direction.position)
    untried = scores.induce.isnan() & ~scores.bypass.isnan()
    assert untried.any() and (scores.bypass[untried] >= scores.bypass[at]).all()


def test_where_no_finalist_passes_the_sentence_counts_those_that_were_scored(planted, monkeypatch, capsys):
    filters = CandidateScores.filters
    monkeypatch.setattr(CandidateScores, "filters", lambda scores, *limits: filters(scores, max_kl=0.0))
    direction, scores = find_direction(planted, TRAIN, VAL, screen=3, strict=False)
    said = capsys.readouterr().out
    assert "kl < 0 removes most, 8 of 8 (" in said  # three finalists, and the five at layer 0, which change nothing
    at = direction.layer, planted.positions.index(direction.position)
    assert at == lowest_bypass(scores) and not scores.bypass[at].isnan()


@pytest.mark.parametrize("train", [HARMFUL, {"harmful": HARMFUL}, None])
def test_sides_that_are_missing(planted, train):
    with pytest.raises(ValueError, match="train is a dict of two lists, .*: give both"):
        find_direction(planted, train, VAL)
    with pytest.raises(ValueError, match="val is a dict of two lists"):
        find_direction(planted, TRAIN, train)


def test_no_finalists(planted):
    with pytest.raises(ValueError, match="0 finalists cannot be scored: give at least 1, or None"):
        find_direction(planted, TRAIN, VAL, screen=0)


@pytest.mark.parametrize("batch_size", [5, 64])
@pytest.mark.parametrize("refused", [True, False])
def test_the_mean_of_those_kept_is_that_of_their_streams(planted, refused, batch_size):
    mixed = HARMFUL[:7] + HARMLESS[:4]
    kept, logits = kept_prompts(planted, mixed, refused, batch_size)
    assert_same(logits, last_logits(planted, kept))
    assert kept == (HARMFUL[:7] if refused else HARMLESS[:4])
    mean, n_kept = mean_of_kept(planted, mixed, refused, batch_size)
    assert n_kept == len(kept)
    assert_same(mean, residual_stream(planted, kept).mean(dim=0))


def test_not_strict_a_direction_that_is_there_is_found_all_the_same(planted, found, capsys):
    direction, _ = find_direction(planted, TRAIN, VAL, screen=None, strict=False)
    assert torch.equal(direction.vector, found[0].vector)
    assert capsys.readouterr().out == ""


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
    with pytest.raises(ValueError, match="None of the model's 10 layers has a candidate .*: take a deeper model"):
        lowest_bypass(scores, max_layer=0.1)


# the difference in means and directions

activations = st.tuples(st.integers(1, 5), st.integers(0, 10**6)).map(
    lambda drawn: randn(drawn[0], 3, 2, 4, seed=drawn[1]))


@given(activations, activations)
def test_difference_in_means_is_that_of_the_means(harmful, harmless):
    difference = difference_in_means(harmful, harmless)
    for layer in range(3):
        for position in range(2):
            means = [sum(x[layer, position] for x in side) / len(side) for side in (harmful, harmless)]
            assert_same(difference[layer, position], means[0] - means[1])


@given(activations, activations, st.integers(0, 10**6))
def test_difference_in_means_ignores_order_and_what_both_share(harmful, harmless, seed):
    shared = randn(3, 2, 4, seed=seed)
    difference = difference_in_means(harmful, harmless)
    assert_same(difference_in_means(harmful.flip(0) + shared, harmless + shared), difference)
    assert_same(difference_in_means(harmless, harmful), -difference)


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


# one candidate at a time, as the lesson does it

def test_prompts_are_filtered_by_the_sign_of_their_metric():
    prompts, metric = ["a", "b", "c", "d"], torch.tensor([2.0, -1.0, 0.0, 0.1])
    assert filter_prompts(prompts, metric, refused=True) == ["a", "d"]
    assert filter_prompts(prompts, metric, refused=False) == ["b", "c"]


@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_cosines_ignore_lengths(seed, length):
    vectors = randn(5, 8, seed=seed)
    cosines = cosine_similarities(vectors)
    assert_same(cosines.diagonal(), torch.ones(5).double())
    assert_same(cosines, cosines.T)
    assert_same(cosine_similarities(length * vectors), cosines)
    assert_same(cosines[1, 3], F.cosine_similarity(vectors[1], vectors[3], dim=0))


def test_right_angles_and_opposites():
    cosines = cosine_similarities(torch.tensor([[2.0, 0], [0, 5], [-3, 0]]))
    assert cosines.tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]


def test_each_prompt_may_have_its_own_direction(llama):
    prompts, rows = every_pair(["steal", "bake a cake"], randn(3, 32))
    for measure in (refusal_when_ablated, lambda *args: refusal_when_added(*args[:2], 1, args[2])):
        together = measure(llama, rows, prompts)
        alone = torch.cat([measure(llama, row, [prompt]) for prompt, row in zip(prompts, rows)])
        assert_same(together, alone)

def test_the_nearest_miss_fails_the_fewest_filters():
    nan = torch.nan
    scores = CandidateScores(torch.tensor([[-99.0], [-5.0], [-3.0], [-4.0], [-9.0]]),
                             torch.tensor([[1.0], [-2.0], [0.5], [0.5], [1.0]]),
                             torch.tensor([[0.0], [nan], [0.2], [0.3], [0.2]]))
    assert nearest_miss(scores) == (3, 0)  # layer 0 has no candidates, layer 1 fails two, layer 4 is late
