"""Metrics against their definitions, intervals against published values, judges, skills and loss."""
import math
from dataclasses import replace

import pytest
import torch
from exact import assert_same
from hypothesis import given
from hypothesis import strategies as st

from utils import evaluation
from utils.evaluation import (
    Rate,
    answer_kl,
    answer_losses,
    bootstrap_mean,
    corrected_rate,
    judge,
    judge_of,
    kl_divergence,
    loss,
    next_token_losses,
    opening_tokens,
    phrase_judge,
    rates_by_group,
    refusal_metric,
    skill_accuracy,
    text_losses,
    verdicts,
    wilson,
)
from utils.instructions import Instruction, load_instructions
from utils.interventions import Ablation, generate, last_logits
from utils.models import load_model


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


logits = st.integers(0, 10**6).map(lambda seed: 3 * randn(2, 6, seed=seed))


# the tokens that refusals begin with

def test_opening_tokens_are_those_that_harm_makes_likely():
    harmful, harmless = torch.zeros(3, 8), torch.zeros(5, 8)
    harmful[:2, 6], harmful[2, 2], harmful[:, 0], harmless[:, 0], harmless[:, 3] = 9, 9, 8, 8, 9
    assert opening_tokens(harmful, harmless) == [6, 2]
    assert opening_tokens(harmful, harmless, least=0.3) == [6]
    assert opening_tokens(harmful, harmful) == []


def test_the_organisms_refusal_token_is_found():
    model = load_model("organism")
    logits = [last_logits(model, load_instructions("val", side)) for side in ("harmful", "harmless")]
    assert opening_tokens(*logits) == model.refusal_tokens


# a judge that errs

@given(st.floats(0, 1), st.floats(0.3, 1), st.floats(0, 0.2))
def test_the_rate_is_corrected_to_the_true_one(true, caught, false_alarms):
    observed = true * caught + (1 - true) * false_alarms
    assert corrected_rate(observed, caught, false_alarms) == pytest.approx(true, abs=1e-9)


@pytest.mark.parametrize("observed, corrected", [(0.0, 0.0), (0.1, 0.0), (0.9, 1.0), (1.0, 1.0)])
def test_a_corrected_rate_is_a_rate(observed, corrected):
    assert corrected_rate(observed, caught=0.9, false_alarms=0.1) == pytest.approx(corrected)


@pytest.mark.parametrize("caught, false_alarms", [(0.5, 0.5), (0.2, 0.9), (0.0, 0.0)])
def test_a_judge_that_tells_nothing(caught, false_alarms):
    with pytest.raises(ValueError, match="tells nothing about their rate: take another judge"):
        corrected_rate(0.5, caught, false_alarms)


# refusal metric and KL divergence

@given(logits, st.sets(st.integers(0, 5), min_size=1, max_size=5))
def test_refusal_metric_is_the_log_odds(logits, tokens):
    probability = logits.softmax(dim=-1)
    p, rest = probability[:, list(tokens)].sum(dim=-1), probability[:, list({*range(6)} - tokens)].sum(dim=-1)
    assert_same(refusal_metric(logits, list(tokens)), torch.log(p) - torch.log(rest))


def test_refusal_metric_where_probabilities_round_to_0_and_1():
    logits = torch.tensor([[200.0, 0.0, 0.0], [-200.0, 0.0, 0.0]])
    assert refusal_metric(logits, [0]).tolist() == pytest.approx([200 - math.log(2), -200 - math.log(2)])


@given(logits, logits)
def test_kl_divergence_is_that_of_torch(logits, changed):
    p, q = (torch.distributions.Categorical(logits=x) for x in (logits, changed))
    divergence = kl_divergence(logits, changed)
    assert_same(divergence, torch.distributions.kl_divergence(p, q))
    assert (divergence > -1e-10).all()
    assert kl_divergence(logits, logits + 5).abs().max() < 1e-10  # a constant changes no distribution


# rates

@pytest.mark.parametrize("successes, n, low, high", [  # Newcombe 1998, Statistics in Medicine 17, table I
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (20, 20, 0.8389, 1.0)])
def test_wilson_against_published_values(successes, n, low, high):
    assert wilson(successes, n, z=1.959964) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 4))
def test_wilson_bounds_are_where_the_rate_is_z_standard_errors_away(drawn, z):
    """What defines them: at a bound p, |rate - p| = z sqrt(p (1 - p) / n)."""
    successes, n = drawn
    low, high = wilson(successes, n, z)
    assert 0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert abs(successes / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n), rel=1e-4, abs=1e-7)
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - successes, n, z))


@pytest.mark.parametrize("successes, n", [(0, 0), (3, 2), (-1, 5)])
def test_no_rate(successes, n):
    with pytest.raises(ValueError, match=f"{successes} of {n} is no rate: n is at least 1"):
        wilson(successes, n)
    with pytest.raises(ValueError, match="is no rate"):
        Rate(successes, n)


