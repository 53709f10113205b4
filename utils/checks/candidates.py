"""Checks of the exercises on scores of candidates."""
import torch
import torch.nn.functional as F

from utils import candidates
from utils.checks import randn, register


def filters():
    """Three filters on ten candidates, each of which fails some other ones, alone or with others."""
    met = {"kl": torch.ones(5, 2), "induce": torch.ones(5, 2), "layer": torch.ones(5, 2)}
    for condition, failing in {"kl": (0, 1, 2, 7), "induce": (2, 3, 7), "layer": (7, 8, 9)}.items():
        met[condition].view(-1)[list(failing)] = 0
    return {condition: who.bool() for condition, who in met.items()}


register(
    candidates.kept_out_by_one,
    cases=lambda: [(filters(),), (dict(list(filters().items())[:2]),)],
    mistakes={
        "these are all that fail a filter. Leave out those that fail another one too.":
            lambda filters: {condition: ~met for condition, met in filters.items()},
        "these are those that meet a filter alone. You want those that fail it alone.":
            lambda filters: {condition: met & (torch.stack(list(filters.values())).sum(dim=0) == 1)
                             for condition, met in filters.items()},
        "these meet this filter and fail another one. You want those that fail this one.":
            lambda filters: {condition: met & (torch.stack(list(filters.values())).sum(dim=0) == len(filters) - 1)
                             for condition, met in filters.items()},
        "these fail one filter, whichever it is. For each condition take those that fail this very one.":
            lambda filters: {condition: torch.stack(list(filters.values())).sum(dim=0) == len(filters) - 1
                             for condition in filters},
        "these meet all other filters, whether they fail this one or not.":
            lambda filters: {condition: torch.stack([other for name, other in filters.items() if name != condition])
                             .all(dim=0) for condition in filters},
        "these are counts. Return who it is: true or false for each candidate.":
            lambda filters: {name: int(who.sum()) for name, who in candidates.kept_out_by_one(filters).items()},
    },
)


def tokens_with(once=2, means=2, unchanged=2, scores=3):
    """`tokens_read` with other counts of how often a prompt is read."""
    return lambda n_tokens, n_candidates, n_train, n_val: n_tokens * (
        once * (n_train + n_val) + means * n_train + unchanged * n_val + scores * n_candidates * n_val)


register(
    candidates.tokens_read,
    cases=lambda: [(10, 7, 5, 3), (24, 40, 128, 32)],
    mistakes={
        "each candidate has three scores, and each score reads validation prompts of its own.":
            tokens_with(scores=1),
        "bypass reads harmful prompts only, induce and kl harmless only: three times n_val for a candidate, not six.":
            tokens_with(scores=6),
        "half of what is read before the scores is missing: the filter at the start, or one of the two sides.":
            tokens_with(once=0),
        "the means are missing: the training prompts are read once more, both sides.":
            tokens_with(means=0),
        "for the means only one side is counted.":
            tokens_with(means=1),
        "beside the scores the validation prompts are read twice, both sides: by the filter, and for the unchanged "
        "model's logits.":
            tokens_with(unchanged=0),
        "for the unchanged model's logits only one side is counted: bypass starts from harmful prompts, induce and kl "
        "from harmless ones.":
            tokens_with(unchanged=1),
        "these are the scores alone. Add what is read before them.":
            tokens_with(once=0, means=0, unchanged=0),
        "a candidate has three scores, not four: bypass, induce, kl.":
            tokens_with(scores=4),
        "these are prompts. Times n_tokens they are tokens.":
            lambda n_tokens, *counts: candidates.tokens_read(1, *counts),
        "the scores are computed for every candidate, not once.":
            lambda n_tokens, n_candidates, *counts: candidates.tokens_read(n_tokens, 1, *counts),
    },
)


def traced(n_writes=3):
    """What two prompts write along five tokens, and a metric's gradients: lists of [2, 5, 8]."""
    return [[randn(2, 5, 8, seed=10 * kind + place) for place in range(n_writes)] for kind in (1, 2)]


def shadows(x, direction, unit=True):
    """r̂ · x at each token."""
    return x @ (F.normalize(direction, dim=-1) if unit else direction)


def estimated(each, direction_is_unit=True, sign=-1):
    """`first_order_ablation` with another product for each write."""
    def first_order_ablation(writes, gradients, direction):
        return sign * sum(each(shadows(write, direction, direction_is_unit), shadows(gradient, direction,
                               direction_is_unit)) for write, gradient in zip(writes, gradients))
    return first_order_ablation


register(
    candidates.first_order_ablation,
    cases=lambda: [(*traced(), 3 * randn(8)), (*traced(n_writes=7), 0.2 * randn(8, seed=5))],
    axes="[n_prompts]",
    mistakes={
        "the sign is flipped. Each write loses its shadow on r̂, so the change has a minus.":
            estimated(lambda write, gradient: (write * gradient).sum(dim=1), sign=1),
        "the direction is not scaled to length 1: only then is r̂ · w the shadow that a write loses (F.normalize).":
            estimated(lambda write, gradient: (write * gradient).sum(dim=1), direction_is_unit=False),
        "you averaged over the tokens. Each token's write is changed, and the changes add up: sum over dim=1.":
            estimated(lambda write, gradient: (write * gradient).mean(dim=1)),
        "only the last token is counted. Ablation changes the writes of all tokens: sum over dim=1.":
            estimated(lambda write, gradient: (write * gradient)[:, -1]),
        "you summed the shadows before you multiplied them. Multiply token by token, then sum.":
            estimated(lambda write, gradient: write.sum(dim=1) * gradient.sum(dim=1)),
        "you summed over the prompts too. Keep one number for each prompt.":
            estimated(lambda write, gradient: (write * gradient).sum()),
        "this is gradient · write. Of a write only its shadow on r̂ is lost: (gradient · r̂)(r̂ · write).":
            lambda writes, gradients, direction: -sum(
                (write * gradient).sum(dim=(1, 2)) for write, gradient in zip(writes, gradients)),
        "only the first write is counted. Sum over all of them.":
            lambda writes, gradients, direction: candidates.first_order_ablation(writes[:1], gradients[:1], direction),
        "the writes are not used: you summed gradient · r̂, which is what adding r̂ changes.":
            estimated(lambda write, gradient: gradient.sum(dim=1)),
    },
)
