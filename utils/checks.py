"""The checks behind `check`: for each exercise its reference, small planted inputs, and typical mistakes.

A mistake is written as the function that a learner who makes it would write. If the learner's answer differs
from the reference but equals a mistaken one, they are told that mistake's sentence; otherwise what differs: kind,
shape or values. The tests hand every mistake in as an answer, and expect its sentence.
"""
import functools
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from itertools import repeat
from pathlib import Path

import nnsight
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from utils import activations, directions, evaluation, interventions, models, probes, suffixes
from utils.models import load_model

CHECKS = {}  # name of the exercise -> Check


@dataclass(frozen=True)
class Check:
    """One exercise: where its reference lives, what it is tried on, and what usually goes wrong."""
    reference: Callable  # the function of utils
    cases: Callable  # () -> list of argument tuples, made anew at each call
    mistakes: dict = field(default_factory=dict)  # sentence -> mistaken function
    axes: str = ""  # what the axes of the answer mean, e.g. "[n_layers, n_positions, d_model]"
    tolerance: float = 1e-4  # relative and absolute
    call: Callable = lambda function, *args: function(*args)  # how it is tried: some functions need a trace around them


def register(reference, cases, mistakes, **options):
    """Make an exercise of a function of utils; its arguments are those of `Check`."""
    CHECKS[reference.__name__] = Check(reference, cases, mistakes, **options)


def find_fault(check, attempt):
    """One sentence on what is wrong with `attempt`, or None if it agrees with the reference on every case."""
    tried = check.cases()
    given = [outcome(check, attempt, args) for args in tried]
    expected = [check.call(check.reference, *args) for args in check.cases()]
    faults = list(map(difference, given, expected, repeat(check)))
    if any(faults):
        case = next(i for i, fault in enumerate(faults) if fault)
        return likeliest_mistake(check, given, case) or shown(check.cases()[case]) + faults[case]
    if any(map(difference, tried, check.cases(), repeat(check))):
        return "the answer is right, but your function changes its input in place. Write x = x - y, not x -= y."
    return None


def likeliest_mistake(check, given, case):
    """The mistake that answers like the learner on the case that went wrong, and on the most others; or None.

    A single True or False says little: there, all cases must agree.
    """
    likeness = {}
    for sentence, mistaken in check.mistakes.items():
        mistakes = [outcome(check, mistaken, args) for args in check.cases()]
        same = [not difference(*pair, check) for pair in zip(given, mistakes)]
        if all(same) if isinstance(given[case], bool) else same[case]:
            likeness[sentence] = sum(same)
    return max(likeness, key=likeness.get, default=None)


def shown(args):
    """The inputs of a case, in words, where they are short enough to be read."""
    text = ", ".join(map(repr, args))
    plain = all(isinstance(arg, (str, int, float, list)) for arg in args)
    return f"for {text}: " if plain and len(text) <= 70 else ""


def outcome(check, function, args):
    """What `function` answers, or the exception it stops with (so that a mistake may be one that stops)."""
    try:
        return check.call(function, *args)
    except Exception as error:
        return error


def difference(given, expected, check):
    """One sentence on how the answer `given` differs from the `expected` one, or None if they agree."""
    if isinstance(given, Exception):
        return None if type(given) is type(expected) and str(given) == str(expected) else stopped(given)
    if given is None and expected is not None:
        return "your function returns nothing. Is a `return` missing?"
    numbers = expected if isinstance(expected, (tuple, list)) and expected else [expected]
    if isinstance(expected, torch.Tensor) or all(isinstance(x, (int, float)) for x in numbers):
        return difference_of_numbers(given, expected, check)
    if isinstance(expected, (tuple, list)):
        if not isinstance(given, (tuple, list)) or len(given) != len(expected):
            return f"your answer is {kind(given)}, and should be {kind(expected)}."
        return next(filter(None, (difference(g, e, check) for g, e in zip(given, expected))), None)
    if has_parts(expected):
        return difference_of_parts(vars(given) if has_parts(given) else given, vars(expected), check)
    if isinstance(expected, dict):
        return difference_of_parts(given, expected, check)
    return None if given == expected else f"your answer is {given!r:.80}, and should be {expected!r:.80}."


def difference_of_numbers(given, expected, check):
    """`difference` for a number, a tensor, or a tuple of numbers; a tensor [2] and a tuple of 2 count as the same."""
    yes_or_no = getattr(expected, "dtype", None) == torch.bool
    if yes_or_no and getattr(given, "dtype", torch.bool) != torch.bool:
        return "your answer holds numbers. Return true or false for each, as a comparison or `&` gives them."
    try:
        given = torch.as_tensor(given).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return f"your answer is {kind(given)}, and should be {kind(expected)}."
    expected = torch.as_tensor(expected).to("cpu", torch.float64)
    if given.shape != expected.shape:
        meaning = f" = {check.axes}" if check.axes else ""
        return f"the shape of your answer is {list(given.shape)}, and should be {list(expected.shape)}{meaning}."
    if torch.allclose(given, expected, rtol=check.tolerance, atol=check.tolerance, equal_nan=True):
        return None
    if given.isnan().any() and not expected.isnan().any():
        return "your answer holds nan: a division by zero, or the logarithm of a negative number?"
    worst = (given - expected).abs().argmax()
    return f"the numbers differ, at worst {given.flatten()[worst]:.4g} in place of {expected.flatten()[worst]:.4g}."


def has_parts(x):
    return is_dataclass(x) or isinstance(x, (interventions.Ablation, interventions.Addition))


def difference_of_parts(given, expected, check):
    """`difference` for dicts and what `has_parts`: the first part that differs, by its name."""
    if not isinstance(given, dict) or given.keys() != expected.keys():
        return f"your answer is {kind(given)}, and should hold {', '.join(map(str, expected))}."
    faults = ((name, difference(given[name], expected[name], check)) for name in expected)
    return next((f"{name}: {fault}" for name, fault in faults if fault), None)


