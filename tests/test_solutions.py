"""The builder of solutions, on a toy lesson; and that what is committed is what would be built."""
import json

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from utils import solutions
from utils.checks import all_checks

EXERCISE = '''\
# Your turn.
@exercise
def difference_in_means(harmful, harmless):
    """What to write."""
    ...  # your code here'''


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """The path of a toy lesson in a folder of its own."""
    monkeypatch.setattr(solutions, "ROOT", tmp_path)
    (tmp_path / "lessons").mkdir()
    path = tmp_path / "lessons" / "09_toy.ipynb"
    nbformat.write(new_notebook(cells=[
        new_markdown_cell("# Toy", id="title"),
        new_code_cell("import torch\nfrom utils.exercises import check, exercise, summary", id="imports"),
        new_markdown_cell("**Exercise 1** · difficulty 3/5 · 5 minutes", id="task"),
        new_code_cell(EXERCISE, id="exercise"),
        new_code_cell("check(difference_in_means)", id="check"),
        new_code_cell("difference_in_means(torch.ones(2, 1), torch.zeros(2, 1))", id="use"),
        new_code_cell("summary()", id="summary"),
    ], metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}), path)
    return path


@pytest.fixture
def bare(lesson):
    """The toy lesson without its exercise, which the course's library would have to be imported for."""
    notebook = nbformat.read(lesson, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id in ("title", "use")]
    notebook.cells[1].source = "1 + 1"
    nbformat.write(notebook, lesson)
    return lesson


def change(path, cell_id, source):
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if cell.id == cell_id).source = source
    nbformat.write(notebook, path)


def built(lesson):
    """Run the builder: the text of the solution."""
    assert solutions.main([]) == 0
    return solutions.solution_of(lesson).read_text(encoding="utf-8")


def write_unrun(lesson):
    """Write the solution without running it, for outputs do not matter to --check."""
    path = solutions.solution_of(lesson)
    path.parent.mkdir()
    nbformat.write(solutions.build(lesson), path)


# what is built

def test_exercise_is_filled_from_utils(lesson):
    cells = {cell.id: cell for cell in solutions.build(lesson).cells}
    assert cells["exercise"].source.startswith("# Your turn.\n@exercise\ndef difference_in_means(harmful, harmless):\n")
    assert cells["exercise"].source.endswith(
        "    ### BEGIN SOLUTION\n    return harmful.mean(dim=0) - harmless.mean(dim=0)\n    ### END SOLUTION")
    assert list(cells) == ["title", "imports", "task", "exercise", "check", "use", "summary"]


def test_nbgrader_metadata(lesson):
    cells = {cell.id: cell for cell in solutions.build(lesson).cells}
    assert cells["exercise"].metadata.nbgrader == {
        "grade": False, "grade_id": "difference_in_means", "locked": False, "schema_version": 3, "solution": True,
        "task": False}
    assert cells["check"].metadata.nbgrader == {
        "grade": True, "grade_id": "check_difference_in_means", "locked": True, "points": 3, "schema_version": 3,
        "solution": False, "task": False}
    assert "nbgrader" not in cells["use"].metadata


def test_unknown_exercise_is_refused(lesson):
    change(lesson, "exercise", EXERCISE.replace("difference_in_means", "sum_of_means"))
    with pytest.raises(KeyError, match="sum_of_means"):
        solutions.build(lesson)


@pytest.mark.parametrize("name", all_checks())
def test_every_reference_can_be_marked(name):
    source = solutions.fill("@exercise\n", name)
    assert source.count("### BEGIN SOLUTION") == source.count("### END SOLUTION") == 1
    compile(source, name, "exec")
    stub = source[:source.index("    ### BEGIN SOLUTION")] + "    ...\n"  # as nbgrader hands it out
    compile(stub, name, "exec")


def test_marks_keep_docstring_and_first_comment_apart():
    source = 'def f(x):\n    """Two\n    lines."""\n    # why\n    return x\n'
    assert solutions.mark(source) == ('def f(x):\n    """Two\n    lines."""\n    ### BEGIN SOLUTION\n    # why\n'
                                      '    return x\n    ### END SOLUTION')


