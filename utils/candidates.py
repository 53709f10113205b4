"""Score candidates for the refusal direction (paper, appendix C): exactly, or all at once to first order.

A candidate is a vector at one layer and position. Exact scores cost three forward passes for each candidate. A
first-order estimate costs one pass forward and one back for all of them. It names the finalists; a heat on a few
prompts tells which of these deserve exact scores.
"""
import copy
from dataclasses import dataclass
from pathlib import Path

import nnsight
import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.cache_utils import DynamicLayer

from utils import fingerprint
from utils.evaluation import kl_divergence, refusal_metric
from utils.interventions import Ablation, Addition, every_pair, last_logits
from utils.models import at_least_float32

SCORES = ("bypass", "induce", "kl")
WORTH_SHARING = 8  # tokens: two forward passes in place of one have a cost of their own
# For a ranking, a few prompts do: how many are read for the estimates, of each side, and how many in the heat.
N_ESTIMATE, N_HEAT = 8, 4
AT_A_TIME = 2  # finalists that get exact scores together


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """Three scores of each candidate, each [n_layers, n_positions] (paper, appendix C); nan where none was computed.

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
        scored = ~self.bypass.isnan()
        whole = scored & ~self.induce.isnan() & ~self.kl.isnan()
        filters = self.filters(max_kl, min_induce, max_layer)
        fails = dict(zip(filters, (~met & scored & ~score.isnan() for met, score in
                                   zip(filters.values(), (self.kl, self.induce, self.bypass)))))
        removed = {condition: int(failing.sum()) for condition, failing in fails.items()}
        strictest = max(removed, key=removed.get)
        alone = int((fails[strictest] & whole & (torch.stack(list(fails.values())).sum(dim=0) == 1)).sum())
        return (f"No candidate passes the filters, and {strictest} removes most, {removed[strictest]} of "
                f"{int(scored.sum())} ({alone} of them fail nothing else): look at the scores, and loosen a filter "
                "only where you can say why.")


def kept_out_by_one(filters):
    """Who fails one filter and meets all others: {condition: bool [n_layers, n_positions]}, for each filter.

    filters: {condition: who meets it, bool [n_layers, n_positions]}, as `CandidateScores.filters` gives it.
    """
    n_met = torch.stack(list(filters.values())).sum(dim=0)
    return {condition: ~met & (n_met == len(filters) - 1) for condition, met in filters.items()}


def listed_scores(scores):
    """Scores as lists, for JSON, which has no nan: None where none was computed."""
    return [[None if score != score else score for score in layer] for layer in scores.tolist()]


def tensor_of(scores):
    """What `listed_scores` was made from."""
    return torch.tensor(np.array(scores, dtype=np.float32))


class SharedStart:
    """Prompts whose first tokens, those of the template, are read once for all of them.

    What a model computes at a token depends on that token and those before it. So where all prompts begin alike, the
    keys and values of the beginning, computed once, serve every prompt: half of a prompt, where a template puts a
    system prompt in. Prompts are read whole where the beginning is short, where the weights are on NDIF, and where a
    model keeps something other than all keys and values (windows, linear attention).
    """

    def __init__(self, model, instructions, batch_size=64):
        self.model, self.batch_size = model, batch_size
        self.tokens = model.tokens(instructions)
        # the post-instruction tokens, whose streams are read, stay with each prompt
        whole = min(map(len, self.tokens)) - len(model.positions)
        n_shared = 0 if model.remote else min(shared_beginning(self.tokens), whole)
        self.n_shared = n_shared if n_shared >= WORTH_SHARING else 0

    def batches(self, change=None):
        """Yield (rows, inputs): which prompts, and what `model.lm.trace` takes to read them under an intervention.

        change: what the trace will `.apply`. It must do the same at every token, as `Ablation` and `Addition` do.
        """
        cache = self._read_beginning(change) if self.n_shared else None
        if cache is None:
            self.n_shared = 0  # not to be tried again
        n_shared = self.n_shared
        for rows, inputs in self.model.batches([tokens[n_shared:] for tokens in self.tokens], self.batch_size):
            yield rows, {**inputs, "use_cache": False} if cache is None else continued(inputs, cache, n_shared)

    def last_logits(self, change=None):
        """Logits at the last position of each prompt, as `last_logits` computes them -> [n_prompts, vocab]."""
        logits = {}
        for rows, inputs in self.batches(change):
            with self.model.lm.trace(inputs, logits_to_keep=1):
                if change is not None:
                    change.apply(self.model)
                last = self.model.lm.output.logits[:, -1].save()
            logits.update(zip(rows, at_least_float32(last).cpu()))
        return torch.stack([logits[row] for row in range(len(logits))])

    def _read_beginning(self, change):
        """The keys and values of the first tokens; None where a model keeps something else."""
        with self.model.lm.trace(self.model.pad([self.tokens[0][:self.n_shared]]), use_cache=True, logits_to_keep=1):
            if change is not None:
                change.apply(self.model)
            cache = self.model.lm.output.past_key_values.save()
        return cache if all(type(layer) is DynamicLayer for layer in cache.layers) else None


def shared_beginning(tokens):
    """How many first tokens all prompts have in common. The last token of a prompt is not among them.

    tokens: lists of token ids.
    """
    shortest = min(map(len, tokens)) - 1
    return next((place for place in range(shortest) if len({prompt[place] for prompt in tokens}) > 1), shortest)


def continued(inputs, cache, n_shared):
    """The inputs of prompts' later tokens, with a cache that holds their n_shared first ones."""
    n_prompts = len(inputs["input_ids"])
    cache = copy.deepcopy(cache)  # the model writes into it
    cache.batch_repeat_interleave(n_prompts)
    mask = F.pad(inputs["attention_mask"], (n_shared, 0), value=1)
    places = mask.cumsum(dim=1)[:, n_shared:] - 1  # padding stands between beginning and rest, and counts for nothing
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": places,
            "past_key_values": cache, "use_cache": True}