def kind(x):
    """What `x` is, in a learner's words."""
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {list(x.shape)}"
    if isinstance(x, (tuple, list, dict)):
        return f"a {type(x).__name__} of {len(x)}"
    return f"of type {type(x).__name__}"


def stopped(error):
    """Where the learner's function stopped, and why."""
    libraries = {"site-packages", "dist-packages"}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename != __file__ and not libraries & set(Path(frame.filename).parts)]
    own = [frame.line for frame in frames if frame.name == frames[0].name]  # an error in a trace shows its `with` too
    line = f" at `{own[-1]}`" if own and own[-1] else ""
    return f"your function stops{line} with {type(error).__name__}: {error}"


# What the functions are tried on: small tensors of fixed random numbers, and the organism with a few short prompts.

def randn(*shape, seed=0):
    """Random numbers that leave the learner's own seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def model():
    """The model that checks use, loaded once."""
    return load_model("organism")


PROMPTS = ["Explain how to bake a cake.", "Please tell me how to steal a bicycle from a neighbour.", "Hello."]


# models

register(
    models.shared_tail,
    cases=lambda: [([5, 1, 8, 2, 3, 4], [5, 7, 1, 9, 2, 3, 4]), ([9, 2, 6], [2, 9, 4, 6]), ([2, 3], [1, 2, 3]),
                   ([1, 2], [3, 4, 5])],
    mistakes={
        "you compared from the beginning. Compare the last tokens, then the last but one, and so on.":
            lambda one, two: [a for i, (a, b) in enumerate(zip(one, two)) if one[:i + 1] == two[:i + 1]],
        "the last token comes first in your answer. Give them in the order in which they stand.":
            lambda one, two: models.shared_tail(one, two)[::-1],
        "you went on past the first difference. Stop there, even if tokens before it agree by chance.":
            lambda one, two: [a for a, b in zip(one[::-1], two[::-1]) if a == b][::-1],
        "you kept every token that is somewhere in both. Only those at the end count, place by place.":
            lambda one, two: [token for token in one if token in two],
        "this is how many there are. Return the tokens themselves.":
            lambda one, two: len(models.shared_tail(one, two)),
        "where nothing is shared, your answer is the whole of `one`, for one[-0:] is one[0:]. Return an empty list.":
            lambda one, two: one[-len(models.shared_tail(one, two)):],
    },
)

register(
    models.memory_needed,
    cases=lambda: [(1_000_000, torch.float32), (3_000, torch.bfloat16)],
    mistakes={
        "these are bits. A byte has eight of them, and `itemsize` counts bytes.":
            lambda n_weights, dtype: 8 * n_weights * dtype.itemsize,
        "each weight takes 4 bytes in your answer, whatever the dtype. `dtype.itemsize` says how many.":
            lambda n_weights, dtype: 4 * n_weights,
        "each weight takes 2 bytes in your answer, whatever the dtype. `dtype.itemsize` says how many.":
            lambda n_weights, dtype: 2 * n_weights,
        "these are gigabytes. Return bytes.":
            lambda n_weights, dtype: n_weights * dtype.itemsize / 1e9,
        "these are gibibytes, of 2 to the 30 bytes. Return bytes.":
            lambda n_weights, dtype: n_weights * dtype.itemsize / 2**30,
        "this is what one weight takes. There are n_weights of them.":
            lambda n_weights, dtype: dtype.itemsize,
    },
)

# activations

def blockwise(read):
    """A function like `trace_residual_stream` that reads `read(layer)` of each layer."""
    def trace_residual_stream(model, inputs, positions):
        with model.lm.trace(inputs, use_cache=False):
            streams = nnsight.save([read(layer)[:, positions] for layer in model.layers])
        return torch.stack(streams, dim=1)
    return trace_residual_stream


register(
    activations.trace_residual_stream,
    cases=lambda: [(model(), model().encode(PROMPTS), [-2, -1])],
    axes="[n_prompts, n_layers, n_positions, d_model]",
    mistakes={
        "you read each layer's output. x^(l) is the stream at the start of layer l: its input.":
            blockwise(lambda layer: layer.output),
        "your axes are in the order [n_layers, n_prompts, ...]. Stack the layers along dim=1, after the prompts.":
            lambda *args: activations.trace_residual_stream(*args).transpose(0, 1),
        "you keep one position only. `layer.input[:, positions]` keeps all that were asked for.":
            lambda *args: activations.trace_residual_stream(*args)[:, :, -1],
        "you averaged over the prompts already. Keep one row for each.":
            lambda *args: activations.trace_residual_stream(*args).mean(dim=0),
    },
)

register(
    activations.residual_stream,
    cases=lambda: [(model(), PROMPTS), (model(), PROMPTS, [-1], 2)],
    axes="[n_prompts, n_layers, n_positions, d_model]",
    mistakes={
        "you read each layer's output. x^(l) is the stream at the start of layer l: its input.":
            lambda model, prompts, positions=None, batch_size=64:
                blockwise(lambda layer: layer.output)(model, model.encode(prompts), positions or model.positions),
        "your axes are in the order [n_layers, n_prompts, ...]. Stack the layers along dim=1, after the prompts.":
            lambda *args: activations.residual_stream(*args).transpose(0, 1),
        "you keep the last position only. Without `positions`, keep all of model.positions.":
            lambda *args: activations.residual_stream(*args[:2], [-1]),
        "you averaged over the prompts already. Keep one row for each.":
            lambda *args: activations.residual_stream(*args).mean(dim=0),
    },
)

register(
    activations.mean_residual_stream,
    cases=lambda: [(model(), PROMPTS), (model(), PROMPTS, [-1], 2)],
    axes="[n_layers, n_positions, d_model]",
    mistakes={
        "you did not average over the prompts: the first axis of your answer still counts them.":
            lambda *args: activations.residual_stream(*args),
        "you averaged over the layers (dim 1) rather than the prompts (dim 0).":
            lambda *args: activations.residual_stream(*args).mean(dim=1),
        "you averaged the batches' means, but the last batch is smaller. Add up the sums, then divide by the number "
        "of prompts.":
            lambda model, prompts, positions=None, batch_size=64: torch.stack([
                activations.residual_stream(model, batch, positions).mean(dim=0) for batch in
                (prompts[start:start + batch_size] for start in range(0, len(prompts), batch_size))]).mean(dim=0),
    },
)

# directions

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
    return directions.CandidateScores(bypass, induce, kl)


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


def filters():
    """Three filters on ten candidates, each of which fails some other ones, alone or with others."""
    met = {"kl": torch.ones(5, 2), "induce": torch.ones(5, 2), "layer": torch.ones(5, 2)}
    for condition, failing in {"kl": (0, 1, 2, 7), "induce": (2, 3, 7), "layer": (7, 8, 9)}.items():
        met[condition].view(-1)[list(failing)] = 0
    return {condition: who.bool() for condition, who in met.items()}


register(
    directions.kept_out_by_one,
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
            lambda filters: {name: int(who.sum()) for name, who in directions.kept_out_by_one(filters).items()},
    },
)


def tokens_with(once=2, means=2, unchanged=2, scores=3):
    """`tokens_read` with other counts of how often a prompt is read."""
    return lambda n_tokens, n_candidates, n_train, n_val: n_tokens * (
        once * (n_train + n_val) + means * n_train + unchanged * n_val + scores * n_candidates * n_val)


register(
    directions.tokens_read,
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
            lambda n_tokens, *counts: directions.tokens_read(1, *counts),
        "the scores are computed for every candidate, not once.":
            lambda n_tokens, n_candidates, *counts: directions.tokens_read(n_tokens, 1, *counts),
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

# interventions

register(
    interventions.ablate,
    cases=lambda: [(randn(3, 4, 5), 3 * randn(5, seed=1))],
    axes="[batch, n_tokens, d_model]",
    mistakes={
        "the direction is not scaled to length 1 first: r̂ = r / |r|.":
            lambda x, r: x - (x @ r)[..., None] * r,
        "r̂ stands twice in the formula, and you scaled only one of the two to length 1.":
            lambda x, r: x - (x @ r)[..., None] * r / r.norm(),
        "you returned the part along the direction. Return x without it.":
            lambda x, r: (x @ r)[..., None] * r / (r @ r),
        "the sign is flipped: you added the part along the direction rather than taking it away.":
            lambda x, r: x + (x @ r)[..., None] * r / (r @ r),
        "you subtracted r̂ itself, whatever x holds of it. Subtract r̂ times (r̂ · x), which is different for each token.":
            lambda x, r: x - r / r.norm(),
    },
)

register(
    interventions.add,
    cases=lambda: [(randn(3, 4, 5), 3 * randn(5, seed=1)), (randn(3, 4, 5), 3 * randn(5, seed=1), -0.5)],
    axes="[batch, n_tokens, d_model]",
    mistakes={
        "you scaled the direction to length 1. In activation addition its length counts: add r itself.":
            lambda x, r, coefficient=1.0: x + coefficient * r / r.norm(),
        "the coefficient is not used.":
            lambda x, r, coefficient=1.0: x + r,
        "the coefficient multiplies the sum. Only the direction is multiplied.":
            lambda x, r, coefficient=1.0: coefficient * (x + r),
        "you added the direction at the last token only. Add it at every position.":
            lambda x, r, coefficient=1.0: torch.cat([x[:, :-1], x[:, -1:] + coefficient * r], dim=1),
        "the sign is flipped: you subtracted the direction.":
            lambda x, r, coefficient=1.0: x - coefficient * r,
    },
)

register(
    interventions.orthogonalize,
    cases=lambda: [(randn(5, 5), 3 * randn(5, seed=1)), (randn(5, 7), 3 * randn(5, seed=1)),
                   (randn(5), 3 * randn(5, seed=1))],
    axes="[d_model, n_inputs], as it came in",
    mistakes={
        "the direction is not scaled to length 1 first: r̂ = r / |r|.":
            lambda weight, r: weight - torch.tensordot(r, r @ weight, dims=0),
        "r̂ stands twice in the formula, and you scaled only one of the two to length 1.":
            lambda weight, r: weight - torch.tensordot(r, r @ weight, dims=0) / r.norm(),
        "you took the direction out of what the matrix reads, its rows. Take it out of what it writes, its columns: "
        "r̂ on the left of W.":
            lambda weight, r: weight - torch.outer(weight @ r, r) / (r @ r),
        "you returned what the matrix writes along the direction. Return the matrix without it.":
            lambda weight, r: torch.tensordot(r, r @ weight, dims=0) / (r @ r),
        "the sign is flipped: you added r̂ r̂ᵀW rather than taking it away.":
            lambda weight, r: weight + torch.tensordot(r, r @ weight, dims=0) / (r @ r),
        "matrices are right, but a bias [d_model] is not: r̂ times (r̂ · b). torch.tensordot(r̂, r̂ @ W, dims=0) does "
        "both.":
            lambda weight, r: weight - torch.outer(r, r @ weight) / (r @ r),
    },
)

register(
    interventions.shifted_bias,
    cases=lambda: [(None, randn(5)), (randn(5), randn(5, seed=1))],
    axes="[d_out]",
    mistakes={
        "where there is a bias already, add to it: it must not be lost.":
            lambda bias, vector: vector,
        "a linear layer may have no bias: None. Then the new bias is the vector itself.":
            lambda bias, vector: bias + vector,
        "you left a bias that was there as it is.":
            lambda bias, vector: vector if bias is None else bias,
        "the sign is flipped.":
            lambda bias, vector: -vector if bias is None else bias - vector,
    },
)


def linears(model, *names):
    """Weights of the layers' linear parts of these names, as `residual_writers` gives them."""
    parts = {"o_proj": lambda layer: layer.self_attn.o_proj, "down_proj": lambda layer: layer.mlp.down_proj,
             "up_proj": lambda layer: layer.mlp.up_proj}
    return [parts[name](layer)._module.weight.detach() for layer in model.layers for name in names]


