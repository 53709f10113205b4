"""Checks of the exercises on judges, rates and losses."""
import math

import torch
import torch.nn.functional as F

from utils import evaluation
from utils.checks import randn, register

register(
    evaluation.refusal_metric,
    cases=lambda: [(2 * randn(4, 12), [3, 7]), (60 * F.one_hot(torch.tensor([3, 7, 1]), 12).float(), [3, 7])],
    axes="[n_prompts]",
    mistakes={
        "this is log P alone. Subtract log(1 - P).":
            lambda logits, tokens: logits.log_softmax(dim=-1)[:, tokens].logsumexp(dim=-1),
        "the sign is flipped: the metric is positive where a refusal is likely.":
            lambda logits, tokens: -evaluation.refusal_metric(logits, tokens),
        "this is the probability P. The metric is log P - log(1 - P).":
            lambda logits, tokens: logits.softmax(dim=-1)[:, tokens].sum(dim=-1),
        "P is the sum of the refusal tokens' probabilities. You summed over their logarithms.":
            lambda logits, tokens: torch.logit(logits.log_softmax(dim=-1)[:, tokens].sum(dim=-1).exp()),
        "you averaged over the prompts already. Keep one number for each.":
            lambda logits, tokens: evaluation.refusal_metric(logits, tokens).mean(),
        "right, until P rounds to 1 and log(1 - P) becomes infinite. Take the logsumexp of the refusal tokens' logits "
        "minus the logsumexp of all the others.":
            lambda logits, tokens: torch.logit(logits.softmax(dim=-1)[:, tokens].sum(dim=-1)),
    },
)

def openings():
    """Logits of two sides: 3 opens most refusals, 1 and 4 some; 5 opens all else, and 0 is common to both."""
    harmful = torch.tensor([[4, 0, 0, 6, 0, 0], [8, 9, 0, 0, 0, 0], [4, 0, 0, 6, 0, 0], [4, -9, 2, 6, 5, 0.0]])
    harmless = torch.tensor([[4, 0, 0, 0, 0, 6], [4, 0, 0, 0, 0, 6], [8, -5, -9, -9, 0, 9.0]])
    return harmful, harmless


def opening(more, least=0.05, ascending=False):
    """`opening_tokens` by another measure: `more(harmful, harmless)` -> [vocab]."""
    def opening_tokens(harmful, harmless, least=least):
        values = more(harmful, harmless)
        order = values.argsort(descending=not ascending)
        return order[values[order] > least].tolist()
    return opening_tokens


def mean_probability(logits):
    return logits.softmax(dim=-1).mean(dim=0)


register(
    evaluation.opening_tokens,
    cases=lambda: [openings(), (*openings(), 0.4)],
    mistakes={
        "these are the likely openings on harmful prompts. Subtract how likely they are on harmless ones.":
            opening(lambda harmful, harmless: mean_probability(harmful)),
        "these are the openings of answers to harmless prompts. Subtract the other way round.":
            opening(lambda harmful, harmless: mean_probability(harmless) - mean_probability(harmful)),
        "you compared logits. Probabilities first: softmax over the vocabulary, then the mean over the prompts.":
            opening(lambda harmful, harmless: harmful.mean(dim=0) - harmless.mean(dim=0)),
        "you took the mean over the prompts first. Softmax comes first, prompt by prompt.":
            opening(lambda harmful, harmless: harmful.mean(dim=0).softmax(-1) - harmless.mean(dim=0).softmax(-1)),
        "tokens that are likelier on harmless prompts count too in your answer. Take the difference without abs.":
            opening(lambda harmful, harmless: (mean_probability(harmful) - mean_probability(harmless)).abs()),
        "the order and the mask do not go together. Sort first, and compare in that order: order[more[order] > least].":
            lambda harmful, harmless, least=0.05: (
                more := mean_probability(harmful) - mean_probability(harmless)
            ).argsort(descending=True)[more > least].tolist(),
        "the most telling token stands last. Sort with descending=True.":
            opening(lambda harmful, harmless: mean_probability(harmful) - mean_probability(harmless), ascending=True),
        "these are in the order of their ids. Sort them by how much likelier they are.":
            lambda *args: sorted(evaluation.opening_tokens(*args)),
        "the limit is fixed at 0.05. Use `least`.":
            lambda harmful, harmless, *least: evaluation.opening_tokens(harmful, harmless),
    },
)

