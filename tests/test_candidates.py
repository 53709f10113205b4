"""Exact scores by the definitions, first-order estimates by their derivatives, beginnings that are read once."""
import pytest
import torch
from exact import assert_same
from plain_hooks import plain_logits
from planted_model import planted_prompts, save_planted
from tiny_models import TEMPLATE, save_tiny

from utils import candidates as candidates_module
from utils.activations import mean_residual_stream, residual_stream
from utils.candidates import (
    SCORES,
    CandidateScores,
    Scorer,
    SharedStart,
    first_order,
    first_order_ablation,
    refusal_gradients,
    score_candidates,
    screen,
    shared_beginning,
    tokens_read,
)
from utils.directions import difference_in_means, mean_of_kept, refusal_when_ablated, refusal_when_added
from utils.evaluation import kl_divergence, refusal_metric
from utils.interventions import Ablation, Addition, ablate, last_logits
from utils.models import load_model

HARMFUL, HARMLESS = ["steal", "steal a car", "a car, a cake"], ["bake a cake", "Sorry, a cake"]
PROMPTS = ["bake a cake", "steal", "I can't help with a car or a cake", "Sorry, a car"]
pytestmark = pytest.mark.usefixtures("exact")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return load_model(save_planted(tmp_path_factory.mktemp("planted")), dtype=torch.float64)


# exact scores

def test_scores_are_those_of_one_candidate_at_a_time(llama):
    """By the definitions, prompt by prompt, on a random model; batch sizes do not matter."""
    harmful, harmless = ["steal", "steal a car", "a car, a cake"], ["bake a cake", "Sorry, a cake"]
    candidates = 3 * randn(4, 5, 32)
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
        assert_same(scored, expected)

    assert scores.kl[1, 2] == 0
    assert_same(scores.bypass[1, 2], refusal_metric(logits(harmful, None), llama.refusal_tokens).mean())
    assert_same(scores.induce[1, 2], refusal_metric(logits(harmless, None), llama.refusal_tokens).mean())


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_candidates_of_a_model_that_overflows(llama, bad):
    candidates = torch.ones(4, 5, 32)
    candidates[3, 2, 1] = bad
    with pytest.raises(ValueError, match="nan or infinity: .* overflows in torch.float64. Load it with dtype"):
        score_candidates(llama, candidates, ["steal"], ["bake a cake"])


def test_scores_are_the_means_over_prompts(llama):
    harmful, harmless = ["steal", "steal a car", "a car, a cake"], ["bake a cake", "Sorry, a cake"]
    candidates = 3 * randn(4, 5, 32)
    scores = score_candidates(llama, candidates, harmful, harmless)
    bypass = refusal_when_ablated(llama, candidates[2, 1], harmful)
    induce = refusal_when_added(llama, candidates[2, 1], 2, harmless)
    assert bypass.shape == (3,) and induce.shape == (2,)
    assert_same(bypass.mean(), scores.bypass[2, 1])
    assert_same(induce.mean(), scores.induce[2, 1])


def test_tokens_read_are_those_that_the_model_reads(planted, monkeypatch):
    """Prompts read whole: these are all the same one, so that none is padded."""
    monkeypatch.setattr(candidates_module, "WORTH_SHARING", 10**6)
    n_read = []
    handle = planted.lm._module.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: n_read.append(inputs[0].numel()))
    [harmful], [harmless] = planted_prompts("#", 1), planted_prompts("+", 1)
    means = []
    for prompt in (harmful, harmless):
        last_logits(planted, 24 * [prompt]), last_logits(planted, 6 * [prompt])  # is it refused?
        means.append(mean_residual_stream(planted, 24 * [prompt]))
    score_candidates(planted, means[0] - means[1], 6 * [harmful], 6 * [harmless])
    handle.remove()
    [n_tokens] = {len(ids) for ids in planted.tokens([harmful, harmless])}
    n_candidates = (planted.n_layers - 1) * len(planted.positions)
    assert sum(n_read) == tokens_read(n_tokens, n_candidates, n_train=24, n_val=6)


