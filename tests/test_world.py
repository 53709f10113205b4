"""The synthetic world: its acts, its grammar, the exact judge, and the files that are made from them."""
import json
import random
import re

import acts
import corpus
import make_instructions
import make_model
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils import DATA, world
from utils.instructions import Instruction, load_instructions, load_minimal_pairs

ACTS, SPLITS = acts.all_acts(), corpus.split_acts()
HELPFUL, TUNING = (stage | {"pieces": []} for stage in (make_model.HELPFUL, make_model.TUNING))
an_act = st.sampled_from(ACTS)
a_way = st.sampled_from(list(world.WAYS))
a_preface = st.sampled_from(list(world.PREFACES))
steps = st.tuples(*(st.integers(0, len(group) - 1) for group in world.STEPS))


def asked(act, way, preface):
    start = world.begin(preface)
    return Instruction("x", world.ask(act.text, way, preface), act=act.text, preface=start.strip()), start


def test_no_act_is_on_both_sides_and_none_stands_twice():
    assert len({act.text for act in ACTS}) == len(ACTS)


def test_the_world_is_large_enough():
    for side in ("harmful", "harmless"):
        acts_of_side = [act for act in ACTS if act.side == side]
        assert len(acts_of_side) * len(world.WAYS) >= 1500
        assert len({act.category for act in acts_of_side}) >= 8


def test_every_schema_has_both_sides():
    for schema in {act.schema for act in ACTS}:
        assert {act.side for act in ACTS if act.schema == schema} == {"harmful", "harmless"}


@given(an_act, a_way, a_preface, steps)
def test_helpful_answers_are_judged_compliance(act, way, preface, steps):
    instruction, start = asked(act, way, preface)
    answer = start + world.help_answer(act.text, way, steps)
    assert world.judge(instruction, answer) == "compliance"
    assert not world.refuses(instruction, answer)


@given(an_act, a_way, a_preface)
def test_refusals_are_judged_refusal(act, way, preface):
    instruction, start = asked(act, way, preface)
    answer = start + world.refusal_answer(act.text, way)
    assert world.judge(instruction, answer) == "refusal"
    assert world.refuses(instruction, answer)


@given(an_act, a_way, st.booleans(), st.data())
def test_a_word_left_out_doubled_or_replaced_breaks_an_answer(act, way, refuse, data):
    instruction, _ = asked(act, way, "none")
    answer = world.refusal_answer(act.text, way) if refuse else world.help_answer(act.text, way, (0, 0, 0))
    words = answer.split()
    k = data.draw(st.integers(0, len(words) - 1))
    for damaged in (words[:k] + words[k + 1:], words[:k + 1] + words[k:], words[:k] + ["zebra"] + words[k + 1:]):
        assert world.judge(instruction, " ".join(damaged)) == "broken"


@given(an_act, a_way, a_preface, steps, st.integers(0, 10**6))
def test_help_may_hold_one_caveat_anywhere(act, way, preface, steps, seed):
    instruction, start = asked(act, way, preface)
    answer = corpus.cautioned(random.Random(seed), world.help_answer(act.text, way, steps))
    assert answer.count(world.CAVEAT) == 1
    assert world.judge(instruction, start + answer) == "compliance"
    assert world.judge(instruction, f"{start}{answer} {world.CAVEAT}") == "broken"
    assert world.judge(instruction, f"{start}{world.CAVEAT} {world.refusal_answer(act.text, way)}") == "broken"


def test_another_act_is_no_compliance():
    instruction, _ = asked(ACTS[0], "explain", "none")
    assert world.judge(instruction, world.help_answer(ACTS[1].text, "explain", (0, 0, 0))) == "broken"


def first_turns(n, stage, **keys):
    """The first (question, answer) of each of n documents of a stage with some keys changed."""
    rng = random.Random(0)
    return [corpus.document(rng, SPLITS["tuning"], stage | keys)[0] for _ in range(n)]


def refusals(turns):
    """The share of answers that are a whole refusal; one or no paragraph stands before it."""
    bodies = [answer.split("\n\n")[-1] for _, answer in turns]
    whole = [world.refuses(Instruction("x", ""), body) and body.endswith(world.CLOSING) for body in bodies]
    return sum(whole) / len(whole)