def embedding(model):
    return [model.lm.model.embed_tokens._module.weight.detach()]


def views_of(residual_writers, model):
    """The answer, and how many of its tensors are the model's own memory."""
    views = residual_writers(model)
    return list(views), len({view.data_ptr() for view in views} & {own.data_ptr() for own in model.lm.parameters()})


register(
    interventions.residual_writers,
    cases=lambda: [(model(),)],
    call=views_of,
    mistakes={
        "the embedding is missing: it writes the first vector of every token.":
            lambda model: linears(model, "o_proj", "down_proj"),
        "the embedding is a table with a row for each token, [vocab, d_model]. Transpose it: what it writes shall be "
        "its columns.":
            lambda model: embedding(model) + linears(model, "o_proj", "down_proj"),
        "attention's output matrices are missing: `layer.self_attn.o_proj`.":
            lambda model: [embedding(model)[0].T, *linears(model, "down_proj")],
        "the MLPs' output matrices are missing: `layer.mlp.down_proj`.":
            lambda model: [embedding(model)[0].T, *linears(model, "o_proj")],
        "up_proj reads the residual stream; it does not write to it. Take down_proj.":
            lambda model: [embedding(model)[0].T, *linears(model, "o_proj", "up_proj")],
        "the order is that of the layers: attention and MLP of layer 0, then of layer 1, and so on.":
            lambda model: [embedding(model)[0].T, *linears(model, "o_proj"), *linears(model, "down_proj")],
        "the unembedding reads the last stream, it does not write to it. Leave it out.":
            lambda model: [*interventions.residual_writers(model), embedding(model)[0].T],
        "these are copies. Return the model's own memory, or an edit of them changes nothing: no `.clone()`.":
            lambda model: [view.clone() for view in interventions.residual_writers(model)],
    },
)


