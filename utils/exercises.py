"""Exercises that always run: a blank or wrong answer is stood in for by the reference, and this is said.

In a lesson:

    @exercise
    def ablate(x, direction):
        "x [..., d_model], direction [d_model] -> x without its component along direction, [..., d_model]"
        ...  # your code here

    check(ablate)

`predicted(my_guess)` above a result, and `summary()` in the last cell. With the environment variable
COURSE_STRICT=1 (graders, tests) a check that does not find the learner's own answer right raises AssertionError.
"""
import dis
import functools
import os

from utils.checks import find_check, find_fault

EXERCISES = {}  # name -> the latest function the learner wrote under this name, in the order of the lesson


def exercise(attempt):
    """Decorate the learner's function; the reference of the same name answers while it is blank or found wrong.

    The decorated function carries `.attempt` (the learner's own), `.reference` (the function of utils) and
    `.state`: "blank", "unchecked", "right" or "wrong".
    Raises KeyError if no check is registered under the function's name.
    """
    name = attempt.__name__
    reference = find_check(name).reference

    @functools.wraps(attempt)
    def answer(*args, **kwargs):
        if answer.state in ("right", "unchecked"):
            return attempt(*args, **kwargs)
        if answer.state == "blank":
            say_blank(answer)
        return reference(*args, **kwargs)

    answer.attempt, answer.reference = attempt, reference
    answer.state, answer.told = "blank" if is_blank(attempt) else "unchecked", False
    EXERCISES.pop(name, None)
    EXERCISES[name] = answer
    return answer


def check(answer):
    """Test the learner's own function, say what is wrong with it in one sentence, and remember the verdict.

    Raises AssertionError with that sentence if COURSE_STRICT=1 and the answer is blank or wrong.
    """
    if not hasattr(answer, "attempt"):
        raise TypeError("check() takes a function decorated with @exercise. Is the line `@exercise` missing above it?")
    name = answer.__name__
    fault = None
    if answer.state == "blank":
        say_blank(answer)
    else:
        fault = find_fault(find_check(name), answer.attempt)
        answer.state = "wrong" if fault else "right"
        print(f"Not yet: {name}: {fault}\nUntil it is right, the reference answers in its place." if fault
              else f"Right: {name} is yours from here on.")
    if os.environ.get("COURSE_STRICT") == "1" and answer.state != "right":
        raise AssertionError(f"{name}: {fault or 'still blank'}")


def summary():
    """Print how many of the lesson's exercises are the learner's own; what was never checked is checked now."""
    for answer in EXERCISES.values():
        if answer.state == "unchecked":
            check(answer)
    names = {state: [n for n, a in EXERCISES.items() if a.state == state] for state in ("right", "blank", "wrong")}
    missing = len(names["blank"]) + len(names["wrong"])
    print(f"{len(names['right'])} of {len(EXERCISES)} yours, {missing} from the reference.")
    for label, state in (("Yours", "right"), ("Still blank", "blank"), ("Not yet right", "wrong")):
        if names[state]:
            print(f"{label}: {', '.join(names[state])}.")


def predicted(*guesses):
    """Say what the learner predicted, above what came out; nothing while all is None."""
    if any(number is not None for guess in guesses
           for number in (guess.values() if isinstance(guess, dict) else [guess])):
        print("You predicted:", *guesses)


def say_blank(answer):
    """Say once that the reference stands in."""
    if not answer.told:
        print(f"{answer.__name__} is still blank: the reference answers in its place.")
        answer.told = True


def is_blank(function):
    """True if the body is only a docstring, `...`, `pass` or nbgrader's `raise NotImplementedError()`.

    Compiled code is compared, so comments and wording do not matter, and nothing has to be run.
    """
    def dots(): ...
    def nbgrader_stub(): raise NotImplementedError()
    return instructions(function) in (instructions(dots), instructions(nbgrader_stub))


def instructions(function):
    """The compiled body as (operation, operand) pairs, the same whatever the docstring, names and line numbers."""
    return [(step.opname, step.argval) for step in dis.get_instructions(function)]