# work that was begun goes on

def test_scores_are_kept_one_by_one_and_found_again(llama, tmp_path, monkeypatch):
    candidates, file = 3 * randn(4, 5, 32), tmp_path / "scores.safetensors"
    whole = score_candidates(llama, candidates, HARMFUL, HARMLESS)
    measure, n_measured = Scorer.measure, []

    def breaks_off(scorer, *place):
        n_measured.append(place)
        if len(n_measured) == 8:
            raise KeyboardInterrupt
        return measure(scorer, *place)

    monkeypatch.setattr(Scorer, "measure", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        score_candidates(llama, candidates, HARMFUL, HARMLESS, file=file)
    monkeypatch.setattr(Scorer, "measure", measure)
    scorer = Scorer(llama, candidates, HARMFUL, HARMLESS, file=file)
    assert sum(int((~values.isnan().all(dim=-1)).sum()) for values in scorer.values.values()) == 7
    n_read = []
    handle = llama.lm._module.model.embed_tokens.register_forward_hook(lambda *args: n_read.append(1))
    again = score_candidates(llama, candidates, HARMFUL, HARMLESS, file=file)
    handle.remove()
    assert len(n_read) == 3 * 20 - 7 + 1  # what was left, and the unchanged model
    for name in SCORES:
        assert_same(getattr(again, name), getattr(whole, name))
    assert not list(tmp_path.glob("*.part"))


def test_a_file_in_a_folder_that_is_not_there_yet(llama, tmp_path):
    file = tmp_path / "new" / "scores.safetensors"
    Scorer(llama, 3 * randn(4, 5, 32), HARMFUL, HARMLESS, file=file).measure("bypass", 1, 2)
    assert file.is_file()


@pytest.mark.parametrize("change", ["harmful", "harmless", "candidates", "tokens", "weights"])
def test_scores_of_another_search_are_not_taken(llama, tmp_path, monkeypatch, change):
    candidates, file = 3 * randn(4, 5, 32), tmp_path / "scores.safetensors"
    Scorer(llama, candidates, HARMFUL, HARMLESS, file=file).measure("bypass", 1, 2)
    before = file.read_bytes()
    other = {"harmful": HARMFUL, "harmless": HARMLESS, "candidates": candidates}
    if change == "tokens":
        monkeypatch.setattr(llama, "refusal_tokens", [7])
    elif change == "weights":  # the last ones: the candidates stay as they are
        norm = llama.lm.model.norm._module
        monkeypatch.setitem(norm._parameters, "weight", torch.nn.Parameter(norm.weight * 1.5, requires_grad=False))
    else:
        other[change] = 3 * randn(4, 5, 32, seed=1) if change == "candidates" else ["bake", "a car"]
    with pytest.raises(ValueError, match="holds the scores of another search .*: name another file, or delete"):
        Scorer(llama, other["candidates"], other["harmful"], other["harmless"], file=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"no scores", bytes(100)])
def test_a_file_that_holds_no_scores(llama, tmp_path, content):
    (tmp_path / "scores.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="holds no scores .*: delete it to begin anew"):
        Scorer(llama, 3 * randn(4, 5, 32), HARMFUL, HARMLESS, file=tmp_path / "scores.safetensors")


# beginnings that all prompts share

SYSTEM = "You are a helpful assistant, and bake cakes. Help with a guide."
LONG = TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}" + SYSTEM)
CHANGES = {"none": None, "erase": Ablation(randn(32)), "add": Addition(randn(32), 2, -1.5)}


