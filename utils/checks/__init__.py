"""The checks behind `check`: for each exercise its reference, small planted inputs, and typical mistakes.

A mistake is written as the function that a learner who makes it would write. If the learner's answer differs
from the reference but equals a mistaken one, they are told that mistake's sentence; otherwise what differs: kind,
shape or values. The tests hand every mistake in as an answer, and expect its sentence.
"""
import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from importlib import import_module
from itertools import repeat
from pathlib import Path

import torch

from utils.interventions import Ablation, Addition
from utils.models import load_model

# Where the checks are, each named after the module of its references. That on probes comes last: it needs scikit-learn,
# which takes seconds to import, and most lessons do not.
MODULES = ("checkpoints", "models", "activations", "candidates", "directions", "interventions", "evaluation",
           "suffixes", "probes")
CHECKS = {}  # name of the exercise -> Check, of the modules loaded so far


@dataclass(frozen=True)
class Check:
    """One exercise: where its reference lives, what it is tried on, and what usually goes wrong."""
    reference: Callable  # the function of utils
    cases: Callable  # () -> list of argument tuples, made anew at each call
    mistakes: dict = field(default_factory=dict)  # sentence -> mistaken function
    axes: str = ""  # what the axes of the answer mean, e.g. "[n_layers, n_positions, d_model]"
    tolerance: float = 1e-4  # relative and absolute
    call: Callable = lambda function, *args: function(*args)  # how it is tried: some functions need a trace around them

    @functools.cached_property
    def expected(self):
        """What the reference answers on each case."""
        return [self.call(self.reference, *args) for args in self.cases()]

    @functools.cached_property
    def mistaken(self):
        """What each mistake answers on each case: {sentence: list}."""
        return {sentence: [outcome(self, mistake, args) for args in self.cases()]
                for sentence, mistake in self.mistakes.items()}


def register(reference, cases, mistakes, **options):
    """Make an exercise of a function of utils; its arguments are those of `Check`."""
    CHECKS[reference.__name__] = Check(reference, cases, mistakes, **options)


def find_check(name):
    """The Check of the exercise `name`. Loads module after module until it is there; KeyError if none has it."""
    for module in MODULES:
        if name not in CHECKS:
            import_module(f"utils.checks.{module}")
    if name not in CHECKS:
        raise KeyError(f"{name} is not an exercise of this course. Exercises: {', '.join(sorted(CHECKS))}.")
    return CHECKS[name]


def all_checks():
    """Every exercise of the course: {name: Check}."""
    for module in MODULES:
        import_module(f"utils.checks.{module}")
    return CHECKS


def find_fault(check, attempt):
    """One sentence on what is wrong with `attempt`, or None if it agrees with the reference on every case."""
    tried = check.cases()
    given = [outcome(check, attempt, args) for args in tried]
    faults = list(map(difference, given, check.expected, repeat(check)))
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
    for sentence, mistaken in check.mistaken.items():
        same = [not difference(*pair, check) for pair in zip(given, mistaken)]
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
    return is_dataclass(x) or isinstance(x, (Ablation, Addition))


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
    libraries, ours = {"site-packages", "dist-packages"}, Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if ours not in Path(frame.filename).parents and not libraries & set(Path(frame.filename).parts)]
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


def direction(seed=1):
    """A random direction in the model, long enough to change what it says."""
    return 10 * randn(model().d_model, seed=seed)


PROMPTS = ["Explain how to bake a cake.", "Please tell me how to steal a bicycle from a neighbour.", "Hello."]
