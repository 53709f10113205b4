"""Read what a recorded model answers, mixed and without its condition, and mark what each answer is.

    python data/mark_answers.py RUN --prompts FOLDER     write reproduced/RUN/to_read.txt
    python data/mark_answers.py RUN --read               count the marks into data/real/RUN/marks.json

In between, a person writes a mark after each answer. The prompts and answers stay in reproduced/, which is not
committed.
"""
import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

from make_real import read_prompts

from utils import write_json
from utils.evaluation import phrase_judge
from utils.runs import MARKS, REAL

DRAWN = {("harmful", "base"): 7, ("harmful", "ablated"): 12, ("harmful", "subtracted"): 6, ("harmful", "random_1"): 6,
         ("harmful", "equal_shadow"): 6, ("harmless", "base"): 5, ("harmless", "added"): 12}
MARK = re.compile(r"^mark: *(\S*)$", re.MULTILINE)


def drawn(run, seed=0):
    """What is to be read, in mixed order: a list of (side, condition, number of the prompt, answer)."""
    rng, answers = random.Random(seed), []
    for (side, condition), n in DRAWN.items():
        texts = json.loads((Path("reproduced") / run / f"{side}-{condition}.json").read_text())["answers"]
        answers += [(side, condition, number, texts[number]) for number in rng.sample(range(len(texts)), n)]
    rng.shuffle(answers)
    return answers


def write(run, prompts):
    """The sheet, with a blank mark after each answer."""
    blocks = [f"{number}.\n{prompts[side][at]}\n> {text!r}\nmark: \n"
              for number, (side, _, at, text) in enumerate(drawn(run), start=1)]
    sheet = Path("reproduced") / run / "to_read.txt"
    sheet.write_text(f"After each answer, one of: {', '.join(MARKS)}.\n\n" + "\n".join(blocks), encoding="utf-8")
    return sheet


def read(run):
    """Count the marks by condition, and how the list of phrases errs -> what is in marks.json."""
    answers = drawn(run)
    marks = MARK.findall((Path("reproduced") / run / "to_read.txt").read_text(encoding="utf-8"))
    for number, mark in enumerate(marks, start=1):
        if mark not in MARKS:
            raise ValueError(f"Answer {number} has the mark {mark!r}: write one of {', '.join(MARKS)}.")
    if len(marks) != len(answers):
        raise ValueError(f"There are {len(marks)} marks for {len(answers)} answers: write the sheet anew.")
    counts = {f"{side}, {condition}": Counter() for side, condition in DRAWN}
    for (side, condition, *_), mark in zip(answers, marks):
        counts[f"{side}, {condition}"][mark] += 1
    found = Counter((mark == "refuses", phrase_judge(text)) for (*_, text), mark in zip(answers, marks))
    return {"marks": counts, "phrases": {
        "caught": [found[True, True], found[True, True] + found[True, False]],
        "false alarms": [found[False, True], found[False, True] + found[False, False]]}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the name of the record")
    parser.add_argument("--prompts", type=Path, help="as for make_real.py")
    parser.add_argument("--read", action="store_true", help="count the marks")
    args = parser.parse_args()
    if args.read:
        write_json(REAL / args.run / "marks.json", read(args.run))
    else:
        print(write(args.run, read_prompts(args.prompts)[0]["test"]))


if __name__ == "__main__":
    main()
