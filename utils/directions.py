"""Find the direction that mediates refusal: difference in means, scores of candidates, selection.

Paper, section 2.3 and appendix C. A candidate is the difference in means at one layer and position.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from utils.activations import mean_residual_stream
from utils.evaluation import kl_divergence, refusal_metric
from utils.interventions import Ablation, Addition, every_pair, last_logits


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


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """Three scores of each candidate, each [n_layers, n_positions] (paper, appendix C).

    bypass  mean refusal metric, harmful prompts, candidate ablated: low if this takes refusal away
    induce  mean refusal metric, harmless prompts, candidate added: above 0 if this brings refusal about
    kl      mean KL divergence, harmless prompts, ablated against not: low if ablation does nothing else
    """
    bypass: torch.Tensor
    induce: torch.Tensor
    kl: torch.Tensor

    def filters(self, max_kl=0.1, min_induce=0.0, max_layer=0.8):
        """The paper's three filters: {condition: who meets it, bool [n_layers, n_positions]}."""
        n_layers = len(self.bypass)
        early = torch.arange(n_layers) < max_layer * n_layers  # late layers are about the words to come
        return {f"kl < {max_kl:g}": self.kl < max_kl,
                f"induce > {min_induce:g}": self.induce > min_induce,
                f"layer < {max_layer:g} of {n_layers}": early[:, None].expand_as(self.bypass)}

    def passing(self, max_kl=0.1, min_induce=0.0, max_layer=0.8):
        """Who passes all three filters: bool [n_layers, n_positions]."""
        return torch.stack(list(self.filters(max_kl, min_induce, max_layer).values())).all(dim=0)

    def why_none_passes(self, max_kl=0.1, min_induce=0.0, max_layer=0.8):
        """A sentence that names the strictest filter, for when no candidate passes all three."""
        filters = self.filters(max_kl, min_induce, max_layer)
        removed = {condition: int((~met).sum()) for condition, met in filters.items()}
        strictest = max(removed, key=removed.get)
        alone = int(kept_out_by_one(filters)[strictest].sum())
        return (f"No candidate passes the filters, and {strictest} removes most, {removed[strictest]} of "
                f"{self.bypass.numel()} ({alone} of them fail nothing else): look at the scores, and loosen a filter "
                "only where you can say why.")


def kept_out_by_one(filters):
    """Who fails one filter and meets all others: {condition: bool [n_layers, n_positions]}, for each filter.

    filters: {condition: who meets it, bool [n_layers, n_positions]}, as `CandidateScores.filters` gives it.
    """
    n_met = torch.stack(list(filters.values())).sum(dim=0)
    return {condition: ~met & (n_met == len(filters) - 1) for condition, met in filters.items()}


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