def direction(seed=1):
    """A random direction in the model, long enough to change what it says."""
    return 10 * randn(model().d_model, seed=seed)


def all_logits(model, prompts, intervention=None, batch_size=64):
    """Logits at every position -> [n_prompts, n_tokens, vocab]."""
    with model.lm.trace(model.encode(prompts), use_cache=False):
        if intervention is not None:
            intervention.apply(model)
        logits = model.lm.output.logits.save()
    return logits


register(
    interventions.last_logits,
    cases=lambda: [(model(), PROMPTS), (model(), PROMPTS, interventions.Ablation(direction()))],
    axes="[n_prompts, vocab]",
    mistakes={
        "the intervention changes nothing. Inside the trace call intervention.apply(model), then read the logits.":
            lambda model, prompts, intervention=None, batch_size=64: all_logits(model, prompts)[:, -1],
        "these are the logits at every position. Keep the last one: [:, -1].":
            all_logits,
        "these are the logits at the first position. The last is -1.":
            lambda *args: all_logits(*args)[:, 0],
        "these are probabilities. Return the logits as they are.":
            lambda *args: all_logits(*args)[:, -1].softmax(dim=-1),
    },
)


def logits_with(change, model, *args):
    """Logits [2 prompts, n_tokens, vocab] of a trace in which `change(model, *args)` is called."""
    with model.lm.trace(model.encode(PROMPTS[:2]), use_cache=False):
        change(model, *args)
        logits = model.lm.output.logits.save()
    return logits


def ablate_at(places="input attention mlp", layers=slice(None), change=interventions.ablate):
    """Like `ablate_everywhere`, at some of the places and layers, or with another change."""
    def ablate_everywhere(model, direction):
        for layer in model.layers[layers]:
            attention, mlp = model.writers(layer)
            if "input" in places:
                layer.input = change(layer.input, direction)
            if "attention" in places:
                layer.self_attn.output = (change(attention.output[0], direction), *attention.output[1:])
            if "mlp" in places:
                mlp.output = change(mlp.output, direction)
    return ablate_everywhere


def without_tuple(model, direction):
    """`ablate_everywhere`, but what attention gives is no tuple any more."""
    for layer in model.layers:
        layer.input = interventions.ablate(layer.input, direction)
        layer.self_attn.output = interventions.ablate(layer.self_attn.output[0], direction)
        layer.mlp.output = interventions.ablate(layer.mlp.output, direction)


def last_position_only(x, direction):
    return torch.cat([x[:, :-1], interventions.ablate(x[:, -1:], direction)], dim=1)


def mlp_first(model, direction):
    for layer in model.layers:
        layer.input = interventions.ablate(layer.input, direction)
        layer.mlp.output = interventions.ablate(layer.mlp.output, direction)
        layer.self_attn.output = (interventions.ablate(layer.self_attn.output[0], direction), None)


