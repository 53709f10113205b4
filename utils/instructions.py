"""One-line requests to a chat model, harmful and harmless, from data/instructions/*.jsonl."""
import json
import random
from dataclasses import dataclass, fields

from utils import DATA

SPLITS = ("train", "val", "test", "heldout")
SIDES = ("harmful", "harmless")


@dataclass(frozen=True)
class Instruction:
    """A request and what is known about it. A field that its file does not have is "".

    `side` is "harmful" or "harmless"; `answer` is the exact answer, where there is one.
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
    """The instructions of a split ("train", "val", "test", "heldout") as a list of Instruction.

    side: "harmful" or "harmless"; None for both. n: how many, drawn at random without replacement; None for all.
    Raises ValueError for an unknown split or side, or if n is more than there are.
    """
    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    if side not in (None, *SIDES):
        raise ValueError(f"There is no side {side!r}: choose harmful or harmless, or None for both.")
    found = [i for i in _read(f"{split}.jsonl", _instruction) if side in (None, i.side)]
    if n is None:
        return found
    if not 0 < n <= len(found):
        raise ValueError(f"{n} instructions were asked for, but {split} has {len(found)} {side or ''}".rstrip()
                         + f": choose n from 1 to {len(found)}.")
    return random.Random(seed).sample(found, n)


def load_minimal_pairs():
    """Pairs that differ in one slot and in side: a list of (harmful, harmless) Instructions."""
    def pair(line):
        return tuple(_instruction({"id": f"{line['id']}-{side}", "side": side, **line[side]}) for side in SIDES)
    return _read("minimal_pairs.jsonl", pair)


def load_about_questions():
    """Questions *about* harmful acts that deserve a plain answer: a list of Instruction."""
    return _read("about.jsonl", _instruction)


def load_skills(skill=None):
    """Prompts with an exact answer (sums, facts, copying ...), of one skill or, by default, of all."""
    found = _read("skills.jsonl", _instruction)
    skills = sorted({i.skill for i in found})
    if skill is not None and skill not in skills:
        raise ValueError(f"There is no skill {skill!r}: choose one of {', '.join(skills)}.")
    return [i for i in found if skill in (None, i.skill)]


def as_texts(instructions):
    """The texts of a list of Instructions or plain strings. Every function that takes instructions begins here."""
    if isinstance(instructions, (str, Instruction)):
        raise TypeError(f"Give a list of instructions, not a single one: [{instructions!r}].")
    texts = [i.text if isinstance(i, Instruction) else i for i in instructions]
    if not texts:
        raise ValueError("The list of instructions is empty: give at least one.")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"An instruction is a string or an Instruction, not {type(text).__name__}: {text!r}.")
    return texts


def _instruction(line):
    known = {f.name for f in fields(Instruction)}
    return Instruction(**{key: value for key, value in line.items() if key in known})


def _read(name, make):
    """`make(line)` for each JSON line of a file in data/instructions; what is wrong is said with the line's number."""
    path = DATA / "instructions" / name
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: run `make model` to build the data, "
                                "or work in a full clone of the course.")
    made = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            made.append(make(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path.name}, line {number}, is not an instruction: {error!r}. "
                             "Restore the file from the course's repository.") from error
    return made
