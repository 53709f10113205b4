"""Every lesson keeps the rules, and runs with some exercises solved, one wrong, and the others blank.

Blank and solved `make test` runs them with nbval, as they are: see conftest.py at the root.
"""
import ast
import builtins
import inspect
import re
from statistics import median

import nbformat
import pytest
from tiny_models import save_terse, save_tiny

from utils.checks import find_check
from utils.solutions import DIFFICULTY, ROOT, exercise_name, fill, lessons, run

WITH_EXERCISES = [lesson for lesson in lessons() if "_lab_" not in lesson.stem]  # all but the laboratories
NOTEBOOKS, LESSONS = ([pytest.param(lesson, id=lesson.stem) for lesson in paths]
                      for paths in (lessons(), WITH_EXERCISES))


def read(lesson):
    """The notebook, and its exercise cells by name, in order."""
    notebook = nbformat.read(lesson, as_version=4)
    return notebook, {exercise_name(cell): cell for cell in notebook.cells if exercise_name(cell)}


def printed(notebook):
    """Run a notebook in the folder of the lessons: all that it prints."""
    run(notebook, ROOT / "lessons", strict=False)
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", [])
                   if output.output_type == "stream")


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_solution_says_that_all_is_right(lesson):
    exercises = read(lesson)[1]
    notebook = nbformat.read(ROOT / "solutions" / lesson.name, as_version=4)
    text = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", [])
                   if output.output_type == "stream")
    assert f"{len(exercises)} of {len(exercises)} yours, 0 from the reference." in text


# What lies between blank and solved, and another model: in one run of each lesson.

WATCH_AXES = """
import numpy as np

def empty(axis):
    if axis.images:
        return any(np.ma.masked_invalid(image.get_array()).count() == 0 for image in axis.images)
    return not (np.isfinite(axis.dataLim.get_points()).all() and axis.dataLim.overlaps(axis.viewLim))

def watch_axes():
    from matplotlib import pyplot
    for axis in [axis for number in pyplot.get_fignums() for axis in pyplot.figure(number).axes]:
        if axis.get_label() != "<colorbar>" and empty(axis):
            print("an empty axis:", axis.get_title())

get_ipython().events.register("post_execute", watch_axes)  # comes before Jupyter's own, which closes a cell's figures
"""
EMPTY = "from matplotlib import pyplot\npyplot.figure().subplots().set_title('of this test')"


@pytest.fixture(scope="module")
def random_llama(tmp_path_factory):
    return save_terse(tmp_path_factory.mktemp("random"))


def shown(cells):
    """Of each cell, the kinds of the figures and tables that it shows."""
    return [[kind for output in cell.get("outputs", []) for kind in output.get("data", {})
             if kind in ("image/png", "text/html", "text/markdown")] for cell in cells]


def answer_in_part(exercises):
    """Answer the first exercise wrongly, half of the rest rightly, no other -> what is to be said of them.

    A lesson goes on with its first one. exercises: the cells by name, which are changed.
    """
    wrong, *others = exercises
    solved, blank = others[:len(exercises) // 2], others[len(exercises) // 2:]
    sentence = next(iter(find_check(wrong).mistakes))
    exercises[wrong].source = (
        f"from utils.checks import find_check\n\n@exercise\ndef {wrong}(*args, **kwargs):\n"
        f"    return find_check({wrong!r}).mistakes[{sentence!r}](*args, **kwargs)")
    for name in solved:
        exercises[name].source = fill(exercises[name].source, name)
    return [f"Not yet: {wrong}: {sentence}\nUntil it is right, the reference answers in its place.",
            *(f"Right: {name} is yours from here on." for name in solved),
            *(f"{name} is still blank: the reference answers in its place." for name in blank),
            f"{len(solved)} of {len(exercises)} yours, {len(blank) + 1} from the reference."]


def up_to_the_model_and_exercises(cells):
    loads = next(place for place, cell in enumerate(cells) if cell.source.startswith("model = load_organism()"))
    return [cell for place, cell in enumerate(cells) if place <= loads or exercise_name(cell)
            or cell.source.startswith(("check(", "summary("))]


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS)
def test_one_wrong_half_solved_the_others_blank_with_a_model_whose_answers_are_noise(lesson, random_llama, monkeypatch):
    """Nothing fails, every figure and table is there, no figure is empty, and what they are worth is said.

    The lesson on suffixes says that it stays with the organism, and does. Of it only what comes up to there is run, and
    the exercises: all of it runs with the organism under nbval, solved.
    """
    monkeypatch.setenv("COURSE_MODEL", random_llama)
    notebook, exercises = read(lesson)
    n_cells, source = len(notebook.cells), "\n".join(cell.source for cell in notebook.cells)
    sentences = answer_in_part(exercises)
    stays = "\nmodel = load_organism()" in source
    if stays:
        notebook.cells = up_to_the_model_and_exercises(notebook.cells)
    notebook.cells = [nbformat.v4.new_code_cell(WATCH_AXES), *notebook.cells, nbformat.v4.new_code_cell(EMPTY)]
    text = printed(notebook)
    assert not [sentence for sentence in sentences if sentence not in text]
    assert re.findall("an empty axis: (.*)", text) == ["of this test"]
    solution = nbformat.read(ROOT / "solutions" / lesson.name, as_version=4)
    assert stays or shown(notebook.cells[1:n_cells + 1]) == shown(solution.cells)
    assert (f"goes on with the organism, not with {random_llama}.\n" in text) == ("load_organism()" in source)
    assert not stays or "ChatModel('organism'" in text
    searches = "find_direction(model" in source or "no_finding" in source
    assert ("no finding" in text) == (searches and not stays)
    assert ("told by a list of phrases" in text) == ("judge_of" in source)