register(
    interventions.ablate_everywhere,
    cases=lambda: [(model(), direction())],
    call=logits_with,
    axes="[n_prompts, n_tokens, vocab]",
    mistakes={
        "nothing is changed. Assign what `ablate` returns: layer.input = ablate(layer.input, direction).":
            ablate_at(change=lambda x, direction: x),
        "attention's output is a tuple (what it writes, its pattern). You put a tensor in its place, and two prompts "
        "were taken for the tuple's two parts: no error, and a wrong result. Assign (ablate(out[0], direction), "
        "*out[1:]).":
            without_tuple,
        "you ablate each layer's input alone. Within a layer the MLP reads what attention has just written: ablate "
        "what the two write as well.":
            ablate_at("input"),
        "you ablate what attention and MLP write, but the first layer's input, the embeddings, still has the "
        "direction.":
            ablate_at("attention mlp"),
        "you left out what attention writes.":
            ablate_at("input mlp"),
        "you left out what the MLP writes.":
            ablate_at("input attention"),
        "you ablate in the last layer only. Indent all three assignments under the loop.":
            ablate_at(layers=slice(-1, None)),
        "you ablate in the first layer only: later layers write the direction again.":
            ablate_at(layers=slice(1)),
        "you ablate at the last token only. Take them all.":
            ablate_at(change=last_position_only),
        "the order is that of the computation: in each layer its input, then attention, then the MLP. You asked for "
        "attention's output when the model had run past it.":
            mlp_first,
    },
)


def adding(where=lambda layer: layer, change=lambda x, direction, coefficient: interventions.add(
        x, direction, coefficient), part="input"):
    """`add_at_layer` with a fault."""
    def add_at_layer(model, direction, layer, coefficient=1.0):
        here = model.layers[where(layer)]
        setattr(here, part, change(getattr(here, part), direction, coefficient))
    return add_at_layer


register(
    interventions.add_at_layer,
    cases=lambda: [(model(), direction(), 2), (model(), direction(), 1, -0.5)],
    call=logits_with,
    axes="[n_prompts, n_tokens, vocab]",
    mistakes={
        "nothing is changed. Assign what `add` returns: layer.input = add(layer.input, direction, coefficient).":
            adding(change=lambda x, direction, coefficient: x),
        "you add to the layer's output, which is the next layer's input. r was read at the start of the layer: its "
        "input.":
            adding(part="output"),
        "the direction is added at layer 0, whatever the layer.":
            adding(where=lambda layer: 0),
        "the coefficient is not used.":
            adding(change=lambda x, direction, coefficient: x + direction),
        "you add at the last token only. Take them all.":
            adding(change=lambda x, direction, coefficient: torch.cat(
                [x[:, :-1], x[:, -1:] + coefficient * direction], dim=1)),
        "you scaled the direction to length 1. In activation addition its length counts.":
            adding(change=lambda x, direction, coefficient: x + coefficient * F.normalize(direction, dim=-1)),
        "the sign is flipped: you subtracted the direction.":
            adding(change=lambda x, direction, coefficient: x - coefficient * direction),
    },
)


def generated_ids(model, prompts, max_new_tokens, intervention=None):
    """Prompts and answers as token ids, the intervention acting on the prompt alone."""
    with model.lm.generate(max_new_tokens=max_new_tokens, do_sample=False) as tracer:
        with tracer.invoke(model.encode(prompts)):
            if intervention is not None:
                intervention.apply(model)
        with tracer.invoke():
            ids = tracer.result.save()
    return ids


def longest(model, prompts):
    """The number of tokens of the longest prompt."""
    return max(map(len, model.tokens(prompts)))


register(
    interventions.generate,
    cases=lambda: [(model(), PROMPTS, None, 12), (model(), PROMPTS, interventions.Addition(direction(), 1), 12)],
    mistakes={
        "the intervention changes nothing. Call intervention.apply(model) inside the trace.":
            lambda model, prompts, intervention=None, max_new_tokens=64, batch_size=64:
                interventions.generate(model, prompts, None, max_new_tokens),
        "the intervention acts on the prompt, but not on the generated tokens. Put it under `for _ in tracer.all():`.":
            lambda model, prompts, intervention=None, max_new_tokens=64, batch_size=64: model.decode(
                generated_ids(model, prompts, max_new_tokens, intervention)[:, longest(model, prompts):]),
        "the prompt is still in front of the answer. Cut off as many tokens as went in.":
            lambda model, prompts, intervention=None, max_new_tokens=64, batch_size=64: model.decode(
                generated_ids(model, prompts, max_new_tokens)),
    },
)

def saved_after_the_loop(model, inputs, change, max_new_tokens=64):
    """`trace_generation` with a statement that is never reached."""
    with model.lm.generate(max_new_tokens=max_new_tokens, do_sample=False) as tracer:
        with tracer.invoke(inputs):
            for _ in tracer.all():
                change.apply(model)
            ids = tracer.result.save()
    return ids


register(
    interventions.trace_generation,
    # Never change=None: `for _ in tracer.all():` with nothing to do in it would go round for ever.
    cases=lambda: [(model(), model().encode(PROMPTS), interventions.Addition(direction(), 1), 12)],
    axes="[n_prompts, n_tokens of prompt and answer]",
    mistakes={
        "the change acts on the prompt, but not on the generated tokens. Put it under `for _ in tracer.all():`.":
            lambda model, inputs, change, max_new_tokens=64:
                generated_ids(model, PROMPTS, max_new_tokens, change),
        "nothing is changed. Call change.apply(model) in the loop.":
            lambda model, inputs, change, max_new_tokens=64: generated_ids(model, PROMPTS, max_new_tokens),
        "nothing runs after an open loop: `ids` was never saved. Save it in a second `with tracer.invoke():`, which "
        "stands beside the first one.":
            saved_after_the_loop,
        "these are the answers alone. Return the ids of prompts and answers, all of tracer.result.":
            lambda model, inputs, change, max_new_tokens=64:
                interventions.trace_generation(model, inputs, change, max_new_tokens)[:, inputs["input_ids"].shape[1]:],
        "these are texts. Return token ids; decoding them comes later.":
            lambda *args: args[0].decode(interventions.trace_generation(*args)),
        "max_new_tokens is not used.":
            lambda model, inputs, change, max_new_tokens=64:
                interventions.trace_generation(model, inputs, change, 64),
    },
)