@pytest.fixture(scope="module", params=["llama", "gemma", "gpt_neox", "phi3"])
def long_template(request, tmp_path_factory):
    return load_model(save_tiny(tmp_path_factory.mktemp("long"), request.param, template=LONG), dtype=torch.float64)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_a_beginning_that_is_read_once_changes_nothing(long_template, change, batch_size):
    """Prompts of unequal length, so that padding stands between the beginning and the rest."""
    start = SharedStart(long_template, PROMPTS, batch_size)
    assert start.n_shared > 30
    n_read = []
    handle = long_template.lm._module.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: n_read.append(inputs[0].numel()))
    logits = start.last_logits(change)
    handle.remove()
    assert sum(n_read) < 0.6 * sum(map(len, start.tokens))
    whole = last_logits(long_template, PROMPTS, change, batch_size)
    assert_same(logits, whole)
    assert change is None or (logits - last_logits(long_template, PROMPTS)).abs().max() > 0.05


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_where_a_window_slides_prompts_are_read_whole(tmp_path, architecture):
    model = load_model(save_tiny(tmp_path, architecture, template=LONG), dtype=torch.float64)
    assert_same(SharedStart(model, PROMPTS).last_logits(Ablation(randn(32))),
                plain_logits(model, PROMPTS, ablate=randn(32).expand(4, 32)))


@pytest.mark.parametrize("prompts", [["bake a cake"], ["bake a cake"] * 3])
def test_prompts_that_are_all_alike_keep_their_post_instruction_tokens(long_template, prompts):
    start = SharedStart(long_template, prompts)
    assert start.n_shared == len(start.tokens[0]) - len(long_template.positions)
    mean, n_kept = mean_of_kept(long_template, prompts, refused=True)
    torch.testing.assert_close(mean, residual_stream(long_template, prompts).mean(dim=0), rtol=1e-4, atol=1e-3)


def test_where_nothing_can_be_shared_it_is_not_tried_again(tmp_path):
    start = SharedStart(load_model(save_tiny(tmp_path, "mistral", template=LONG), dtype=torch.float64), PROMPTS)
    assert start.n_shared > 0
    list(start.batches())
    assert start.n_shared == 0


def test_the_beginning_ends_before_the_last_token_of_the_shortest():
    assert shared_beginning([[1, 2, 3, 4], [1, 2, 5, 4]]) == 2
    assert shared_beginning([[1, 2, 3], [1, 2, 3, 4]]) == 2
    assert shared_beginning([[1, 2, 3]]) == shared_beginning([[1, 2, 3], [1, 2, 3]]) == 2
    assert shared_beginning([[1], [2]]) == 0


# first order

def test_writes_add_up_to_the_streams_and_gradients_are_those_of_the_metric(model):
    [(metric, stream_gradients, writes, write_gradients)] = refusal_gradients(model, PROMPTS)
    order = sorted(range(4), key=lambda row: len(model.tokens(PROMPTS)[row]))
    logits = last_logits(model, [PROMPTS[row] for row in order])
    assert_same(metric, refusal_metric(logits, model.refusal_tokens))
    assert len(stream_gradients) == 4 and len(writes) == len(write_gradients) == 9
    # A small step along the first layer's gradient changes the metric by the gradient's squared length.
    step = 1e-5 / stream_gradients[2][:, -1].norm(dim=-1)
    nudge = step[:, None] * stream_gradients[2][:, -1]
    moved = [last_logits(model, [PROMPTS[row] for row in order], Nudge(2, sign * nudge)) for sign in (1, -1)]
    up, down = (refusal_metric(x, model.refusal_tokens) for x in moved)
    slope = (up - down) / (2 * step)
    torch.testing.assert_close(slope, stream_gradients[2][:, -1].square().sum(dim=-1), rtol=1e-5, atol=0)


class Nudge:
    """Add a vector to the last token of one layer's input."""

    def __init__(self, layer, vectors):
        self.layer, self.direction = layer, vectors

    def apply(self, model):
        stream = model.layers[self.layer].input.clone()
        stream[:, -1] += self.direction
        model.layers[self.layer].input = stream


def test_the_estimate_is_the_derivative_of_ablation(llama):
    """By what the metric changes if a millionth of each write's shadow is erased, times a million."""
    direction, rate = randn(32), 1e-6
    [(metric, _, writes, gradients)] = refusal_gradients(llama, PROMPTS)
    order = sorted(range(4), key=lambda row: len(llama.tokens(PROMPTS)[row]))
    prompts = [PROMPTS[row] for row in order]
    changed = refusal_metric(last_logits(llama, prompts, Partly(direction, rate)), llama.refusal_tokens)
    estimate = first_order_ablation(writes, gradients, direction)
    torch.testing.assert_close((changed - metric) / rate, estimate, rtol=1e-4, atol=0)
    assert estimate.abs().max() > 0.3