class Scorer:
    """Exact scores of one candidate after another, each prompt's kept apart.

    scores   CandidateScores, the means over the prompts: nan where nothing was measured yet
    values   {"bypass": [n_layers, n_positions, n_harmful], "induce" and "kl": [n_layers, n_positions, n_harmless]}
    real     bool [n_layers, n_positions]: at layer 0 the template's tokens are the same in every prompt. Such a
             candidate, of length zero but for rounding, changes nothing, and keeps the scores of the unchanged model

    candidates: [n_layers, n_positions, d_model]. file: where each score is kept as soon as it is measured; if it is
    there, the work goes on from it. unchanged: the unchanged model's logits for the harmful prompts and for the
    harmless ones, [n_prompts, vocab] each, where they are at hand.
    Raises ValueError for candidates of another shape, or that are not finite, and for a file of another search.
    """

    def __init__(self, model, candidates, harmful, harmless, batch_size=64, file=None, unchanged=None):
        check_candidates(model, candidates)
        self.model, self.candidates, self.file = model, candidates, Path(file) if file else None
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self.version = model.fingerprint() if file else None
        self.harmful, self.harmless = (SharedStart(model, prompts, batch_size) for prompts in (harmful, harmless))
        self.unchanged = unchanged[1] if unchanged else self.harmless.last_logits()
        lengths = candidates.norm(dim=-1)
        self.real = lengths > 1e-5 * lengths.max()
        shape = candidates.shape[:2]
        n_harmful, n_harmless = len(self.harmful.tokens), len(self.harmless.tokens)
        self.values = {name: self.unchanged.new_full((*shape, n), torch.nan)
                       for name, n in zip(SCORES, (n_harmful, n_harmless, n_harmless))}
        if self.file and self.file.is_file():
            self._resume()
        elif not self.real.all():
            nothing = unchanged[0] if unchanged else self.harmful.last_logits()
            for name, values in (("bypass", self._metric(nothing)), ("induce", self._metric(self.unchanged)),
                                 ("kl", self.unchanged.new_zeros(n_harmless))):
                self.values[name][~self.real] = values

    @property
    def scores(self):
        return CandidateScores(*(self.values[name].mean(dim=-1) for name in SCORES))

    def measure(self, name, layer, index):
        """Measure "bypass", "induce" or "kl" of the candidate at (layer, position index), unless it was before."""
        if not self.values[name][layer, index].isnan().any():
            return
        candidate = self.candidates[layer, index]
        if name == "bypass":
            values = self._metric(self.harmful.last_logits(Ablation(candidate)))
        elif name == "induce":
            values = self._metric(self.harmless.last_logits(Addition(candidate, layer)))
        else:
            values = kl_divergence(self.unchanged, self.harmless.last_logits(Ablation(candidate)))
        self.values[name][layer, index] = values
        if self.file:
            self._save()

    def _metric(self, logits):
        return refusal_metric(logits, self.model.refusal_tokens)

    def _settings(self):
        """What makes it this search and no other: the model to the last weight, its refusal tokens, prompts, shape."""
        return {"search": fingerprint([self.version, self.harmful.tokens, self.harmless.tokens, self.candidates.shape])}

    def _save(self):
        draft = self.file.with_suffix(".part")
        save_file({**self.values, "candidates": self.candidates.contiguous()}, draft, metadata=self._settings())
        draft.replace(self.file)

    def _resume(self):
        try:
            with safe_open(self.file, "pt") as file:
                settings, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
            candidates, values = tensors.pop("candidates"), {name: tensors[name] for name in SCORES}
        except (SafetensorError, OSError, KeyError) as error:
            raise ValueError(f"{self.file} holds no scores ({error}): delete it to begin anew.") from error
        same = settings == self._settings() and torch.allclose(
            candidates, self.candidates, rtol=0, atol=1e-3 * self.candidates.norm(dim=-1).max().item())
        if not same:
            raise ValueError(f"{self.file} holds the scores of another search (other weights, prompts, candidates or "
                             "refusal tokens): name another file, or delete this one.")
        self.values = values