# built and run

def test_built_and_run(lesson):
    text = built(lesson)
    assert "1 of 1 yours, 0 from the reference." in text
    assert "tensor([1.])" in text
    metadata = json.loads(text)["metadata"]
    assert metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    assert text.endswith("}\n")


@pytest.mark.parametrize("toy", ["bare", pytest.param("lesson", marks=pytest.mark.slow)])
def test_built_again_with_the_same_bytes(toy, request):
    path = request.getfixturevalue(toy)
    assert built(path) == built(path)


@pytest.mark.slow
def test_wrong_reference_stops_the_build(lesson):
    change(lesson, "check", "difference_in_means.attempt = lambda a, b: b\ncheck(difference_in_means)")
    with pytest.raises(CellExecutionError, match="AssertionError"):
        solutions.main([])
    assert not solutions.solution_of(lesson).exists()


def test_one_lesson_alone_can_be_built(bare):
    (bare.parent / "10_broken.ipynb").write_text("{}")
    assert solutions.main([str(bare)]) == 0
    assert solutions.solution_of(bare).is_file()


def test_solutions_are_built_with_the_organism(bare, monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", "somebody/chat")
    change(bare, "use", "import os\nprint('the model is', os.environ.get('COURSE_MODEL'))")
    assert "the model is None" in built(bare)


@pytest.mark.parametrize("source, said", [
    ("print(__import__('os').getcwd())", "path of this machine"),
    ("print(__import__('pathlib').Path.home() / 'x')", "path of this machine"),
    ("import warnings; warnings.warn('old')", "stderr"),
])
def test_outputs_that_differ_from_machine_to_machine_are_refused(bare, source, said):
    change(bare, "use", source)
    with pytest.raises(ValueError, match=said):
        solutions.main([])


# --check

def test_check_passes_after_a_build(lesson, capsys):
    write_unrun(lesson)
    assert solutions.main(["--check"]) == 0
    assert "up to date" in capsys.readouterr().out


def test_check_finds_a_missing_solution(lesson, capsys):
    assert solutions.main(["--check"]) == 1
    assert "solutions/09_toy.ipynb is missing." in capsys.readouterr().out


@pytest.mark.parametrize("cell_id, source", [
    ("title", "# Another title"), ("use", "print(2)"), ("exercise", "# Another word.\n" + EXERCISE)])
def test_check_finds_a_changed_lesson(lesson, cell_id, source, capsys):
    write_unrun(lesson)
    change(lesson, cell_id, source)
    assert solutions.main(["--check"]) == 1
    assert "solutions/09_toy.ipynb differs" in capsys.readouterr().out


def test_check_finds_an_edited_solution(lesson):
    write_unrun(lesson)
    change(solutions.solution_of(lesson), "exercise", "def difference_in_means(a, b): return a - b")
    assert solutions.main(["--check"]) == 1


def test_check_finds_changed_utils(lesson, monkeypatch):
    write_unrun(lesson)
    monkeypatch.setattr(solutions.inspect, "getsource", lambda function: "def f(x):\n    return 0\n")
    assert solutions.main(["--check"]) == 1


def test_check_finds_a_solution_without_lesson(lesson, capsys):
    write_unrun(lesson)
    lesson.unlink()
    assert solutions.main(["--check"]) == 1
    assert "solutions/09_toy.ipynb has no lesson." in capsys.readouterr().out


# what is committed

COMMITTED = [pytest.param(solutions.solution_of(lesson), id=lesson.stem) for lesson in solutions.lessons()]


def test_committed_solutions_are_up_to_date():
    assert solutions.out_of_date() == []


@pytest.mark.parametrize("solution", COMMITTED)
def test_committed_solutions_have_clean_outputs(solution):
    notebook = nbformat.read(solution, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    solutions.refuse_private(notebook, solution.name)
    text = solution.read_text(encoding="utf-8")
    assert not [folder for folder in ("/home/", "/root/", "/Users/", "/tmp/", "C:\\\\Users") if folder in text]