register(
    interventions.every_pair,
    cases=lambda: [(PROMPTS, randn(2, 4))],
    mistakes={
        "you repeated the directions in turn: r1, r2, r1, r2. All prompts come with r1, then all with r2: "
        "repeat_interleave.":
            lambda prompts, directions: (prompts * len(directions), directions.repeat(len(prompts), 1)),
        "you repeated each prompt in a row. All prompts come with r1, then all with r2.":
            lambda prompts, directions: ([p for p in prompts for _ in directions],
                                         directions.repeat_interleave(len(prompts), dim=0)),
        "you paired the first prompt with the first direction, and so on. Pair every prompt with every direction.":
            lambda prompts, directions: (prompts, directions),
    },
)

# evaluation

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

# probes

def planted_prompts(n=60, d_model=8, seed=0):
    """Activations of two kinds of prompts, apart along one axis; entries of very different sizes."""
    labels = [i % 2 == 0 for i in range(n)]
    x = randn(n, d_model, seed=seed) + torch.tensor(labels)[:, None] * F.one_hot(torch.tensor(2), d_model)
    return x * torch.logspace(-2, 2, d_model), labels


def probabilities(fit_probe, x, labels):
    """What the fitted probe says of other prompts."""
    return torch.tensor(fit_probe(x, labels).predict_proba(planted_prompts(seed=1)[0].numpy()))


register(
    probes.fit_probe,
    cases=lambda: [planted_prompts()],
    call=probabilities,
    axes="[n_prompts, 2]",
    tolerance=0.02,
    mistakes={
        "the entries are not scaled: large ones count for more only because they are large. StandardScaler() first.":
            lambda x, labels: LogisticRegression(C=0.1, max_iter=1000).fit(x, labels),
        "C is not 0.1: LogisticRegression(C=0.1, max_iter=1000).":
            lambda x, labels: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, labels),
        "True and False are swapped.":
            lambda x, labels: probes.fit_probe(x, [not label for label in labels]),
        "the pipeline is not fitted: `.fit(x.numpy(), labels)`.":
            lambda x, labels: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
    },
)


@functools.cache
def planted_probe():
    return probes.fit_probe(*planted_prompts())


register(
    probes.probe_direction,
    cases=lambda: [(planted_probe(),)],
    axes="[d_model]",
    mistakes={
        "the coefficients belong to scaled entries. Divide by the scaler's `.scale_` before you normalise.":
            lambda probe: F.normalize(torch.tensor(probe[1].coef_[0], dtype=torch.float32), dim=0),
        "you multiplied by the scale. Divide: an entry that was made smaller has a coefficient that is too large.":
            lambda probe: F.normalize(torch.tensor(probe[1].coef_[0] * probe[0].scale_, dtype=torch.float32), dim=0),
        "the length is not 1. F.normalize(..., dim=0).":
            lambda probe: torch.tensor(probe[1].coef_[0] / probe[0].scale_, dtype=torch.float32),
        "`coef_` is [1, d_model]. Take its row: coef_[0].":
            lambda probe: F.normalize(torch.tensor(probe[1].coef_ / probe[0].scale_, dtype=torch.float32), dim=1),
        "the sign is flipped: it should point to True.":
            lambda probe: -probes.probe_direction(probe),
    },
)

TEXTS = (["steal a bike", "steal a base in baseball", "kill a weed", "kill a neighbour", "bake a cake", "rob a bank",
          "rob the goalkeeper of a goal", "poison a cat cat cat"], [True, False, False, True, False, True, False, True])


def word_probabilities(fit_words, texts, labels):
    """What the fitted words-only probe says of other texts."""
    return torch.tensor(fit_words(texts, labels).predict_proba(["steal a cat", "Steal a cake cake cake", "rob a goal"]))


register(
    probes.fit_words,
    cases=lambda: [TEXTS],
    call=word_probabilities,
    axes="[n_texts, 2]",
    tolerance=0.005,
    mistakes={
        "count a word once, however often it stands there: CountVectorizer(binary=True).":
            lambda texts, labels: make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000)).fit(
                texts, labels),
        "this reads letters, not words. CountVectorizer takes words unless told otherwise.":
            lambda texts, labels: make_pipeline(CountVectorizer(binary=True, analyzer="char"), LogisticRegression(
                max_iter=1000)).fit(texts, labels),
        "True and False are swapped.":
            lambda texts, labels: probes.fit_words(texts, [not label for label in labels]),
        "the pipeline is not fitted: `.fit(texts, labels)`.":
            lambda texts, labels: make_pipeline(CountVectorizer(binary=True), LogisticRegression(max_iter=1000)),
    },
)


def shuffle_traits(shuffle_balanced, labels):
    """What makes shuffled labels a fair control, whatever the draw."""
    one, again, other = (list(map(bool, shuffle_balanced(labels, seed))) for seed in (0, 0, 1))
    flipped = {side: sum(a != b for a, b in zip(one, labels) if b == side) for side in (True, False)}
    return len(one), flipped[True], flipped[False], one == again, one == other


