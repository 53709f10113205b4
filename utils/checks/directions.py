"""Checks of the exercises on directions and how one is chosen."""
import math

import torch
import torch.nn.functional as F

from utils import directions, evaluation, interventions
from utils.candidates import CandidateScores
from utils.checks import PROMPTS, direction, model, randn, register

register(
    directions.difference_in_means,
    cases=lambda: [(randn(6, 4, 3, 5), randn(6, 4, 3, 5, seed=1) - 1), (randn(6, 4, 3, 5), randn(8, 4, 3, 5, seed=1))],
    axes="[n_layers, n_positions, d_model]",
    mistakes={
        "the sign is flipped: you subtracted harmful from harmless.":
            lambda harmful, harmless: harmless.mean(dim=0) - harmful.mean(dim=0),
        "you subtracted prompt from prompt. The two sets need not be equally many: average each one first.":
            lambda harmful, harmless: (harmful - harmless).mean(dim=0),
        "you averaged over the layers (dim 1) rather than the prompts (dim 0).":
            lambda harmful, harmless: harmful.mean(dim=1) - harmless.mean(dim=1),
        "you took the difference of sums. Divide each by its own number of prompts: the mean.":
            lambda harmful, harmless: harmful.sum(dim=0) - harmless.sum(dim=0),
        "you scaled the result to length 1. Keep its length: activation addition needs it.":
            lambda harmful, harmless: F.normalize(harmful.mean(dim=0) - harmless.mean(dim=0), dim=-1),
    },
)

register(
    directions.filter_prompts,
    cases=lambda: [(list("abcd"), torch.tensor([2.0, -1.0, 0.3, -0.2]), True),
                   (list("abcd"), torch.tensor([2.0, -1.0, 0.3, -0.2]), False)],
    mistakes={
        "the sides are swapped: a prompt is refused if its metric is above 0.":
            lambda prompts, metric, refused: directions.filter_prompts(prompts, metric, not refused),
        "`refused` is not used: for refused=False keep the prompts that the model answers.":
            lambda prompts, metric, refused: directions.filter_prompts(prompts, metric, True),
        "you returned True or False for each prompt. Return the prompts themselves, those to be kept.":
            lambda prompts, metric, refused: [bool(value > 0) == refused for value in metric],
        "you returned the metrics. Return the prompts they belong to.":
            lambda prompts, metric, refused: [value for value in metric if (value > 0) == refused],
        "you asked whether the metrics are above 0 on average. Decide for each prompt by itself.":
            lambda prompts, metric, refused: prompts if (metric.mean() > 0) == refused else [],
    },
)

register(
    directions.cosine_similarities,
    cases=lambda: [(randn(4, 6) * torch.tensor([1.0, 5.0, 0.2, 2.0])[:, None],), (3 * randn(6, 6, seed=1),)],
    axes="[n_directions, n_directions]",
    mistakes={
        "these are dot products, which grow with the lengths. Scale each direction to length 1 first.":
            lambda directions: directions @ directions.T,
        "you scaled only one of the two to length 1: divide by both lengths.":
            lambda directions: F.normalize(directions, dim=-1) @ directions.T,
        "you scaled along the wrong axis. A direction is a row: dim=-1.":
            lambda directions: F.normalize(directions, dim=0) @ F.normalize(directions, dim=0).T,
        "you multiplied the entries with each other (dim 0 with dim 0). Rows with rows: units @ units.T.":
            lambda directions: F.normalize(directions, dim=-1).T @ F.normalize(directions, dim=-1),
        "you compared each direction with itself only. Compare every two: units @ units.T.":
            lambda directions: F.cosine_similarity(directions, directions, dim=-1),
    },
)


def refusal_with(change):
    """Like `refusal_when_ablated`, with the intervention `change(direction)`, or None for none."""
    def refusal(model, direction, prompts, batch_size=64):
        return evaluation.refusal_metric(interventions.last_logits(model, prompts, change(direction)),
                                         model.refusal_tokens)
    return refusal