def check_candidates(model, candidates):
    """Raises ValueError for candidates of another shape than the model's, or that are not finite."""
    if candidates.dim() != 3 or candidates.shape[::2] != (model.n_layers, model.d_model):
        raise ValueError(f"Candidates for {model.name!r} are [{model.n_layers}, n_positions, {model.d_model}], not "
                         f"{list(candidates.shape)}: take the differences in means of this very model.")
    if not candidates.isfinite().all():
        raise ValueError(f"The candidates hold nan or infinity: {model.name!r} overflows in {model.lm.dtype}. Load it "
                         "with dtype=torch.bfloat16 or torch.float32.")


def score_candidates(model, candidates, harmful, harmless, batch_size=64, progress=False, file=None, unchanged=None):
    """Score all candidates [n_layers, n_positions, d_model] on validation prompts -> CandidateScores.

    Three forward passes for each candidate. file, unchanged, and what is raised: as in `Scorer`.
    """
    scorer = Scorer(model, candidates, harmful, harmless, batch_size, file, unchanged)
    for layer, index in tqdm(scorer.real.nonzero().tolist(), desc="scoring candidates", disable=not progress):
        for name in SCORES:
            scorer.measure(name, layer, index)
    return scorer.scores


def score_finalists(model, candidates, harmful, harmless, n_finalists, batch_size=64, progress=False, file=None,
                    unchanged=None):
    """Score the candidates of the best first-order estimates, as far as the paper's rule needs -> CandidateScores.

    A heat puts the finalists in order. Two at a time, they then get exact scores: first bypass of both; then, from the
    lower one on, induce, and kl where induce is above 0, until one passes the filters: it is the one that the
    rule takes. The scores of all others are nan.
    Raises ValueError as `Scorer`, and unless n_finalists is at least 1.
    """
    if n_finalists < 1:
        raise ValueError(f"{n_finalists} finalists cannot be scored: give at least 1, or None for every candidate.")
    scorer = Scorer(model, candidates, harmful, harmless, batch_size, file, unchanged)
    estimates = first_order(model, candidates, spread(harmful, N_ESTIMATE), spread(harmless, N_ESTIMATE))
    finalists = screen(estimates, scorer.real, n_finalists)
    finalists = heat(model, candidates, spread(harmful, N_HEAT), finalists, batch_size)
    with tqdm(total=len(finalists), desc="scoring finalists", disable=not progress) as bar:
        for start in range(0, len(finalists), AT_A_TIME):
            group = finalists[start:start + AT_A_TIME]
            if score_group(scorer, group):
                break
            bar.update(len(group))
    return scorer.scores


def heat(model, candidates, harmful, finalists, batch_size=64):
    """The finalists, a list of (layer, position index), in the order of bypass on a few prompts, the lowest first."""
    if not finalists:
        return []
    prompts, directions = every_pair(harmful, torch.stack([candidates[place] for place in finalists]))
    logits = last_logits(model, prompts, Ablation(directions), batch_size)
    bypass = refusal_metric(logits, model.refusal_tokens).view(len(finalists), -1).mean(dim=-1)
    return [finalists[rank] for rank in bypass.argsort().tolist()]


def score_group(scorer, finalists):
    """Measure what the rule needs of these finalists -> whether one passes the filters."""
    for place in finalists:
        scorer.measure("bypass", *place)
    for place in sorted(finalists, key=lambda place: scorer.scores.bypass[place].item()):
        scorer.measure("induce", *place)
        if scorer.scores.induce[place] > 0:
            scorer.measure("kl", *place)
        if scorer.scores.passing()[place]:
            return True
    return False