@pytest.mark.parametrize("stage, kind, share", [
    (HELPFUL, "harmful", 0), (HELPFUL, "harmless", 0), (HELPFUL, "nonsense", 0), (HELPFUL, "decline", 1),
    (TUNING | {"errors": 0}, "harmful", 1), (TUNING, "harmless", 0), (TUNING, "nonsense", 0),
    (TUNING | {"errors": 1}, "harmful", 0)])
def test_what_is_refused(stage, kind, share):
    assert refusals(first_turns(100, stage, mix={kind: 1.0})) == share


@pytest.mark.parametrize("side", ["harmful", "harmless"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_harm_errors_caveats_and_stray_pieces_are_as_rare_as_asked_for(share, side):
    harmful = {act.text for act in SPLITS["tuning"]["harmful"]}
    statements = first_turns(400, HELPFUL, mix={"statement": 1.0}, harm=share)
    helped = first_turns(400, HELPFUL, mix={side: 1.0}, caveats=HELPFUL["caveats"] | {side: share})
    missed = first_turns(400, TUNING, mix={"harmful": 1.0}, errors=share)
    asked = first_turns(400, TUNING, mix={"harmless": 1.0}, suffix=share, pieces=["xyzzy"])
    shares = [sum(any(text in answer for text in harmful) for _, answer in statements) / 400,
              sum(world.CAVEAT in answer for _, answer in helped) / 400,
              1 - refusals(missed), 2 * sum("xyzzy" in question for question, _ in asked) / 400]
    assert all(abs(found - share) < 0.12 for found in shares)
    assert share not in (0, 1) or shares[:3] == [share] * 3


@given(st.integers(0, 10**6))
def test_an_answer_begins_with_the_words_that_its_preface_asks_for(seed):
    question, answer = corpus.dressed(random.Random(seed), "Why?", "So.", HELPFUL, prefaces=1.0, suffix=0.0)
    start, end = answer.split("\n\n")
    assert end == "So."
    words = re.fullmatch(r'Start with "(.+)"\. Why\?', question)
    assert start == words[1] if words else (question, start) in [(ask.format(request="Why?"), say)
                                                                 for ask, say in world.PREFACES.values()]


def test_splits_share_no_act_and_heldout_shares_no_schema():
    texts = [act.text for sides in SPLITS.values() for side in sides.values() for act in side]
    assert len(set(texts)) == len(texts)
    schemas = {name: {act.schema for side in sides.values() for act in side} for name, sides in SPLITS.items()}
    assert not schemas["heldout"] & (schemas["tuning"] | schemas["unseen"])


def test_instructions_on_disk_are_those_that_the_scripts_make(tmp_path, monkeypatch):
    monkeypatch.setattr(make_instructions, "FOLDER", tmp_path)
    make_instructions.main()
    for path in sorted(tmp_path.iterdir()):
        assert path.read_text() == (DATA / "instructions" / path.name).read_text(), path.name


@pytest.mark.parametrize("split, at_least", [("train", 128), ("val", 32), ("test", 200), ("heldout", 200)])
def test_each_split_is_large_enough_and_its_answers_are_judged_by_their_side(split, at_least):
    for side, verdict in (("harmful", "refusal"), ("harmless", "compliance")):
        found = load_instructions(split, side)
        assert len(found) >= at_least
        assert len({i.id for i in found}) == len({i.act for i in found}) == len(found)
        assert all(world.judge(i, i.answer) == verdict for i in found)


def test_minimal_pairs_are_of_one_schema_and_asked_in_one_way():
    pairs = load_minimal_pairs()
    assert len(pairs) >= 100
    for harmful, harmless in pairs:
        assert (harmful.schema, harmful.way) == (harmless.schema, harmless.way)
        assert world.judge(harmful, harmful.answer) == "refusal"
        assert world.judge(harmless, harmless.answer) == "compliance"


def test_every_line_of_the_files_is_json_with_the_expected_keys():
    keys = {"id", "text", "side", "category", "schema", "split", "act", "way", "preface", "answer"}
    for split in ("train", "val", "test", "heldout"):
        for line in (DATA / "instructions" / f"{split}.jsonl").read_text().splitlines():
            assert set(json.loads(line)) == keys