register(
    directions.refusal_when_ablated,
    cases=lambda: [(model(), direction(), PROMPTS)],
    axes="[n_prompts]",
    mistakes={
        "the direction is not ablated: hand Ablation(direction) to last_logits.":
            refusal_with(lambda direction: None),
        "you added the direction rather than ablating it: Ablation(direction).":
            refusal_with(lambda direction: interventions.Addition(direction, 0)),
        "these are the logits. Make one number for each prompt of them: refusal_metric(logits, model.refusal_tokens).":
            lambda model, direction, prompts, batch_size=64:
                interventions.last_logits(model, prompts, interventions.Ablation(direction)),
        "you averaged over the prompts already. Keep one number for each.":
            lambda *args: directions.refusal_when_ablated(*args).mean(),
        "the sign is flipped: the metric is positive where a refusal is likely.":
            lambda *args: -directions.refusal_when_ablated(*args),
    },
)


def refusal_with_added(where=0, coefficient=1.0, change=lambda direction: direction):
    """Like `refusal_when_added`, at another layer, with another coefficient or direction."""
    def refusal_when_added(model, direction, layer, prompts, batch_size=64):
        addition = interventions.Addition(change(direction), layer + where, coefficient)
        return refusal_with(lambda direction: addition)(model, direction, prompts)
    return refusal_when_added


register(
    directions.refusal_when_added,
    cases=lambda: [(model(), direction(), 1, PROMPTS)],
    axes="[n_prompts]",
    mistakes={
        "nothing is added: hand Addition(direction, layer) to last_logits.":
            lambda model, direction, layer, prompts, batch_size=64:
                refusal_with(lambda direction: None)(model, direction, prompts),
        "you ablated the direction rather than adding it: Addition(direction, layer).":
            lambda model, direction, layer, prompts, batch_size=64:
                directions.refusal_when_ablated(model, direction, prompts),
        "the direction is added at layer 0, whatever the layer: Addition(direction, layer).":
            lambda model, direction, layer, prompts, batch_size=64:
                refusal_with_added(where=-layer)(model, direction, layer, prompts),
        "the direction is added one layer too late.":
            refusal_with_added(where=1),
        "you scaled the direction to length 1. In activation addition its length counts.":
            refusal_with_added(change=lambda direction: F.normalize(direction, dim=-1)),
        "the sign is flipped: you subtracted the direction.":
            refusal_with_added(coefficient=-1.0),
        "you averaged over the prompts already. Keep one number for each.":
            lambda *args: directions.refusal_when_added(*args).mean(),
    },
)


def planted_scores():
    """Scores [10 layers, 2 positions] in which each condition alone keeps out a candidate of lower bypass.

    (3, 1) is right. (2, 0) has a large KL; (4, 0) does not induce; layers 8 and 9 are too late; (9, 0) is all three.
    """
    bypass, induce, kl = randn(10, 2).abs(), torch.ones(10, 2), torch.full((10, 2), 0.02)
    bypass[3, 1], bypass[5, 0], bypass[1, 1] = -2, -1, 9
    bypass[2, 0], kl[2, 0] = -6, 0.5
    bypass[4, 0], induce[4, 0] = -5, -0.5
    bypass[8, 0], bypass[9, 1] = -3, -4
    bypass[9, 0], kl[9, 0], induce[9, 0] = -7, 0.5, -0.5
    kl[6, 1], induce[7, 0] = 0.001, 8
    return CandidateScores(bypass, induce, kl)


def select_by(score, max_kl=0.1, min_induce=0.0, max_layer=0.8):
    """`select_direction` by another score, or with a filter left out."""
    def select_direction(scores, *limits):
        passing = scores.passing(*(limits or (max_kl, min_induce, max_layer)))
        return divmod(int(score(scores).masked_fill(~passing, math.inf).argmin()), passing.shape[1])
    return select_direction