@pytest.mark.slow
def test_the_lesson_on_edits_goes_on_with_the_organism_where_a_model_has_experts(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path, "qwen3_moe")
    monkeypatch.setenv("COURSE_MODEL", folder)
    notebook, _ = read(ROOT / "lessons" / "05_weight_orthogonalization.ipynb")
    text = printed(notebook)  # raises if a cell does
    assert f"{folder} are no plain matrices that can be edited: this goes on with the organism.\n" in text
    assert "ChatModel('organism'" in text and "no finding" not in text


# the rules

@pytest.mark.parametrize("lesson", LESSONS)
def test_shape_of_a_lesson(lesson):
    notebook, exercises = read(lesson)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert re.match(r"# \S", notebook.cells[0].source), "a lesson begins with its title"
    assert 4 <= len(exercises) <= 8, "a lesson has 4 to 8 exercises"
    assert code[-1].source.strip() == "summary()", "the last code cell is summary()"


@pytest.mark.parametrize("lesson", NOTEBOOKS)
def test_code_cells_fit_on_a_page(lesson):
    code = [cell for cell in read(lesson)[0].cells if cell.cell_type == "code"]
    assert not [cell.id for cell in code if len(cell.source.splitlines()) > 20], "a code cell has at most 20 lines"
    assert not [cell.id for cell in code if max(map(len, cell.source.splitlines())) > 88], \
        "a line of code has at most 88 characters"


def n_words(text):
    """How many words a reader must read: folded parts, tables, formulas and fenced code aside."""
    text = re.sub(r"<details>.*?</details>|\$\$.*?\$\$|```.*?```", " ", text, flags=re.DOTALL)
    text = re.sub(r"\$[^$\n]+\$", " ", text)
    return len(" ".join(line for line in text.splitlines() if not line.lstrip().startswith("|")).split())


def runs_of_words(cells):
    """Of all text before each code cell, and after the last: [words, id of the cell that ends it]."""
    runs, words = [], 0
    for cell in cells:
        if cell.cell_type == "markdown":
            words += n_words(cell.source)
        elif words:
            runs, words = [*runs, [words, cell.id]], 0
    return [*runs, [words, cells[-1].id]] if words else runs


@pytest.mark.parametrize("lesson", LESSONS)
def test_text_is_short_between_code_cells(lesson):
    cells = read(lesson)[0].cells
    runs = runs_of_words(cells)
    assert not [run for run in runs if run[0] > 150], "between two code cells there are at most 150 words"
    assert median(words for words, _ in runs) <= 45, "and at most 45 in the median"
    long = {cell.id: n_words(cell.source) for cell in cells if cell.cell_type == "markdown"}
    assert not {name: words for name, words in long.items() if words > 120}, "a text cell has at most 120 words"


def test_the_lessons_are_short():
    texts = [cell.source for lesson in WITH_EXERCISES for cell in read(lesson)[0].cells
             if cell.cell_type == "markdown"]
    assert sum(map(n_words, texts)) <= 18_000, "laboratories aside, the lessons have at most 18,000 words"


BRACKETED = re.compile(r"(?:^|[.!?:]\s+|\n)\(([A-Z][^()]*[.!?])\)")


@pytest.mark.parametrize("lesson", NOTEBOOKS)
def test_no_whole_sentence_is_in_brackets(lesson):
    cells = [cell for cell in read(lesson)[0].cells if cell.cell_type == "markdown"]
    assert not {cell.id: BRACKETED.findall(cell.source) for cell in cells if BRACKETED.search(cell.source)}, \
        "it stands on its own, in a folded aside, or in the limits"


RECORDED = re.compile(r"\b(?:Qwen2\.5-Coder|SmolLM2|smollm2|qwen2\.5-coder)[\w.-]*|\brefuser\b")
REFERENCES = re.compile(r"`[^`]*`|\]\([^)]*\)|\b(?:[Ll]essons?|[Ss]ections?|[Ee]xercises?) \d+|\d/5|\d+ minutes?"
                        r"|\d-bit")