register(
    evaluation.corrected_rate,
    cases=lambda: [(0.5, 0.8, 0.1), (0.3, 0.9, 0.2), (0.02, 0.8, 0.1), (0.95, 0.8, 0.1)],
    mistakes={
        "you did not subtract the false alarms from what was observed.":
            lambda observed, caught, false_alarms: min(1.0, observed / caught),
        "you divided by the share caught. Divide by how much it exceeds the share of false alarms.":
            lambda observed, caught, false_alarms: min(1.0, max(0.0, (observed - false_alarms) / caught)),
        "subtract the false alarms below the line too: caught - false_alarms.":
            lambda observed, caught, false_alarms: max(0.0, (observed - false_alarms) / (caught + false_alarms)),
        "the false alarms are to be subtracted above the line too: observed - false_alarms.":
            lambda observed, caught, false_alarms: min(1.0, observed / (caught - false_alarms)),
        "this is what the judge would say of a true rate. Solve for the true one.":
            lambda observed, caught, false_alarms: observed * caught + (1 - observed) * false_alarms,
        "this can lie below 0 or above 1, and a share cannot. Cut it off there.":
            lambda observed, caught, false_alarms: (observed - false_alarms) / (caught - false_alarms),
    },
)

register(
    evaluation.kl_divergence,
    cases=lambda: [(randn(4, 12), 2 * randn(4, 12, seed=1))],
    axes="[n_prompts]",
    mistakes={
        "P and Q are swapped: KL(P || Q) weighs by P, the distribution without the change.":
            lambda logits, changed: evaluation.kl_divergence(changed, logits),
        "the sign is flipped: KL = sum of P (log P - log Q), never negative.":
            lambda logits, changed: -evaluation.kl_divergence(logits, changed),
        "the differences log P - log Q are not weighed by P.":
            lambda logits, changed: (logits.log_softmax(dim=-1) - changed.log_softmax(dim=-1)).sum(dim=-1),
        "you took logits for log-probabilities: apply log_softmax to both first.":
            lambda logits, changed: (logits.softmax(dim=-1) * (logits - changed)).sum(dim=-1),
        "you added up over the prompts. Keep one number for each: sum over the vocabulary, dim=-1.":
            lambda logits, changed: evaluation.kl_divergence(logits, changed).sum(),
        "you averaged over the prompts already. Keep one number for each.":
            lambda logits, changed: evaluation.kl_divergence(logits, changed).mean(),
    },
)


def undivided(successes, n, z=1.96):
    """Wilson's interval without its denominator."""
    return tuple(bound * (1 + z**2 / n) for bound in evaluation.wilson(successes, n, z))


def wald(successes, n, z=1.96):
    """The textbook interval, which has width zero where all succeed or none."""
    half = z * math.sqrt(successes / n * (1 - successes / n) / n)
    return successes / n - half, successes / n + half


register(
    evaluation.wilson,
    cases=lambda: [(95, 100), (20, 20), (3, 10, 1.0)],
    mistakes={
        "this is p ± z sqrt(p (1 - p) / n), which has width zero where all succeed. Wilson's centre is pulled towards "
        "1/2, and z² / 4n² stands under the root.":
            wald,
        "what stands before and behind the ± is to be divided by 1 + z² / n.":
            undivided,
        "you returned (centre, half of the width). Return (low, high).":
            lambda *args: (sum(evaluation.wilson(*args)) / 2,
                           (evaluation.wilson(*args)[1] - evaluation.wilson(*args)[0]) / 2),
        "your bounds are in the order (high, low). Return (low, high).":
            lambda *args: evaluation.wilson(*args)[::-1],
        "your bounds are per cent. Return them between 0 and 1.":
            lambda *args: tuple(100 * bound for bound in evaluation.wilson(*args)),
        "z is fixed at 1.96. Use the argument.":
            lambda successes, n, z=1.96: evaluation.wilson(successes, n),
    },
)