register(
    directions.select_direction,
    cases=lambda: [(planted_scores(),), (planted_scores(), math.inf, -math.inf, 1.0)],
    mistakes={
        "the limits 0.1, 0 and 0.8 are fixed in your function. Use max_kl, min_induce and max_layer in their place.":
            lambda scores, *limits: directions.select_direction(scores),
        "you took the lowest bypass of all candidates. First leave out those that do not pass the filters.":
            select_by(lambda scores: scores.bypass, math.inf, -math.inf, math.inf),
        "a candidate passed whose KL is not below 0.1.":
            select_by(lambda scores: scores.bypass, max_kl=math.inf),
        "a candidate passed whose induce score is not above 0.":
            select_by(lambda scores: scores.bypass, min_induce=-math.inf),
        "a candidate passed from the last fifth of the layers.":
            select_by(lambda scores: scores.bypass, max_layer=math.inf),
        "layer 8 of 10 passed. The condition is layer < 0.8 L, and 8 is not less than 8.":
            select_by(lambda scores: scores.bypass, max_layer=0.81),
        "you took the highest bypass. Ablation works best where the refusal metric ends lowest.":
            select_by(lambda scores: -scores.bypass),
        "you took the lowest KL. KL is a filter only: among those that pass, the lowest bypass is chosen.":
            select_by(lambda scores: scores.kl),
        "you took the highest induce score. It is a filter only: among those that pass, the lowest bypass is chosen.":
            select_by(lambda scores: -scores.induce),
        "your answer is in the order (position, layer). Return (layer, position index).":
            lambda scores, *limits: directions.select_direction(scores, *limits)[::-1],
        "this is the index into the flattened table. divmod(index, n_positions) gives (layer, position index).":
            lambda scores, *limits: scores.bypass.masked_fill(~scores.passing(*limits), math.inf).argmin(),
    },
)


def traits(random_directions, n, like):
    """What makes directions fair controls, whatever the recipe they were drawn by."""
    directions, again, others = (random_directions(n, like, seed) for seed in (0, 0, 1))
    if not isinstance(directions, torch.Tensor) or directions.shape != (n, len(like)):
        return directions
    units = F.normalize(directions, dim=-1)
    cosines = units @ units.T - torch.eye(n)
    return {"length of each direction": directions.norm(dim=-1),
            "the same seed gives the same": torch.equal(directions, again),
            "another seed gives others": not torch.equal(directions, others),
            "no two point the same way": cosines.max().item() < 0.9,
            "every direction is equally likely": units.mean(dim=0).norm().item() < 0.3}


def drawn(numbers=torch.randn, scale=lambda directions, like: F.normalize(directions, dim=-1) * like.norm()):
    """`random_directions` from other numbers, or scaled otherwise."""
    def random_directions(n, like, seed=0):
        return scale(numbers(n, len(like), generator=torch.Generator().manual_seed(seed)), like)
    return random_directions


register(
    directions.random_directions,
    cases=lambda: [(200, 3 * randn(64))],
    call=traits,
    axes="[n, d_model]",
    mistakes={
        "each is as long as randn made it. First scale it to length 1 (F.normalize), then to the length of `like`.":
            drawn(scale=lambda directions, like: directions),
        "each has length 1. Give it the length of `like`: times like.norm().":
            drawn(scale=lambda directions, like: F.normalize(directions, dim=-1)),
        "you multiplied by the length of `like`, but did not scale to length 1 before.":
            drawn(scale=lambda directions, like: directions * like.norm()),
        "you scaled along the wrong axis. A direction is a row: dim=-1.":
            drawn(scale=lambda directions, like: F.normalize(directions, dim=0) * like.norm()),
        "torch.rand draws from 0 to 1, so all your directions lean to one side. torch.randn goes both ways.":
            drawn(numbers=torch.rand),
        "all n are the same direction. Draw [n, d_model] numbers.":
            lambda n, like, seed=0: directions.random_directions(1, like, seed).repeat(n, 1),
        "the seed is not used: another seed should give other directions.":
            lambda n, like, seed=0: directions.random_directions(n, like),
        "the same seed gives something else each time. Draw with generator=torch.Generator().manual_seed(seed).":
            lambda n, like, seed=0: F.normalize(torch.randn(n, len(like)), dim=-1) * like.norm(),
    },
)
