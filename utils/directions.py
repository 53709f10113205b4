"""Find the direction that mediates refusal: difference in means, selection, the whole method.

Paper, section 2.3 and appendix C. A candidate is the difference in means at one layer and position.
"""
from dataclasses import dataclass

import nnsight
import torch
import torch.nn.functional as F

from utils.candidates import SharedStart, score_candidates, score_finalists
from utils.evaluation import refusal_metric
from utils.instructions import SIDES
from utils.interventions import Ablation, Addition, last_logits
from utils.models import at_least_float32


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector [d_model], with the layer and the position (-1: last token of the prompt) it was found at."""
    vector: torch.Tensor
    layer: int
    position: int

    @property
    def unit(self):
        """r̂: the vector scaled to length 1."""
        return F.normalize(self.vector, dim=-1)


def filter_prompts(prompts, metric, refused):
    """Those of the prompts that the model refuses (refused=True), or those that it answers (refused=False).

    metric: the prompts' refusal metrics, [n_prompts]; a prompt is refused if its metric is above 0.
    """
    return [prompt for prompt, value in zip(prompts, metric) if (value > 0) == refused]


def difference_in_means(harmful, harmless):
    """Mean of the harmful activations minus mean of the harmless (paper, section 2.3).

    [n, n_layers, n_positions, d_model], [m, n_layers, n_positions, d_model]
    -> [n_layers, n_positions, d_model]
    """
    return harmful.mean(dim=0) - harmless.mean(dim=0)


def cosine_similarities(directions):
    """Cosine of the angle between every two directions: 1 if they point the same way, 0 if at right angles.

    [n_directions, d_model] -> [n_directions, n_directions]
    """
    units = F.normalize(directions, dim=-1)
    return units @ units.T


def refusal_when_ablated(model, direction, harmful, batch_size=64):
    """Refusal metric of each prompt, the direction ablated -> [n_prompts]. The mean is the bypass score."""
    logits = last_logits(model, harmful, Ablation(direction), batch_size)
    return refusal_metric(logits, model.refusal_tokens)


def refusal_when_added(model, direction, layer, harmless, batch_size=64):
    """Refusal metric of each prompt, the direction added at a layer -> [n_prompts]. The mean is the induce score."""
    logits = last_logits(model, harmless, Addition(direction, layer), batch_size)
    return refusal_metric(logits, model.refusal_tokens)


def select_direction(scores, max_kl=0.1, min_induce=0.0, max_layer=0.8):
    """The lowest bypass score among candidates that pass the filters -> (layer, position index).

    Raises ValueError if none passes, and says which filter removes most.
    """
    passing = scores.passing(max_kl, min_induce, max_layer)
    if not passing.any():
        raise ValueError(scores.why_none_passes(max_kl, min_induce, max_layer))
    bypass = scores.bypass.masked_fill(~passing, torch.inf)
    return divmod(bypass.argmin().item(), bypass.shape[1])


def lowest_bypass(scores, max_layer=0.8):
    """The lowest bypass score, whatever the others, for when no candidate passes -> (layer, position index).

    Layer 0, which has no candidates, the late layers and candidates without a score are left out.
    Raises ValueError if that leaves none.
    """
    layers = torch.arange(len(scores.bypass))
    allowed = (layers > 0) & (layers < max_layer * len(layers))
    scored = ~scores.bypass.isnan()
    if not (allowed[:, None] & scored).any():
        raise ValueError(f"None of the model's {len(layers)} layers has a candidate that was scored, layer 0 and the "
                         "late ones aside: take a deeper model.")
    bypass = scores.bypass.masked_fill(~(allowed[:, None] & scored), torch.inf)
    return divmod(bypass.argmin().item(), bypass.shape[1])


def nearest_miss(scores):
    """Of the candidates that fail the fewest filters, the one of the lowest bypass, for when none passes.

    -> (layer, position index). Layer 0, which has no candidates, is left out; a score that was not computed fails.
    """
    n_met = torch.stack(list(scores.filters().values())).sum(dim=0)
    n_met[0] = -1
    bypass = scores.bypass.nan_to_num(torch.inf).masked_fill(n_met < n_met.max(), torch.inf)
    return divmod(bypass.argmin().item(), bypass.shape[1])


def no_finding(fault):
    """Print, in one line, what is at fault, and that the figures to come are therefore no finding."""
    print(f"{fault.removesuffix('.')}; until then the figures to come show the steps, and are no finding.")


def find_direction(model, train, val, screen=12, strict=True, progress=False, batch_size=64, file=None):
    """The whole method -> (Direction, CandidateScores).

    train, val: {"harmful": instructions, "harmless": instructions}. As the paper does, it leaves out harmful prompts
    that the model would answer and harmless ones that it would refuse, by the sign of the refusal metric.
    screen: how many candidates are finalists, those of the best first-order estimates. The best of these get exact
    scores, until one passes; all other scores are nan. None for the paper's search, which scores every candidate. On
    NDIF, where no gradient is at hand, all are scored.
    strict: raise ValueError if the filter leaves no prompts, or if no candidate passes the paper's filters. If False,
    it says so in one line and goes on, to show the steps on any model: with all the prompts, or with the candidate of
    `lowest_bypass`.
    file: where exact scores are kept, one by one, and found again by the next call.
    Raises ValueError also for train or val without the two sides, and as `Scorer`.
    """
    check_sides(train=train, val=val)
    means, faults = {}, []
    for side in SIDES:
        means[side], n_kept = mean_of_kept(model, train[side], side == "harmful", batch_size)
        faults += [] if n_kept else [_why_none_is_kept(train[side], side)]
    prompts, unchanged = [], []
    for side in SIDES:
        kept, logits = kept_prompts(model, val[side], side == "harmful", batch_size)
        faults += [] if kept else [_why_none_is_kept(val[side], side)]
        prompts.append(kept or list(val[side]))
        unchanged.append(logits)
    if faults and strict:
        raise ValueError(faults[0])
    candidates = means["harmful"] - means["harmless"]
    settings = {"batch_size": batch_size, "progress": progress, "file": file, "unchanged": unchanged}
    if screen is None or model.remote:
        scores = score_candidates(model, candidates, *prompts, **settings)
    else:
        scores = score_finalists(model, candidates, *prompts, screen, **settings)
    select = select_direction
    if not (strict or scores.passing().any()):
        select = lowest_bypass
        faults.append(scores.why_none_passes())
    if faults:
        no_finding(faults[0])
    layer, index = select(scores)
    return Direction(candidates[layer, index], layer, model.positions[index]), scores


def check_sides(**splits):
    """Raises ValueError for a split that is no dict of harmful and harmless instructions."""
    for name, split in splits.items():
        if not isinstance(split, dict) or not set(SIDES) <= set(split):
            raise ValueError(f'{name} is a dict of two lists, {{"harmful": instructions, "harmless": instructions}}: '
                             "give both.")


def kept_prompts(model, prompts, refused, batch_size=64):
    """Those of the prompts that the model would refuse (refused=True), or answer (refused=False), and their logits at
    the last position, [n_kept, vocab]. If none is kept, the logits of all."""
    logits = SharedStart(model, prompts, batch_size).last_logits()
    metric = refusal_metric(logits, model.refusal_tokens)
    keep = (metric > 0) == refused
    return filter_prompts(prompts, metric, refused), logits[keep] if keep.any() else logits


def mean_of_kept(model, prompts, refused, batch_size=64):
    """Mean residual stream of the prompts that `kept_prompts` would keep, and how many they are, in one pass.

    -> [n_layers, n_positions, d_model] at the post-instruction tokens, n_kept. If none is kept, the mean of all.
    """
    totals, counts = {}, {True: 0, False: 0}
    for _, inputs in SharedStart(model, prompts, batch_size).batches():
        with model.lm.trace(inputs, logits_to_keep=1):
            streams = nnsight.save([layer.input[:, model.positions] for layer in model.layers])
            logits = model.lm.output.logits[:, -1].save()
        streams = at_least_float32(torch.stack([stream.to(model.device) for stream in streams], dim=1)).cpu()
        keep = (refusal_metric(at_least_float32(logits).cpu(), model.refusal_tokens) > 0) == refused
        for kept in counts:  # added up batch after batch: no stream is stored
            totals[kept] = totals.get(kept, 0) + streams[keep == kept].double().sum(dim=0)
            counts[kept] += int((keep == kept).sum())
    n_kept = counts[True]
    mean = totals[True] / n_kept if n_kept else totals[False] / counts[False]
    return mean.to(streams), n_kept


def random_directions(n, like, seed=0):
    """n directions drawn evenly from all, each as long as `like` [d_model], for controls -> [n, d_model]."""
    directions = torch.randn(n, len(like), generator=torch.Generator().manual_seed(seed))
    return F.normalize(directions, dim=-1) * like.norm()


def _why_none_is_kept(prompts, side):
    return (f"The model {'refuses' if side == 'harmful' else 'answers'} none of the {len(prompts)} {side} prompts by "
            "its refusal metric: read its answers, and set model.refusal_tokens to the tokens that its refusals begin "
            "with.")