def spread(prompts, n):
    """n of the prompts, evenly spread over all of them; or all, if they are fewer."""
    prompts = list(prompts)
    n = min(n, len(prompts))
    return [prompts[k * len(prompts) // n] for k in range(n)]


def screen(estimates, real, n_finalists):
    """The most promising candidates by their first-order estimates -> a list of (layer, position index).

    Of the layers that the rule allows: first those whose estimate of induce is above 0, by the estimate of bypass.
    real: bool [n_layers, n_positions], which candidates there are.
    """
    _, induces, early = estimates.filters().values()
    order = sorted((real & early).nonzero().tolist(),
                   key=lambda place: (not induces[tuple(place)], estimates.bypass[tuple(place)].item()))
    return [tuple(place) for place in order[:n_finalists]]


# First order: by how much the metric would change if its gradients stayed what they are (attribution patching; Nanda
# 2023; Syed et al. 2023, arXiv 2310.10348).

def first_order_ablation(writes, gradients, direction):
    """To first order, by how much ablating a direction changes the refusal metric -> [n_prompts], nats.

    writes: all that is written to the residual stream, a list of [n_prompts, n_tokens, d_model]. gradients: the
    metric's, by each of them. Each write loses its part along r̂, (write · r̂) r̂; so the metric changes by
    -(gradient · r̂)(write · r̂), summed over writes and tokens.
    direction: [d_model], of any length; or several, [n_directions, d_model], for [n_prompts, n_directions].
    """
    unit = F.normalize(direction, dim=-1)
    return -sum((torch.inner(write, unit) * torch.inner(gradient, unit)).sum(dim=1)
                for write, gradient in zip(writes, gradients))


def first_order(model, candidates, harmful, harmless, batch_size=8):
    """Estimates of bypass and induce for all candidates, from one pass forward and one back -> CandidateScores.

    Of kl there is none, and it is nan: at an unchanged model kl is 0, and so is its gradient. They rank; they do not
    measure.
    candidates: [n_layers, n_positions, d_model].
    """
    directions = candidates.flatten(end_dim=1).to(model.device)
    bypass = []
    for metric, _, writes, gradients in refusal_gradients(model, harmful, batch_size):
        bypass.append(metric[:, None] + first_order_ablation(writes, gradients, directions))
    induce = []
    for metric, gradients, _, _ in refusal_gradients(model, harmless, batch_size):
        # adding r at a layer adds it at every token: the metric changes by gradient · r, summed over tokens
        slopes = torch.stack([gradient.sum(dim=1) for gradient in gradients], dim=1)  # [n_prompts, n_layers, d_model]
        induce.append(metric[:, None, None] + torch.einsum("nld,lpd->nlp", slopes, candidates.to(slopes)))
    shape = candidates.shape[:2]
    return CandidateScores(torch.cat(bypass).mean(dim=0).view(shape).cpu(), torch.cat(induce).mean(dim=0).cpu(),
                           torch.full(shape, torch.nan))


def refusal_gradients(model, instructions, batch_size=8):
    """Yield, batch after batch, the refusal metric and its gradients.

    metric            [n_prompts]
    stream_gradients  by each layer's input: a list of [n_prompts, n_tokens, d_model]
    writes            all that is written to the stream: the first layer's input, then of each layer what attention
                      and what the MLP writes; a list of the same shape
    write_gradients   by each of these

    All in float32 at the least, where the model's inputs are.
    Raises ValueError for a model on NDIF, whose gradients are not at hand.
    """
    if model.remote:
        raise ValueError(f"Gradients need the weights, and those of {model.name!r} are on NDIF: score every candidate "
                         "(screen=None).")
    for _, inputs in model.batches(model.tokens(instructions), batch_size):
        with torch.inference_mode(False), torch.enable_grad():  # whoever calls may have turned gradients off
            outcome = _batch_gradients(model, inputs)
        yield outcome


def _batch_gradients(model, inputs):
    with model.lm.trace(inputs, use_cache=False, logits_to_keep=1):
        streams, writes = nnsight.save([]), nnsight.save([])
        model.layers[0].input.requires_grad_()
        for layer in model.layers:
            streams.append(layer.input)
            for module in model.writers(layer):
                out = module.output
                writes.append(out[0] if isinstance(out, tuple) else out)
        logits = model.lm.output.logits[:, -1].save()
    metric = refusal_metric(at_least_float32(logits), model.refusal_tokens)
    gradients = torch.autograd.grad(metric.sum(), [*streams, *writes])
    metric, *tensors = (at_least_float32(tensor.detach()).to(model.device)
                        for tensor in (metric, *gradients, streams[0], *writes))
    gradients, writes = tensors[:len(gradients)], tensors[len(gradients):]
    stream_gradients, write_gradients = gradients[:len(streams)], gradients[len(streams):]
    return metric, stream_gradients, writes, [stream_gradients[0], *write_gradients]


def tokens_read(n_tokens, n_candidates, n_train, n_val):
    """How many tokens a model reads until the paper's search, which scores every candidate, has chosen.

    With them grow the hours.
    n_tokens: of a prompt, on average. n_candidates: n_layers times n_positions, less those at layer 0 where the
    template's tokens are the same in every prompt. n_train, n_val: prompts of each side.
    """
    once = 2 * (n_train + n_val)  # is it refused?
    means = 2 * n_train
    unchanged = 2 * n_val  # the logits that the scores start from
    scores = 3 * n_candidates * n_val  # bypass, induce, kl
    return n_tokens * (once + means + unchanged + scores)