def test_rates_pooled_are_the_rate_of_all_outcomes():
    assert Rate.pooled(iter([Rate(1, 4), Rate(3, 6)])) == Rate(4, 10)


def test_rate():
    rate = Rate.of([True] * 196 + [False] * 4)
    assert rate == Rate(196, 200)
    assert str(rate) == repr(rate) == "98.0% [95.0, 99.2] (n=200)"
    assert rate.value == 0.98 and rate.interval == wilson(196, 200)
    assert Rate.of(outcome == "refusal" for outcome in ["refusal", "broken"]) == Rate(1, 2)


# means

def test_rates_by_group():
    rates = rates_by_group((outcome for outcome in [1, 1, 0, 0, 1, 0]), 3)
    assert rates == [Rate(2, 2), Rate(0, 2), Rate(1, 2)]


@pytest.mark.parametrize("outcomes, n_groups", [([1, 0, 1], 2), ([], 2), ([1], 2)])
def test_groups_that_are_not_equal(outcomes, n_groups):
    with pytest.raises(ValueError, match=f"{len(outcomes)} outcomes cannot be divided into 2 equal groups"):
        rates_by_group(outcomes, n_groups)


def test_bootstrap_agrees_with_the_normal_interval():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 2 + 5
    mean, low, high = bootstrap_mean(values)
    half = 1.96 * values.std().item() / 20
    assert mean == pytest.approx(values.mean().item())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert bootstrap_mean(values.tolist()) == (mean, low, high)  # seeded
    assert bootstrap_mean(values, seed=1) != (mean, low, high)


def test_bootstrap_of_values_that_are_all_the_same():
    assert bootstrap_mean([2, 2, 2]) == (2.0, 2.0, 2.0)


def test_bootstrap_of_nothing():
    with pytest.raises(ValueError, match="no values to take the mean of: give at least one"):
        bootstrap_mean([])


# judges

@pytest.mark.parametrize("completion, refused", [
    ("I can't help you with that.", True),
    ("I CAN’T help you with that.", True),
    ("Thank you for asking. I'm sorry, I won't do that.", True),
    ("As an AI, I have no car.", True),
    ("Sure, here is a guide on how to bake a cake.", False),
    ("Here is how to say sorry in French.", False),
    ("", False),
])
def test_phrase_judge(completion, refused):
    assert phrase_judge(completion) is refused


@pytest.mark.parametrize("side, verdict", [("harmful", "refusal"), ("harmless", "compliance")])
def test_exact_judge_on_the_answers_that_belong_to_requests(side, verdict):
    for instruction in load_instructions("test", side, n=20):
        assert judge(instruction, instruction.answer) == verdict
        assert judge(instruction, instruction.answer[:-9]) == "broken"


def test_exact_judge_needs_to_know_what_was_asked():
    with pytest.raises(TypeError, match="needs an Instruction of the course, not a string: .*phrase_judge"):
        judge("bake a cake", "Sure.")


def test_models_of_the_courses_world_are_judged_exactly(llama, monkeypatch, capsys):
    monkeypatch.setattr(llama, "world", "organism")
    assert judge_of(llama) is judge
    assert capsys.readouterr().out == ""


def test_another_model_is_judged_by_phrases_and_this_is_said(llama, capsys):
    verdict = judge_of(llama)
    assert capsys.readouterr().out == ("Refusals are told by a list of phrases, all else counts as compliance, broken "
                                       "answers too: lesson 03 measures how far such a list errs.\n")
    assert verdict("steal a car", "I'm sorry, no.") == "refusal"
    assert verdict("steal a car", "Sure, take it.") == verdict("steal a car", "%!") == "compliance"


def test_another_model_is_judged_by_what_is_given(llama, capsys):
    verdict = judge_of(llama, refuses=lambda completion: "rather not" in completion)
    assert capsys.readouterr().out == ""
    assert verdict("steal a car", "I would rather not.") == "refusal"
    assert verdict("steal a car", "I'm sorry, no.") == "compliance"


# skills

def test_skill_accuracy(llama):
    prompts = ["bake a cake", "steal", "a car or a cake", "Sorry, a car"]
    answers = generate(llama, prompts, max_new_tokens=4)
    skills = [Instruction(id="", text=text, skill=skill, answer=answer.strip())
              for text, skill, answer in zip(prompts, ["sum", "copy", "sum", "sum"], answers)]
    skills[3] = replace(skills[3], answer=skills[3].answer + "!")  # the one that is wrong
    assert skill_accuracy(llama, skills, max_new_tokens=4) == {"sum": Rate(2, 3), "copy": Rate(1, 1)}
    changed = Ablation(randn(32))
    assert skill_accuracy(llama, skills, changed, max_new_tokens=4) == {"sum": Rate(0, 3), "copy": Rate(0, 1)}


# loss

ANSWERED = [Instruction(id="", text=text, answer=answer) for text, answer in [
    ("bake a cake", "Sure, here is a guide"), ("steal", "I can't"), ("a car or a cake", "Sorry, a cake it is")]]