def grouped(bounds):
    """`rates_by_group` with other groups: `bounds(n, n_groups)` gives a slice for each."""
    return lambda outcomes, n_groups: [evaluation.Rate.of(outcomes[some]) for some in bounds(len(outcomes), n_groups)]


register(
    evaluation.rates_by_group,
    cases=lambda: [([True, True, True, False, True, False], 2),
                   ([True, False, False, False, True, True, True, True, True, False, True, False], 4)],
    mistakes={
        "you took every n-th outcome. The first group comes first, as a whole, then the second.":
            grouped(lambda n, n_groups: [slice(start, None, n_groups) for start in range(n_groups)]),
        "n_groups is how many groups there are, not how large they are.":
            grouped(lambda n, n_groups: [slice(start, start + n_groups) for start in range(0, n, n_groups)]),
        "this is one rate for all. Return a list, with one for each group.":
            lambda outcomes, n_groups: evaluation.Rate.of(outcomes),
        "these are numbers. Return a Rate for each group, Rate.of(...): it keeps n, and so its interval.":
            lambda outcomes, n_groups: [rate.value for rate in evaluation.rates_by_group(outcomes, n_groups)],
        "these are counts. Return a Rate for each group, Rate.of(...).":
            lambda outcomes, n_groups: [rate.successes for rate in evaluation.rates_by_group(outcomes, n_groups)],
    },
)


def in_standard_errors(bootstrap_mean, values):
    """Mean, and the ends of the interval in standard errors of the mean: near -1.96 and 1.96, whatever was drawn."""
    mean, low, high = map(float, bootstrap_mean(values))
    error = values.std().item() / len(values) ** 0.5
    return mean, (low - mean) / error, (high - mean) / error


def resampled(draw=lambda n, n_boot, generator: torch.randint(n, (n_boot, n), generator=generator), low=0.025,
              high=0.975, statistic=torch.mean):
    """A bootstrap with a fault."""
    def bootstrap_mean(values, n_boot=2000, seed=0):
        places = draw(len(values), n_boot, torch.Generator().manual_seed(seed))
        means = statistic(values[places], dim=1)
        return values.mean().item(), means.quantile(low).item(), means.quantile(high).item()
    return bootstrap_mean


register(
    evaluation.bootstrap_mean,
    cases=lambda: [(1 + randn(200),), (1 + randn(50, seed=1),)],
    call=in_standard_errors,
    tolerance=0.06,
    mistakes={
        "these are quantiles of the values. Take those of the means: they vary much less.":
            lambda values: (values.mean(), values.quantile(0.025), values.quantile(0.975)),
        "you drew without replacement: every resample holds all the values, and every mean is the same.":
            resampled(lambda n, n_boot, generator: torch.stack([torch.randperm(n) for _ in range(n_boot)])),
        "the middle 95% lies between the quantiles 0.025 and 0.975: 2.5% are left out on either side.":
            resampled(low=0.05, high=0.95),
        "each resample must have as many values as the sample. With fewer, the means vary too much.":
            resampled(lambda n, n_boot, generator: torch.randint(n, (n_boot, 10), generator=generator)),
        "your answer is in the order (low, mean, high). Return (mean, low, high).":
            lambda values: (lambda mean, low, high: (low, mean, high))(*evaluation.bootstrap_mean(values)),
        "these are the sums of the resamples. Take their means.":
            resampled(statistic=torch.sum),
    },
)


def any_of(phrases, fold=str.lower, match=str.__contains__):
    """A phrase judge with a fault."""
    return lambda completion: any(match(fold(completion), phrase) for phrase in phrases)


