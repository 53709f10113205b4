"""The course's requests: what is loaded, how it is drawn, and what is said of a damaged file."""
import json
import sys
from collections import Counter

import pytest

from utils import instructions
from utils.instructions import (
    PUBLIC_SETS,
    SIDES,
    SPLITS,
    Instruction,
    as_texts,
    load_about_questions,
    load_instructions,
    load_minimal_pairs,
    load_public_set,
    load_requests,
    load_sides,
    load_skills,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """data/instructions, with a train split of 6 harmful and 4 harmless, two pairs and three skills."""
    monkeypatch.setattr(instructions, "DATA", tmp_path)
    folder = tmp_path / "instructions"
    folder.mkdir()

    def write(name, lines):
        (folder / name).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")

    write("train.jsonl", [{"id": f"t{n}", "text": f"Do {n} – now", "side": SIDES[n >= 6], "split": "train",
                           "category": "c", "schema": "s", "act": f"do {n}", "way": "w", "answer": "No.",
                           "a field to come": 1} for n in range(10)])
    write("minimal_pairs.jsonl", [{"id": f"p{n}", **{side: {"id": f"p{n}-{side}", "text": f"{side} {n}",
                                                            "side": side} for side in SIDES}} for n in range(2)])
    write("skills.jsonl", [{"id": s, "text": f"{s}?", "skill": s, "answer": s.upper()} for s in ("sum", "copy", "sum")])
    write("about.jsonl", [{"id": "a", "text": "Is it legal?", "side": "harmful", "answer": "No."}])
    return folder


def test_sides_and_fields(folder):
    assert len(load_instructions("train")) == 10
    assert [i.id for i in load_instructions("train", "harmless")] == ["t6", "t7", "t8", "t9"]
    assert load_instructions("train", "harmful")[1] == Instruction(
        id="t1", text="Do 1 – now", side="harmful", category="c", schema="s", split="train", act="do 1", way="w",
        answer="No.")


def test_sample_is_seeded_and_without_replacement(folder):
    assert load_sides("train", n=2, seed=1) == {side: load_instructions("train", side, 2, 1) for side in SIDES}
    sample = load_instructions("train", "harmful", n=6, seed=1)
    assert {i.id for i in sample} == {f"t{n}" for n in range(6)}
    assert sample == load_instructions("train", "harmful", n=6, seed=1)
    assert sample != load_instructions("train", "harmful", n=6, seed=2)
    assert len(load_instructions("train", n=3)) == 3


def test_pairs_questions_and_skills(folder):
    assert [(a.text, b.text) for a, b in load_minimal_pairs()] == [
        ("harmful 0", "harmless 0"), ("harmful 1", "harmless 1")]
    assert load_about_questions() == [Instruction(id="a", text="Is it legal?", side="harmful", answer="No.")]
    assert [i.answer for i in load_skills()] == ["SUM", "COPY", "SUM"]
    assert [i.skill for i in load_skills("sum")] == ["sum", "sum"]


@pytest.mark.parametrize("call, sentence", [
    (lambda: load_instructions("training"), "no split 'training': choose one of train, val, test, heldout"),
    (lambda: load_instructions("train", "bad"), "no side 'bad': choose harmful or harmless"),
    (lambda: load_instructions("train", "harmless", n=5), "4 instructions of this side: choose n from 1 to 4"),
    (lambda: load_instructions("train", n=0), "choose n from 1 to 10, not 0"),
    (lambda: load_skills("poetry"), "no skill 'poetry': choose one of copy, sum"),
])
def test_bad_requests(folder, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("line", ['{"id": "t2", "text": ', '{"id": "t2"}', '["t2"]', ""])
def test_a_bad_line_is_named(folder, line):
    file = folder / "train.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([lines[0], line, *lines[2:]]), encoding="utf-8")
    with pytest.raises(ValueError, match="Line 2 of train.jsonl is no instruction .*: restore the file"):
        load_instructions("train")


def test_a_pair_without_its_other_side_is_named(folder):
    (folder / "minimal_pairs.jsonl").write_text('{"id": "p", "harmful": {"id": "h", "text": "x"}}')
    with pytest.raises(ValueError, match=r"Line 1 of minimal_pairs.jsonl .*harmless"):
        load_minimal_pairs()


def test_no_data(folder):
    (folder / "val.jsonl").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="There is no file .*val.jsonl: work in a full clone"):
        load_instructions("val")


def test_as_texts():
    assert as_texts(["a", Instruction(id="b", text="c")]) == ["a", "c"]
    assert as_texts(text for text in ("a", "b")) == ["a", "b"]
    with pytest.raises(TypeError, match="Give a list of instructions"):
        as_texts(Instruction(id="b", text="c"))


# what the course ships

@pytest.mark.parametrize("split, n", [("train", 128), ("val", 32), ("test", 200), ("heldout", 200)])
def test_shipped_splits(split, n):
    for side in SIDES:
        found = load_instructions(split, side)
        assert len(found) >= n
        assert {(i.side, i.split) for i in found} == {(side, split)}
        assert all(i.text and i.act and i.answer for i in found)


def test_shipped_splits_share_nothing():
    texts = [i.text for split in SPLITS for i in load_instructions(split)]
    assert len(texts) == len(set(texts))


# public sets, from small copies laid out as on the hub

@pytest.fixture
def copy_of(tmp_path, monkeypatch):
    """Write a copy of a public set: `copy_of(name, rows)` -> its folder."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, rows):
        chosen, folder = PUBLIC_SETS[name], tmp_path / name
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {chosen.config or 'default'}\n  data_files:\n"
            f"  - split: {chosen.split}\n    path: data/rows.jsonl\n---\n", encoding="utf-8")
        return folder
    return write


# requests in plain English

ALL_REQUESTS = {(split, side): load_requests(split, side) for split in SPLITS[:3]
                for side in ("harmful", "harmless", "borderline")}


def test_requests_are_many_and_each_is_one_line():
    texts = [request.text for requests in ALL_REQUESTS.values() for request in requests]
    assert len(texts) == len({text.lower() for text in texts})
    assert all(text == text.strip() and "\n" not in text and 10 < len(text) < 250 for text in texts)
    n = {side: sum(len(requests) for (_, of), requests in ALL_REQUESTS.items() if of == side)
         for side in ("harmful", "harmless", "borderline")}
    assert n["harmful"] >= 400 and n["harmless"] >= 800 and n["borderline"] >= 150


def test_no_kind_of_request_is_in_two_splits():
    kinds = {split: {request.category for (where, _), requests in ALL_REQUESTS.items() if where == split
                     for request in requests} for split in SPLITS[:3]}
    assert sum(map(len, kinds.values())) == len(set.union(*kinds.values()))
    harmful = [request for (_, side), requests in ALL_REQUESTS.items() if side == "harmful" for request in requests]
    assert len({request.category for request in harmful}) >= 12
    assert all(request.side == side and request.split == split
               for (split, side), requests in ALL_REQUESTS.items() for request in requests)


def test_requests_do_not_all_begin_alike():
    openings = Counter(" ".join(request.text.lower().split()[:3])
                       for requests in ALL_REQUESTS.values() for request in requests)
    assert max(openings.values()) < 0.02 * openings.total()


@pytest.mark.parametrize("split, side", [("heldout", "harmful"), ("train", "evil"), (None, None)])
def test_requests_of_no_such_split_or_side(split, side):
    with pytest.raises(ValueError, match="There are no requests .*: choose one of train, val, test, and one of"):
        load_requests(split, side)


@pytest.mark.parametrize("name", PUBLIC_SETS)
def test_public_sets_are_read_from_a_copy(copy_of, name):
    column, side = PUBLIC_SETS[name].column, PUBLIC_SETS[name].side
    source = copy_of(name, [{column: f"Request {n}", "target": "…"} for n in range(5)])
    found = load_public_set(name, source=source)
    assert [(i.id, i.text, i.side) for i in found] == [(f"{name}-{n}", f"Request {n}", side) for n in range(5)]
    drawn = load_public_set(name, n=3, seed=1, source=source)
    assert len({i.id for i in drawn}) == 3 and set(drawn) < set(found)
    assert drawn == load_public_set(name, n=3, seed=1, source=source)


def test_of_alpaca_only_those_that_need_no_further_input(copy_of):
    source = copy_of("alpaca", [{"instruction": "Add these.", "input": "1, 2"}, {"instruction": "Sing.", "input": ""}])
    assert [i.text for i in load_public_set("alpaca", source=source)] == ["Sing."]


def test_bad_public_sets(copy_of, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no public set 'advbunch': choose one of advbench, malicious_instruct"):
        load_public_set("advbunch")
    source = copy_of("advbench", [{"goal": "Request"}])
    with pytest.raises(ValueError, match="advbench has no column 'prompt', only goal: get the set .*walledai/AdvBench"):
        load_public_set("advbench", source=source)
    source = copy_of("harmbench", [{"prompt": "Request"}])
    with pytest.raises(ValueError, match="harmbench has 1 instructions: choose n from 1 to 1, not 2"):
        load_public_set("harmbench", n=2, source=source)
    with pytest.raises(OSError, match="harmbench could not be loaded from .*nowhere .*: check that the hub"):
        load_public_set("harmbench", source=tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        load_public_set("harmbench")