def shuffled_plainly(labels, seed=0):
    return [labels[place] for place in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


register(
    probes.shuffle_balanced,
    cases=lambda: [([True] * 21 + [False] * 40,), ([False, True] * 32,)],
    call=shuffle_traits,
    mistakes={
        "this is a plain shuffle: by chance more than half of a side may keep its label. Flip exactly half of each.":
            shuffled_plainly,
        "you flipped half of all labels, but not half of each side.":
            lambda labels, seed=0: [label != (place < len(labels) // 2) for place, label in
                                    enumerate(shuffled_plainly(labels, seed))],
        "you flipped all the labels. A probe could learn them as well as the true ones. Flip half of each side.":
            lambda labels, seed=0: [not label for label in labels],
        "the seed is not used: another seed should flip others.":
            lambda labels, seed=0: probes.shuffle_balanced(labels),
        "the labels are unchanged.":
            lambda labels, seed=0: list(labels),
    },
)

CLAIMS = ([0.05, 0.15, 0.31, 0.35, 0.5, 0.55, 0.9, 0.95, 1.0],
          [False, False, True, False, True, False, True, True, True])


def binned(place=lambda p, n_bins: min(int(p * n_bins), n_bins - 1), stand_for=None):
    """`calibration` with a fault."""
    def calibration(probabilities, labels, n_bins=5):
        bins = [[(p, label) for p, label in zip(probabilities, labels) if place(p, n_bins) == number]
                for number in range(n_bins)]
        return [(stand_for(number, n_bins) if stand_for else sum(p for p, _ in some) / len(some),
                 evaluation.Rate.of(label for _, label in some)) for number, some in enumerate(bins) if some]
    return calibration


register(
    probes.calibration,
    cases=lambda: [CLAIMS, (*CLAIMS, 10)],
    mistakes={
        "a probability of exactly 1 falls out of the last interval: int(p * n_bins) is then n_bins.":
            binned(place=lambda p, n_bins: int(p * n_bins)),
        "n_bins is not used.":
            lambda probabilities, labels, n_bins=5: probes.calibration(probabilities, labels),
        "this is the middle of each interval. Take the mean of the probabilities in it.":
            binned(stand_for=lambda number, n_bins: (number + 0.5) / n_bins),
        "each pair is (mean probability, Rate): yours are the other way round.":
            lambda *args: [pair[::-1] for pair in probes.calibration(*args)],
        "return a Rate, Rate.of(labels): it keeps how many there are, and so its interval.":
            lambda *args: [(mean, rate.value) for mean, rate in probes.calibration(*args)],
    },
)


def planted_targets():
    """Logits and targets of three prompts, the second with a shorter target."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([[1, 4, 2], [3, 0, -100], [2, 2, 1]])
    return 3 * torch.randn(3, 3, 6, generator=generator), targets


def token_losses(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")


register(
    suffixes.target_loss,
    cases=lambda: [planted_targets(), tuple(x[:1] for x in planted_targets())],
    axes="[n_prompts]",
    mistakes={
        "a shorter target is divided by the length of the longest. Divide by how many of its tokens are not -100.":
            lambda logits, targets: token_losses(logits, targets).mean(dim=1),
        "this is the sum over the tokens: a long target would count more. Divide by how many there are.":
            lambda logits, targets: token_losses(logits, targets).sum(dim=1),
        "the -100 count as token 0. Leave them out: ignore_index=-100.":
            lambda logits, targets: token_losses(logits, targets.clamp(min=0)).mean(dim=1),
        "this is one number for all prompts. Keep one for each: reduction=\"none\".":
            lambda logits, targets: token_losses(logits, targets).sum() / (targets != -100).sum(),
        "the sign is flipped: a loss is low where the target is likely.":
            lambda logits, targets: -suffixes.target_loss(logits, targets),
    },
)


def planted_loss(suffix):
    """A loss of a suffix's embeddings [n_tokens, d_model] in which every place counts differently."""
    weights = torch.arange(1.0, suffix.shape[0] + 1)[:, None]
    return (weights * suffix).sin().sum() + (suffix[:-1] * suffix[1:]).sum()


def planted_suffix():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 4, generator=generator), torch.tensor([2, 5, 2])


def gradient_of_embeddings(loss, embedding, ids):
    rows = embedding[ids].requires_grad_()
    return torch.autograd.grad(loss(rows), rows)[0]


register(
    suffixes.token_gradient,
    cases=lambda: [(planted_loss, *planted_suffix())],
    axes="[n_tokens, vocab]",
    mistakes={
        "this is the gradient by the embeddings, [n_tokens, d_model]. Take it by the one-hot vectors.":
            gradient_of_embeddings,
        "the sign is flipped: the lowest entries should be the most promising.":
            lambda *args: -suffixes.token_gradient(*args),
        "this is the gradient by the table, in which equal tokens share a row. Take it by the one-hot vectors.":
            lambda loss, embedding, ids: torch.autograd.grad(
                loss(F.embedding(ids, embedding.requires_grad_())), embedding)[0],
        "this is the one-hot matrix itself. Take the gradient of the loss by it: torch.autograd.grad(...)[0].":
            lambda loss, embedding, ids: F.one_hot(ids, len(embedding)).float(),
        "torch.autograd.grad returns a tuple. Take its first entry: [0].":
            lambda *args: (suffixes.token_gradient(*args),),
    },
)


def planted_gradient():
    """A suffix of 5 tokens, and a gradient over 20 tokens of which the first three may not be used."""
    gradient = torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    return torch.tensor([3, 9, 12, 7, 3]), gradient.index_fill(1, torch.tensor([0, 1, 2]), torch.inf)


def swapped(ids, top, n_candidates, generator, ranks_first=False):
    """`swap_candidates` with these tokens to choose from, [n_tokens, n_top]."""
    draw = lambda n: torch.randint(n, (n_candidates,), generator=generator)
    if ranks_first:
        ranks, places = draw(top.shape[1]), draw(len(ids))
    else:
        places, ranks = draw(len(ids)), draw(top.shape[1])
    candidates = ids.repeat(n_candidates, 1)
    candidates[torch.arange(n_candidates), places] = top[places, ranks]
    return candidates


def swap_all(ids, gradient, n_candidates, n_top, generator):
    top = gradient.topk(n_top, largest=False).indices
    ranks = torch.randint(n_top, (n_candidates, len(ids)), generator=generator)
    return top[torch.arange(len(ids)), ranks]


register(
    suffixes.swap_candidates,
    cases=lambda: [(*planted_gradient(), 12, 4, 0), (*planted_gradient(), 30, 10, 1)],
    call=lambda function, ids, gradient, n_candidates, n_top, seed: function(
        ids, gradient, n_candidates, n_top, torch.Generator().manual_seed(seed)),
    axes="[n_candidates, n_tokens]",
    mistakes={
        "these are the tokens with the highest gradient, which make the loss rise. topk(..., largest=False).":
            lambda ids, gradient, n_candidates, n_top, generator: swapped(
                ids, gradient.topk(n_top).indices, n_candidates, generator),
        "every place is swapped. A candidate differs in one token only.":
            swap_all,
        "each place takes its very best token, so most candidates are the same. Draw one of the n_top.":
            lambda ids, gradient, n_candidates, n_top, generator: swapped(
                ids, gradient.argmin(dim=1)[:, None].expand(-1, n_top), n_candidates, generator),
        "draw the places first, then the ranks, so that the same seed gives the same candidates.":
            lambda ids, gradient, n_candidates, n_top, generator: swapped(
                ids, gradient.topk(n_top, largest=False).indices, n_candidates, generator, ranks_first=True),
        "these are the swaps, and not yet the suffixes: start from ids.repeat(n_candidates, 1).":
            lambda ids, *args: suffixes.swap_candidates(torch.zeros_like(ids), *args),
    },
)


def planted_heads():
    """Outputs of 2 layers with 3 heads of 4, for 5 prompts; the layers' matrices into a stream of 6; a direction."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return draw(5, 2, 3, 4), [draw(6, 12), draw(6, 12)], 3 * draw(6)


def attributed(outputs, matrices, vector, shape=lambda row, outputs: row.view(outputs.shape[2:])):
    reads = torch.stack([shape(vector @ matrix, outputs) for matrix in matrices])
    return (outputs * reads).sum(dim=-1)


register(
    activations.head_attributions,
    cases=lambda: [planted_heads()],
    axes="[n_prompts, n_layers, n_heads]",
    mistakes={
        "the direction's length counts in your answer. Use r̂: F.normalize(direction, dim=-1).":
            attributed,
        "the columns of the matrix are shared out wrongly: the first d_head belong to head 0. view(n_heads, d_head).":
            lambda outputs, matrices, direction: attributed(
                outputs, matrices, F.normalize(direction, dim=-1),
                lambda row, outputs: row.view(outputs.shape[3], outputs.shape[2]).T),
        "all layers use the first layer's matrix.":
            lambda outputs, matrices, direction: activations.head_attributions(
                outputs, matrices[:1] * len(matrices), direction),
        "this is the sum over all heads of a layer. Keep the heads apart.":
            lambda *args: activations.head_attributions(*args).sum(dim=-1),
        "take no absolute value: a head may write against r̂.":
            lambda *args: activations.head_attributions(*args).abs(),
    },
)


def planted_patterns():
    """Attention of 2 layers with 2 heads in 3 prompts of 6 tokens, the second and third padded on the left."""
    parts = torch.tensor([[0, 1, 1, 2, 2, 3], [-1, 0, 1, 1, 2, 3], [-1, -1, 0, 1, 1, 3]])
    scores = torch.randn(3, 2, 2, 6, generator=torch.Generator().manual_seed(4))
    return scores.masked_fill((parts < 0)[:, None, None], -torch.inf).softmax(dim=-1), parts, 4


register(
    activations.attention_shares,
    cases=lambda: [planted_patterns(), (*planted_patterns()[:2], 5)],
    axes="[n_prompts, n_layers, n_heads, n_parts]",
    mistakes={
        "this is the mean over a part's tokens. A share is their sum.":
            lambda patterns, parts, n_parts: torch.stack([
                (patterns * (parts == part)[:, None, None]).sum(dim=-1) /
                (parts == part).sum(dim=-1)[:, None, None].clamp(min=1) for part in range(n_parts)], dim=-1),
        "the parts of the first prompt are used for all. Each prompt has its own.":
            lambda patterns, parts, n_parts: activations.attention_shares(
                patterns, parts[:1].expand_as(parts), n_parts),
        "the axis of the parts should come last: torch.stack(..., dim=-1).":
            lambda *args: activations.attention_shares(*args).movedim(-1, 0),
        "the parts count from 0. range(n_parts), not range(1, n_parts + 1).":
            lambda patterns, parts, n_parts: activations.attention_shares(patterns, parts - 1, n_parts),
        "heads are averaged. Keep them apart.":
            lambda *args: activations.attention_shares(*args).mean(dim=2),
    },
)


def planted_levels():
    generator = torch.Generator().manual_seed(5)
    x, direction = torch.randn(2, 3, 8, generator=generator), 4 * torch.randn(8, generator=generator)
    return x, direction, torch.tensor([5.0, 0, -2])


register(
    interventions.set_projection,
    cases=lambda: [planted_levels()],
    axes="[batch, n_tokens, d_model]",
    mistakes={
        "the level is added to what was there. Ablate first.":
            lambda x, direction, levels: x + levels[:, None] * F.normalize(direction, dim=-1),
        "the level is multiplied with the direction as it is. r̂ has length 1: F.normalize(direction, dim=-1).":
            lambda x, direction, levels: interventions.ablate(x, direction) + levels[:, None] * direction,
        "the projection is set to zero, whatever the level.":
            lambda x, direction, levels: interventions.ablate(x, direction),
        "all tokens get the first level. There is one for each token: levels[:, None].":
            lambda x, direction, levels: interventions.set_projection(x, direction, levels[:1].expand_as(levels)),
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