def score_candidates(model, candidates, harmful, harmless, batch_size=64, progress=False, every_score=True):
    """Score candidates [n_layers, n_positions, d_model] on validation prompts -> CandidateScores.

    All candidates of a layer go through the model together, each row of a batch with its own direction.
    every_score=False stops at the first candidate that passes the filters, tried from the lowest bypass on: it is the
    one that `select_direction` takes. The induce score and kl of those that were not tried are nan.
    Raises ValueError for candidates of another shape, or that are not finite.
    """
    if candidates.dim() != 3 or candidates.shape[::2] != (model.n_layers, model.d_model):
        raise ValueError(f"Candidates for {model.name!r} are [{model.n_layers}, n_positions, {model.d_model}], not "
                         f"{list(candidates.shape)}: take the differences in means of this very model.")

    if not candidates.isfinite().all():
        raise ValueError(f"The candidates hold nan or infinity: {model.name!r} overflows in {model.lm.dtype}. Load it "
                         "with dtype=torch.bfloat16 or torch.float32.")

    def mean_refusal(logits, n_prompts):
        return refusal_metric(logits, model.refusal_tokens).view(-1, n_prompts).mean(dim=1)

    unchanged = last_logits(model, harmless, batch_size=batch_size)
    bypass = mean_refusal(last_logits(model, harmful, batch_size=batch_size), len(harmful))
    induce = mean_refusal(unchanged, len(harmless))
    bypass, induce = bypass.repeat(candidates.shape[:2]), induce.repeat(candidates.shape[:2])
    kl = torch.zeros(candidates.shape[:2])
    scores = CandidateScores(bypass, induce, kl)

    def score_bypass(layer, here):
        prompts, directions = every_pair(harmful, candidates[layer, here])
        logits = last_logits(model, prompts, Ablation(directions), batch_size)
        bypass[layer, here] = mean_refusal(logits, len(harmful))

    def score_induce_and_kl(layer, here):
        prompts, directions = every_pair(harmless, candidates[layer, here])
        logits = last_logits(model, prompts, Addition(directions, layer), batch_size)
        induce[layer, here] = mean_refusal(logits, len(harmless))

        logits = last_logits(model, prompts, Ablation(directions), batch_size).view(-1, *unchanged.shape)
        kl[layer, here] = kl_divergence(unchanged, logits).mean(dim=1)

    # At layer 0 the template's tokens are the same in every prompt. Such a candidate, of length zero but
    # for rounding, changes nothing, and keeps the scores of the unchanged model.
    lengths = candidates.norm(dim=-1)
    real = lengths > 1e-5 * lengths.max()
    for layer in tqdm(range(model.n_layers), desc="scoring candidates", unit="layer", disable=not progress):
        if real[layer].any():
            score_bypass(layer, real[layer])
            if every_score:
                score_induce_and_kl(layer, real[layer])
    if not every_score:
        induce[real] = kl[real] = torch.nan
        for layer, index in sorted(real.nonzero().tolist(), key=lambda place: bypass[tuple(place)]):
            score_induce_and_kl(layer, [index])
            if scores.passing()[layer, index]:
                break
    return scores


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

    Layer 0, which has no candidates, and the late layers are left out.
    """
    layers = torch.arange(len(scores.bypass))
    allowed = (layers > 0) & (layers < max_layer * len(layers))
    bypass = scores.bypass.masked_fill(~allowed[:, None], torch.inf)
    return divmod(bypass.argmin().item(), bypass.shape[1])


def no_finding(fault):
    """Print, in one line, what is at fault, and that the figures to come are therefore no finding."""
    print(f"{fault.removesuffix('.')}; until then the figures to come show the steps, and are no finding.")


def find_direction(model, harmful_train, harmless_train, harmful_val, harmless_val,
                   batch_size=64, progress=False, strict=True, every_score=True):
    """The whole method -> (Direction, CandidateScores).

    First leaves out, as the paper does, harmful prompts that the model would answer and harmless ones that
    it would refuse, by the sign of the refusal metric.
    Raises ValueError if that leaves none, or if no candidate passes the filters. With strict=False it says so in one
    line and goes on, to show the steps on any model: with all the prompts, or with the candidate of `lowest_bypass`.
    every_score=False, for those who want the direction alone: the same one, in about half the time.
    """
    given = (harmful_train, True), (harmful_val, True), (harmless_train, False), (harmless_val, False)
    kept = [_refused(model, *side, batch_size) for side in given]
    faults = [_why_none_is_kept(*side) for side, some in zip(given, kept) if not some]
    if faults and strict:
        raise ValueError(faults[0])
    harmful_train, harmful_val, harmless_train, harmless_val = (some or side[0] for some, side in zip(kept, given))
    harmful, harmless = (mean_residual_stream(model, prompts, batch_size=batch_size)  # no stream is kept
                         for prompts in (harmful_train, harmless_train))
    candidates = harmful - harmless
    scores = score_candidates(model, candidates, harmful_val, harmless_val, batch_size, progress, every_score)
    select = select_direction
    if not (strict or scores.passing().any()):
        select = lowest_bypass
        faults.append(scores.why_none_passes())
    if faults:
        no_finding(faults[0])
    layer, index = select(scores)
    return Direction(candidates[layer, index], layer, model.positions[index]), scores


def tokens_read(n_tokens, n_candidates, n_train, n_val):
    """How many tokens a model reads until `find_direction` has chosen, every score computed. With them grow the hours.

    n_tokens: of a prompt, on average. n_candidates: n_layers times n_positions, less those at layer 0 where the
    template's tokens are the same in every prompt. n_train, n_val: prompts of each side.
    """
    once = 2 * (n_train + n_val)  # is it refused?
    means = 2 * n_train
    unchanged = 2 * n_val  # the logits that the scores start from
    scores = 3 * n_candidates * n_val  # bypass, induce, kl
    return n_tokens * (once + means + unchanged + scores)


def random_directions(n, like, seed=0):
    """n directions drawn evenly from all, each as long as `like` [d_model], for controls -> [n, d_model]."""
    directions = torch.randn(n, len(like), generator=torch.Generator().manual_seed(seed))
    return F.normalize(directions, dim=-1) * like.norm()


def _refused(model, prompts, wanted, batch_size):
    """Those of the prompts that the model would refuse (wanted=True) or answer (wanted=False)."""
    metric = refusal_metric(last_logits(model, prompts, batch_size=batch_size), model.refusal_tokens)
    return filter_prompts(prompts, metric, wanted)


def _why_none_is_kept(prompts, wanted):
    return (f"The model {'refuses' if wanted else 'answers'} none of the {len(prompts)} "
            f"{'harmful' if wanted else 'harmless'} prompts by its refusal metric: read its "
            "answers, and set model.refusal_tokens to the tokens that its refusals begin with.")