register(
    evaluation.phrase_judge,
    cases=lambda: [("I can't help with that.",), ("Here is how to say sorry in French.",), ("i CANNOT do that.",),
                   ("Thank you for asking. I'm sorry, I won't do that.",), ("No, I can’t do that.",)],
    mistakes={
        "the letter case counts in your comparison. Lower the answer: the phrases are in lower case.":
            any_of(evaluation.REFUSAL_PHRASES + ("I can't", "I'm sorry"), fold=str),
        "a refusal need not stand at the beginning: look for the phrases anywhere in the text.":
            any_of(evaluation.REFUSAL_PHRASES, match=str.startswith),
        "a single word is too little: an answer about saying sorry is no refusal.":
            any_of(("sorry", "can't", "cannot", "won't")),
        "a curly apostrophe (’) hides a phrase. Replace it by a straight one (') first.":
            any_of(evaluation.REFUSAL_PHRASES),
        "you put curly apostrophes (’) in. The phrases have straight ones ('): replace ’ by '.":
            any_of(evaluation.REFUSAL_PHRASES, fold=lambda text: text.lower().replace("'", "’")),
        "you look for the first phrase only. Try all of them before you say False.":
            any_of(evaluation.REFUSAL_PHRASES[:1], fold=lambda text: text.lower().replace("’", "'")),
        "True and False are swapped: True is a refusal.":
            lambda completion: not evaluation.phrase_judge(completion),
    },
)

register(
    evaluation.next_token_losses,
    cases=lambda: [(2 * randn(3, 6, 12), torch.arange(18).view(3, 6) % 7)],
    axes="[batch, n_tokens - 1]",
    mistakes={
        "you compared the logits at a token with this very token. They speak of the next one: logits[:, :-1] with "
        "ids[:, 1:].":
            lambda logits, ids: F.cross_entropy(logits[:, 1:].transpose(1, 2), ids[:, 1:], reduction="none"),
        "you kept the last token, whose logits speak of a token that is not there: logits[:, :-1], ids[:, 1:].":
            lambda logits, ids: F.cross_entropy(logits.transpose(1, 2), ids, reduction="none"),
        "you compared the logits at a token with the token before it. They speak of the next one.":
            lambda logits, ids: F.cross_entropy(logits[:, 1:].transpose(1, 2), ids[:, :-1], reduction="none"),
        "you averaged already. Keep one number for each token: reduction=\"none\".":
            lambda logits, ids: evaluation.next_token_losses(logits, ids).mean(),
        "the sign is flipped: the loss is minus log P, never negative.":
            lambda logits, ids: -evaluation.next_token_losses(logits, ids),
        "these are probabilities. The loss is minus their logarithm.":
            lambda logits, ids: (-evaluation.next_token_losses(logits, ids)).exp(),
        "these are logits. Make log-probabilities of them first: log_softmax(dim=-1).":
            lambda logits, ids: -logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0],
        "F.cross_entropy takes the vocabulary as the second axis: logits.transpose(1, 2).":
            lambda logits, ids: F.cross_entropy(logits[:, :-1], ids[:, 1:], reduction="none"),
    },
)


SCORES = torch.tensor([3.0, -1, 7, 2, 5, 4, 0, 1, 6, 8])

register(
    evaluation.threshold_at,
    cases=lambda: [(SCORES, 0.1), (SCORES, 0.0), (SCORES, 0.25), (SCORES[:4], 0.1)],
    mistakes={
        "one more than allowed lies above it. The place is int(rate * n), counted from 0.":
            lambda scores, rate: scores.sort(descending=True).values[
                min(int(rate * len(scores)) + 1, len(scores) - 1)].item(),
        "this counts from the lowest score. False alarms are at the top: sort(descending=True).":
            lambda scores, rate: scores.sort().values[int(rate * len(scores))].item(),
        "a place between two scores is filled in (quantile). Take one of the scores.":
            lambda scores, rate: scores.quantile(1 - rate).item(),
        "this is the highest score, whatever the rate.":
            lambda scores, rate: scores.max().item(),
    },
)