def typed_figures(text):
    """The sentences that speak of a recorded model and hold a number, which a new record would make false."""
    sentences = re.split(r"(?<=[.!?])\s+|\n\n|\n(?=[-|#])", text)
    return [sentence for sentence in sentences if RECORDED.search(sentence)
            and re.search(r"\d", REFERENCES.sub("", RECORDED.sub("", sentence)))]


@pytest.mark.parametrize("lesson", NOTEBOOKS)
def test_no_real_figure_is_typed_into_prose(lesson):
    """It is read from the record by `load_run`, and printed or drawn."""
    cells = [cell for cell in read(lesson)[0].cells if cell.cell_type == "markdown"]
    assert not {cell.id: typed_figures(cell.source) for cell in cells if typed_figures(cell.source)}


@pytest.mark.parametrize("name", ["01", "02", "03", "04", "05", "07"])
def test_lessons_show_real_figures(name):
    [lesson] = [path for path in WITH_EXERCISES if path.stem.startswith(name)]
    code = "\n".join(cell.source for cell in read(lesson)[0].cells if cell.cell_type == "code")
    assert "load_run(" in code


@pytest.mark.parametrize("text, n", [
    ("Qwen2.5-Coder-0.5B refuses 55 of them.", 1), ("The refuser answers half. Others answer 30%.", 0),
    ("SmolLM2-135M refuses nothing (lesson 07).", 0), ("- the refuser: 43%\n- others: 2", 1),
    ("`load_run(\"qwen2.5-coder-0.5b\")` has the rest.", 0), ("| smollm2-refuser | 0.3 |", 1),
    ("Qwen 1.8B in the paper: 70%.", 0)])
def test_typed_figures_are_found(text, n):
    assert len(typed_figures(text)) == n


@pytest.mark.parametrize("text, words", [
    ("Two words.", 2), ("One $x + y$ formula", 2), ("A\n\n$$x = y$$\n\nb", 2), ("a\n| b | c |\n|---|---|\nd", 2),
    ("a <details><summary>why</summary>\n\nb c\n\n</details> d", 2)])
def test_words_are_counted(text, words):
    assert n_words(text) == words


@pytest.mark.parametrize("text, found", [
    ("It is. (So it is.) Yes.", ["So it is."]), ("(Mind that.)", ["Mind that."]), ("It is (so to speak) so.", []),
    ("It is (Table 5).", []), ("a\n(As here. And here.)", ["As here. And here."])])
def test_sentences_in_brackets_are_found(text, found):
    assert BRACKETED.findall(text) == found


@pytest.mark.parametrize("lesson", LESSONS)
def test_exercise_cells(lesson):
    notebook, exercises = read(lesson)
    cells = notebook.cells
    assert sum("@exercise" in cell.source for cell in cells if cell.cell_type == "code") == len(exercises), \
        "@exercise begins a line, its def follows, and no two exercises share a name"
    for name, cell in exercises.items():
        place = cells.index(cell)
        above, below = cells[place - 1], cells[place + 1]
        assert above.cell_type == "markdown" and above.source.startswith("**Exercise "), \
            f"{name}: the cell above begins with **Exercise N: title**"
        task = above.source.split("\n\n", maxsplit=1)[1]
        assert n_words(task) >= 10, f"{name}: the task comes after the title, in ten words or more"
        assert DIFFICULTY.search(above.source) and \
            re.search(r"\d+ minutes?", above.source), f"{name}: difficulty N/5 and N minutes stand in the cell above"
        assert below.cell_type == "code" and re.search(rf"^check\({name}\)$", below.source, re.MULTILINE), \
            f"{name}: check({name}) stands in the cell below"


@pytest.mark.parametrize("lesson", LESSONS)
def test_exercises_are_blank_and_called_as_in_utils(lesson):
    for name, cell in read(lesson)[1].items():
        [function] = [node for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]
        assert ast.get_docstring(function), f"{name}: the docstring says what to write"
        assert [ast.unparse(node) for node in function.body[1:]] == ["..."], f"{name}: the body is `...`"
        wanted = inspect.signature(find_check(name).reference).parameters
        assert [argument.arg for argument in function.args.args] == list(wanted)[:len(function.args.args)], \
            f"{name}: the arguments have the names that they have in utils"


@pytest.mark.parametrize("lesson", LESSONS)
def test_what_an_answer_calls_is_in_its_lesson(lesson):
    """Or the solution stops with a NameError."""
    known = set(dir(builtins))
    for cell in read(lesson)[0].cells:
        if cell.cell_type == "code":
            if name := exercise_name(cell):
                missing = names_used(find_check(name).reference) - known - {name}
                assert not missing, f"{name}: the lesson imports {', '.join(sorted(missing))} before this exercise"
            known |= names_set(ast.parse(cell.source))


def names_used(function):
    """The global names that a function looks up."""
    tree = ast.parse(inspect.getsource(function))
    looked_up = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    own = {argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args}
    return looked_up - own - names_set(tree)


def names_set(tree):
    """The names that code gives to something: imports, functions, variables."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names
