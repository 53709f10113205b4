"""Find the direction that mediates refusal: difference in means, scores of the candidates, selection.

Paper, section 2.3 and appendix C.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from utils.activations import mean_residual_stream
from utils.evaluation import kl_divergence, refusal_metric
from utils.interventions import Ablation, Addition, every_pair, last_logits


@dataclass(frozen=True, eq=False)
class Direction:
    """vector [d_model], found at the start of `layer`, at `position` (-1 is the last token of the prompt)."""
    vector: torch.Tensor
    layer: int
    position: int

    @property
    def unit(self):
        """The vector scaled to length 1, r̂."""
        return F.normalize(self.vector, dim=-1)


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """Three scores of each candidate, each [n_layers, n_positions] (paper, appendix C).

    bypass  mean refusal metric on harmful prompts with the candidate ablated: low if that takes refusal away
    induce  mean refusal metric on harmless prompts with the candidate added: above 0 if that brings refusal about
    kl      mean KL divergence on harmless prompts, unchanged from ablated: low if ablation changes little else, in nats
    """
    bypass: torch.Tensor
    induce: torch.Tensor
    kl: torch.Tensor

    def filters(self, max_kl=0.1, min_induce=0.0, max_layer=0.8):
        """The paper's three conditions, each with the candidates that meet it: {name: bool [n_layers, n_positions]}."""
        n_layers = len(self.bypass)
        early = torch.arange(n_layers) < max_layer * n_layers  # the last layers already speak of the words to come
        return {f"kl < {max_kl:g}": self.kl < max_kl,
                f"induce > {min_induce:g}": self.induce > min_induce,
                f"layer < {max_layer:g} x {n_layers}": early[:, None].expand_as(self.bypass)}

    def passing(self, max_kl=0.1, min_induce=0.0, max_layer=0.8):
        """The candidates that meet all three conditions: bool [n_layers, n_positions]."""
        return torch.stack(list(self.filters(max_kl, min_induce, max_layer).values())).all(dim=0)


def difference_in_means(harmful, harmless):
    """Mean of the harmful activations minus mean of the harmless ones, per layer and position (paper, section 2.3).

    [n, n_layers, n_positions, d_model], [m, n_layers, n_positions, d_model] -> [n_layers, n_positions, d_model]
    """
    return harmful.mean(dim=0) - harmless.mean(dim=0)


def score_candidates(model, candidates, harmful, harmless, batch_size=64, progress=False):
    """Score every candidate on validation prompts, as the paper does -> CandidateScores.

    candidates: [n_layers, n_positions, d_model]. The candidates of a layer share batches, a direction to each row.
    """
    def mean_refusal(logits, n_prompts):
        return refusal_metric(logits, model.refusal_tokens).view(-1, n_prompts).mean(dim=1)

    unchanged = last_logits(model, harmless, batch_size=batch_size)
    # A candidate without length changes nothing, so these scores stay as they are.
    bypass = mean_refusal(last_logits(model, harmful, batch_size=batch_size), len(harmful)).repeat(candidates.shape[:2])
    induce = mean_refusal(unchanged, len(harmless)).repeat(candidates.shape[:2])
    kl = torch.zeros(candidates.shape[:2])
    # At layer 0 the template's tokens are the same in every prompt, so their means differ by rounding at most.
    lengths = candidates.norm(dim=-1)
    has_length = lengths > 1e-5 * lengths.max()

    for layer in tqdm(range(model.n_layers), desc="scoring candidates", unit="layer", disable=not progress):
        some = has_length[layer]
        if not some.any():
            continue
        prompts, rows = every_pair(harmful, candidates[layer, some])
        logits = last_logits(model, prompts, Ablation(rows), batch_size)
        bypass[layer, some] = mean_refusal(logits, len(harmful))

        prompts, rows = every_pair(harmless, candidates[layer, some])
        logits = last_logits(model, prompts, Addition(rows, layer), batch_size)
        induce[layer, some] = mean_refusal(logits, len(harmless))

        logits = last_logits(model, prompts, Ablation(rows), batch_size)
        kl[layer, some] = kl_divergence(unchanged.repeat(int(some.sum()), 1), logits).view(-1, len(harmless)).mean(dim=1)
    return CandidateScores(bypass, induce, kl)


def select_direction(scores, max_kl=0.1, min_induce=0.0, max_layer=0.8):
    """The candidate with the lowest bypass score of those that pass the filters -> (layer, position index).

    Raises ValueError if none passes, and says which filter removed most.
    """
    passing = scores.passing(max_kl, min_induce, max_layer)
    if not passing.any():
        filters = scores.filters(max_kl, min_induce, max_layer)
        strictest = min(filters, key=lambda name: filters[name].sum())
        raise ValueError(f"No candidate passes the filters; {strictest} removes most, {int((~filters[strictest]).sum())} "
                         f"of {passing.numel()}: look at the scores, and loosen a filter only if you can say why.")
    bypass = scores.bypass.masked_fill(~passing, math.inf)
    return divmod(int(bypass.argmin()), bypass.shape[1])


def find_direction(model, harmful_train, harmless_train, harmful_val, harmless_val, batch_size=64, progress=False):
    """The whole method -> (Direction, CandidateScores).

    Prompts that the model does not treat as their side asks (harmful ones that it would answer, harmless ones that it
    would refuse, by the sign of the refusal metric) are left out first (paper, section 2.3).
    Raises ValueError if that leaves none of a kind, or if no candidate passes the filters.
    """
    harmful_train, harmful_val = (_treated_as("harmful", model, p, batch_size) for p in (harmful_train, harmful_val))
    harmless_train, harmless_val = (_treated_as("harmless", model, p, batch_size) for p in (harmless_train, harmless_val))
    candidates = mean_residual_stream(model, harmful_train, batch_size=batch_size) \
        - mean_residual_stream(model, harmless_train, batch_size=batch_size)
    scores = score_candidates(model, candidates, harmful_val, harmless_val, batch_size, progress)
    layer, index = select_direction(scores)
    return Direction(candidates[layer, index], layer, model.positions[index]), scores


def random_directions(n, like, seed=0):
    """n directions drawn uniformly, each as long as the vector `like` [d_model] -> [n, d_model]: the controls."""
    directions = torch.randn(n, len(like), generator=torch.Generator().manual_seed(seed))
    return F.normalize(directions, dim=-1) * like.norm()


def _treated_as(side, model, prompts, batch_size):
    """The prompts that the model would refuse (side harmful) or answer (harmless)."""
    refused = refusal_metric(last_logits(model, prompts, batch_size=batch_size), model.refusal_tokens) > 0
    kept = [prompt for prompt, is_refused in zip(prompts, refused) if is_refused == (side == "harmful")]
    if not kept:
        raise ValueError(f"The model {'refuses' if side == 'harmful' else 'answers'} none of the {len(prompts)} {side} "
                         "prompts, by its refusal metric: look at its answers, and set model.refusal_tokens to the "
                         "tokens that its refusals begin with.")
    return kept