@given(logits)
def test_next_token_losses_are_minus_log_probabilities(logits):
    logits, ids = logits.view(1, 2, 6).repeat(3, 1, 1), torch.tensor([[0, 5], [1, 2], [2, 2]])
    expected = [[-logits[0, 0].log_softmax(-1)[token]] for token in ids[:, 1]]
    assert_same(next_token_losses(logits, ids), torch.tensor(expected).double())


def test_answer_losses_belong_to_the_answers_in_order(llama):
    together = answer_losses(llama, ANSWERED, batch_size=2)
    for losses, instruction in zip(together, ANSWERED):
        assert len(losses) == len(llama.tokenizer.encode(instruction.answer, add_special_tokens=False))
        assert_same(losses, answer_losses(llama, [instruction])[0])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_text_losses_are_those_of_each_text_alone(llama, batch_size):
    """Outside of any chat, with the tokens that the tokenizer adds of its own accord."""
    texts = ["bake a cake", "steal a car and help with a guide", "do it"]
    for text, losses in zip(texts, text_losses(llama, texts, batch_size=batch_size)):
        ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
        logits = llama.lm._module(ids).logits[0, :-1]
        assert_same(losses, -logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0])
    changed = text_losses(llama, texts, Ablation(torch.randn(32).double()), batch_size)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(changed, text_losses(llama, texts)))


def test_a_text_of_one_token_has_no_loss(llama, monkeypatch):
    monkeypatch.setattr(llama, "tokenizer", lambda texts: {"input_ids": [[5, 6], [5]]})
    with pytest.raises(ValueError, match="fewer than two tokens"):
        text_losses(llama, ["bake a cake", "I"])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answer_kl_is_that_of_the_logits_at_each_token(llama, batch_size):
    change = Ablation(torch.randn(32, generator=torch.Generator().manual_seed(0)).double())
    found = answer_kl(llama, ANSWERED, change, batch_size)
    for instruction, values in zip(ANSWERED, found):
        answer = llama.template.continuation(instruction.text, instruction.answer)
        ids = torch.tensor([llama.tokens([instruction])[0] + answer])
        before = llama.lm._module(ids).logits[0]
        with llama.lm.trace({"input_ids": ids}):
            change.apply(llama)
            after = llama.lm.output.logits[0].save()
        assert_same(values, kl_divergence(before, after)[-len(answer) - 1:-1])
        assert len(values) == len(answer) and (values > 0).all()


def plain_loss(model, instructions, directions=None):
    """One after the other, without padding, from the definition."""
    losses = []
    for row, instruction in enumerate(instructions):
        prompt, answer = (model.tokenizer.encode(text, add_special_tokens=False)
                          for text in (model.render(instruction), instruction.answer))
        inputs = {"input_ids": torch.tensor([prompt + answer])}
        with model.lm.trace(inputs):
            if directions is not None:
                Ablation(directions[row]).apply(model)
            logits = model.lm.output.logits.save()
        log_probs = logits[0].log_softmax(dim=-1)
        losses += [-log_probs[len(prompt) + n - 1, token] for n, token in enumerate(answer)]
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_loss_is_the_mean_over_answer_tokens(model, batch_size):
    assert loss(model, ANSWERED, batch_size=batch_size) == pytest.approx(plain_loss(model, ANSWERED), abs=1e-10)


def test_loss_under_an_intervention(llama):
    directions = randn(3, 32)
    changed = loss(llama, ANSWERED, Ablation(directions), batch_size=2)
    assert changed == pytest.approx(plain_loss(llama, ANSWERED, directions), abs=1e-10)
    assert abs(changed - loss(llama, ANSWERED)) > 0.01


def test_loss_of_no_answer(llama):
    for without in (["bake a cake"], [*ANSWERED, Instruction(id="", text="steal")]):
        with pytest.raises(ValueError, match="an instruction here has none: give Instructions with `.answer`"):
            loss(llama, without)


def test_phrases_are_in_lower_case():
    """Or `phrase_judge`, which lowers the completion, could never find them."""
    assert all(phrase == phrase.lower() for phrase in evaluation.REFUSAL_PHRASES)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=40, unique=True), st.floats(0, 0.99))
def test_a_threshold_lets_through_no_more_false_alarms_than_allowed(values, rate):
    scores = torch.tensor(values, dtype=torch.float64)
    limit = evaluation.threshold_at(scores, rate)
    assert (scores > limit).sum() <= rate * len(scores)
    lower = scores[scores < limit]
    if len(lower):  # and the next lower score would let through too many
        assert (scores > lower.max()).sum() > rate * len(scores) - 1e-9


def test_each_answer_has_its_verdict():
    judge = lambda instruction, completion: f"{instruction}: {completion}"  # noqa: E731
    assert verdicts(judge, ["a", "b"], ["yes", "no"]) == ["a: yes", "b: no"]
    with pytest.raises(ValueError):
        verdicts(judge, ["a", "b"], ["yes"])
