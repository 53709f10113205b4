"""One-line requests to a chat model, harmful and harmless: the course's own, and the public sets of the paper."""
import json
import random
from dataclasses import dataclass, fields
from typing import NamedTuple

from utils import DATA

SPLITS = ("train", "val", "test", "heldout")
SIDES = ("harmful", "harmless")
BORDERLINE = "borderline"  # sounds harmful, and is not


class PublicSet(NamedTuple):
    """Where a public set lies on the hub, and which of its columns holds the requests."""
    hub_id: str
    config: str | None
    split: str
    column: str
    side: str


# Sets that the paper takes prompts from (sections 2.2 and 3.1; its TDC2023 is not among them).
PUBLIC_SETS = {
    "advbench": PublicSet("walledai/AdvBench", None, "train", "prompt", "harmful"),
    "malicious_instruct": PublicSet("walledai/MaliciousInstruct", None, "train", "prompt", "harmful"),
    "harmbench": PublicSet("walledai/HarmBench", "standard", "train", "prompt", "harmful"),
    "jailbreakbench": PublicSet("JailbreakBench/JBB-Behaviors", "behaviors", "harmful", "Goal", "harmful"),
    "alpaca": PublicSet("tatsu-lab/alpaca", None, "train", "instruction", "harmless"),
}


@dataclass(frozen=True)
class Instruction:
    """A request and what is known about it; a field that its file does not have is "".

    side: "harmful", "harmless" or "borderline". answer: the exact answer, where there is one.
    """
    id: str
    text: str
    side: str = ""
    category: str = ""
    schema: str = ""
    split: str = ""
    act: str = ""
    way: str = ""
    preface: str = ""
    skill: str = ""
    answer: str = ""


def load_instructions(split, side=None, n=None, seed=0):
    """The instructions of a split ("train", "val", "test" or "heldout"): a list of Instruction.

    side: "harmful", "harmless", or None for both. n: how many, drawn without replacement; None for all.
    Raises ValueError for an unknown split or side, and if n is more than there are.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    if side not in (None, *SIDES):
        raise ValueError(f"There is no side {side!r}: choose harmful or harmless, or None for both.")
    found = [i for i in _read(f"{split}.jsonl", _instruction) if side in (None, i.side)]
    return _some(found, f"{split} has {len(found)} instructions of this side", n, seed)


def load_sides(split, n=None, seed=0):
    """The harmful and the harmless instructions of a split -> {"harmful": list, "harmless": list}.

    n, seed, what is raised: as `load_instructions`, for each side.
    """
    return {side: load_instructions(split, side, n, seed) for side in SIDES}


def load_requests(split, side, n=None, seed=0):
    """Requests in many forms of plain English, for models that speak it: a list of Instruction, `category` its kind.

    No kind of request is in two splits. side: also "borderline", for requests that only sound harmful.
    split, n and errors: as in `load_instructions`; there is no split "heldout".
    """
    splits, sides = SPLITS[:3], (*SIDES, BORDERLINE)
    if split not in splits or side not in sides:
        raise ValueError(f"There are no requests {split!r}, {side!r}: choose one of {', '.join(splits)}, and one of "
                         f"{', '.join(sides)}.")
    found = [i for i in _read(f"{side}.jsonl", _instruction, folder="requests") if i.split == split]
    return _some(found, f"{split} has {len(found)} {side} requests", n, seed)


def load_public_set(name, n=None, seed=0, source=None):
    """The requests of one of the PUBLIC_SETS, with the `datasets` library: a list of Instruction.

    n: how many, drawn without replacement; None for all. Of Alpaca, only those that need no further input.
    source: a folder with a copy of the set, laid out as on the hub; None for the hub itself.
    Raises ValueError for an unknown set, a copy that lacks its column, and if n is more than there are; ImportError
    without `datasets`; OSError if the set is out of reach.
    """
    if name not in PUBLIC_SETS:
        raise ValueError(f"There is no public set {name!r}: choose one of {', '.join(PUBLIC_SETS)}.")
    chosen = PUBLIC_SETS[name]
    rows = _read_public(name, chosen, str(source or chosen.hub_id))
    if chosen.column not in rows.column_names:
        raise ValueError(f"{name} has no column {chosen.column!r}, only {', '.join(rows.column_names)}: "
                         f"get the set that is on the hub as {chosen.hub_id}.")
    found = [Instruction(id=f"{name}-{number}", text=row[chosen.column], side=chosen.side)
             for number, row in enumerate(rows) if not row.get("input")]
    return _some(found, f"{name} has {len(found)} instructions", n, seed)


def load_minimal_pairs():
    """Pairs that differ in one slot and in side: a list of (harmful, harmless) tuples of Instruction."""
    return _read("minimal_pairs.jsonl", lambda line: tuple(_instruction(line[side]) for side in SIDES))


def load_about_questions():
    """Questions *about* acts, which deserve a plain answer whatever the act: a list of Instruction."""
    return _read("about.jsonl", _instruction)


def load_skills(skill=None):
    """Prompts with an exact answer (sums, capitals ...), of one skill or all: a list of Instruction.

    Raises ValueError for an unknown skill.
    """
    found = _read("skills.jsonl", _instruction)
    skills = sorted({i.skill for i in found})
    if skill not in (None, *skills):
        raise ValueError(f"There is no skill {skill!r}: choose one of {', '.join(skills)}.")
    return [i for i in found if skill in (None, i.skill)]


def as_texts(instructions):
    """A list of Instructions or plain strings -> their texts. All that takes instructions takes both.

    Raises TypeError or ValueError for a single one, an empty list, or anything else in it.
    """
    if isinstance(instructions, str) or hasattr(instructions, "text"):
        raise TypeError(f"Give a list of instructions, not a single one: [{instructions!r}].")
    texts = [getattr(i, "text", i) for i in instructions]
    if not texts:
        raise ValueError("The list of instructions is empty: give at least one.")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"An instruction is a string or an Instruction, not {text!r}.")
    return texts


def _some(found, what_there_is, n, seed):
    """n of them, drawn without replacement; all if n is None."""
    if n is None:
        return found
    if not 0 < n <= len(found):
        raise ValueError(f"{what_there_is}: choose n from 1 to {len(found)}, not {n}.")
    return random.Random(seed).sample(found, n)


def _read_public(name, chosen, source):
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError('The public sets are read with the library "datasets": pip install datasets.') from error
    try:
        return load_dataset(source, chosen.config, split=chosen.split)
    except Exception as error:  # of many kinds, from network, hub, files and formats alike
        reason = str(error).strip().split("\n")[0].rstrip(".: ")
        raise OSError(f"The public set {name} could not be loaded from {source} ({reason}): check that the hub is "
                      "in reach, and `hf auth login` if there are terms to accept; or give a folder, source=."
                      ) from error


def _instruction(line):
    return Instruction(**{field.name: line[field.name] for field in fields(Instruction)
                          if field.name in line})


def _read(name, make, folder="instructions"):
    """`make(line)` of each JSON line of a file; a bad line is named by its number."""
    path = DATA / folder / name
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: work in a full clone of the course, or run "
                                "`make model` there.")
    made = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            made.append(make(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"Line {number} of {name} is no instruction ({error!r}): restore the file from "
                             "the course's repository.") from error
    return made