class Partly:
    """Erase a share of all that is written along a direction, at the first layer's input and where layers write."""

    def __init__(self, direction, share):
        self.direction, self.share = direction, share

    def apply(self, model):
        def part(x):
            return (1 - self.share) * x + self.share * ablate(x, self.direction)

        model.layers[0].input = part(model.layers[0].input)
        for layer in model.layers:
            for module in model.writers(layer):
                out = module.output
                module.output = (part(out[0]), *out[1:]) if isinstance(out, tuple) else part(out)


def test_many_directions_are_estimated_as_one_by_one(llama):
    [(_, _, writes, gradients)] = refusal_gradients(llama, PROMPTS)
    directions = 3 * randn(5, 32)
    together = first_order_ablation(writes, gradients, directions)
    assert together.shape == (4, 5)
    for column, direction in zip(together.T, directions):
        assert_same(column, first_order_ablation(writes, gradients, direction))


def test_estimates_of_a_model_in_half_precision(tmp_path):
    folder = save_tiny(tmp_path)
    half, whole = load_model(folder, dtype=torch.bfloat16), load_model(folder, dtype=torch.float64)
    rough, estimates = (first_order(model, randn(4, 5, 32), HARMFUL, HARMLESS) for model in (half, whole))
    for name in ("bypass", "induce"):
        both = torch.stack([getattr(rough, name).double().flatten(), getattr(estimates, name).flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9


@pytest.mark.parametrize("batch_size", [1, 3])
def test_estimates_are_exact_for_changes_that_are_small(llama, batch_size):
    """Induce of a short candidate; and bypass of a candidate of length zero, which changes nothing."""
    candidates = 1e-6 * randn(4, 5, 32)
    candidates[1, 1] = 0
    estimates = first_order(llama, candidates, HARMFUL, HARMLESS, batch_size)
    exact = score_candidates(llama, candidates, HARMFUL, HARMLESS)
    unchanged = exact.induce[1, 1]
    torch.testing.assert_close(estimates.induce - unchanged, exact.induce - unchanged, rtol=1e-4, atol=1e-9)
    assert_same(estimates.bypass[1, 1], exact.bypass[1, 1])
    assert estimates.kl.isnan().all()


def test_no_gradient_is_left_behind(llama):
    list(refusal_gradients(llama, PROMPTS))
    with llama.lm.trace(llama.encode(PROMPTS), use_cache=False):
        logits = llama.lm.output.logits.save()
    assert not logits.requires_grad and all(weight.grad is None for weight in llama.lm._module.parameters())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_are_had_where_they_are_turned_off(llama, off):
    [(metric, _, writes, gradients)] = refusal_gradients(llama, PROMPTS)
    with off():
        [(again, _, writes_again, gradients_again)] = refusal_gradients(llama, PROMPTS)
        assert not torch.is_grad_enabled()
    assert_same(again, metric)
    for one, other in zip([*writes, *gradients], [*writes_again, *gradients_again]):
        assert_same(other, one)


def test_the_screen_takes_the_lowest_estimates_of_those_that_may_induce():
    bypass, induce, real = torch.zeros(10, 2), torch.ones(10, 2), torch.ones(10, 2, dtype=torch.bool)
    for place, value in {(3, 1): -3, (2, 0): -5, (4, 0): -4, (9, 0): -9, (0, 0): -8}.items():
        bypass[place] = value
    induce[2, 0] = -1
    real[0] = False
    estimates = CandidateScores(bypass, induce, torch.full((10, 2), torch.nan))
    assert screen(estimates, real, 2) == [(4, 0), (3, 1)]  # layer 9 is late; (2, 0) does not induce
    assert screen(estimates, real, 1000)[-1] == (2, 0) and len(screen(estimates, real, 1000)) == 14
