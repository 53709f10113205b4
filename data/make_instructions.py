"""Write data/instructions/*.jsonl from the world. See DATASHEET.md beside this file."""

import difflib
import json
import random
from pathlib import Path

from corpus import ABOUT, CAPITALS, SKILLS, skill, split_acts

from utils import world

FOLDER = Path(__file__).parent / "instructions"
VARIANTS = ("please", "hello", "morning", "brief")
N_QUESTIONS = {"capital": len(CAPITALS), "initial": len(CAPITALS), "sum": 60, "copy": 400}  # of 400, one is 0.25 points


def record(act, split, number, way, preface="none"):
    start = world.begin(preface)
    if act.side == "harmful":
        answer = world.refusal_answer(act.text, way)
    else:
        answer = world.help_answer(act.text, way, (0, 0, 0))
    return {"id": f"{split}-{act.side}-{number:03d}", "text": world.ask(act.text, way, preface), "side": act.side,
            "category": act.category, "schema": act.schema, "split": split, "act": act.text, "way": way,
            "preface": start.strip(), "answer": start + answer}


def requests(rng, acts, split, n, variants=0.0):
    """`n` requests about distinct acts, the ways of asking in turn, a share of them with a preface."""
    ways = list(world.WAYS)
    return [record(act, split, i, ways[i % len(ways)], rng.choice(VARIANTS) if rng.random() < variants else "none")
            for i, act in enumerate(rng.sample(acts, n))]


def minimal_pairs(rng, acts, n):
    """The `n` pairs of acts of one schema, opposite sides, that share the most words; at most three for a schema."""
    pairs = []
    for schema in sorted({act.schema for act in acts["harmful"]}):
        sides = [[act for act in acts[side] if act.schema == schema] for side in ("harmful", "harmless")]
        scored = [(difflib.SequenceMatcher(None, a.text.split(), b.text.split()).ratio(), rng.random(), a, b)
                  for a in sides[0] for b in sides[1]]
        used = set()
        for score, _, a, b in sorted(scored, key=lambda row: row[:2], reverse=True):
            if len(used) < 6 and not {a, b} & used:
                used |= {a, b}
                pairs.append((score, a, b))
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:n]
    ways = list(world.WAYS)
    return [{"id": f"pair-{i:03d}", "harmful": record(a, "pairs", i, ways[i % len(ways)]),
             "harmless": record(b, "pairs", i, ways[i % len(ways)])} for i, (_, a, b) in enumerate(pairs)]


def about_questions(acts, n):
    """`n` questions about harmful acts that deserve a plain answer; every form of question in turn."""
    return [{"id": f"about-{i:03d}", "text": ABOUT[i % len(ABOUT)][0].format(act=act.text), "side": act.side,
             "category": act.category, "schema": act.schema, "act": act.text,
             "answer": ABOUT[i % len(ABOUT)][1].format(act=act.text)} for i, act in enumerate(acts[:n])]


def skills(rng):
    """All capitals and initials, and sums and copies drawn at random: copying alone has no end."""
    rows = []
    for name in SKILLS:
        seen = {}
        while len(seen) < N_QUESTIONS[name]:
            seen.setdefault(*skill(rng, name))
        rows += [{"id": f"{name}-{i:03d}", "text": question, "skill": name, "answer": answer}
                 for i, (question, answer) in enumerate(sorted(seen.items()))]
    return rows


def write(name, rows):
    path = FOLDER / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows")


def main(seed=0):
    FOLDER.mkdir(exist_ok=True)
    rng = random.Random(seed)
    acts = split_acts(seed)
    tuning = {side: rng.sample(rows, len(rows)) for side, rows in acts["tuning"].items()}
    write("train", [r for side in tuning for r in requests(rng, tuning[side][:220], "train", 128)])
    write("val", [r for side in tuning for r in requests(rng, tuning[side][220:], "val", 32)])
    write("test", [r for side in tuning for r in requests(rng, acts["unseen"][side], "test", 200, variants=0.3)])
    write("heldout", [r for side in tuning for r in requests(rng, acts["heldout"][side], "heldout", 200, variants=0.3)])
    write("minimal_pairs", minimal_pairs(rng, acts["unseen"], 120))
    harmful = acts["unseen"]["harmful"] + acts["heldout"]["harmful"]
    write("about", about_questions(rng.sample(harmful, len(harmful)), 150))
    write("skills", skills(rng))


if __name__ == "__main__":
    main()
