"""Build solutions/ from lessons/ and the source of utils, and run what was built.

    python -m utils.solutions [lessons/02_difference_in_means.ipynb ...]    build and run all, or those named
    python -m utils.solutions --check                                       only say which are out of date

Each `@exercise` cell is filled with the source of the function of utils that has its name. The cells carry nbgrader's
markers and metadata, so that `nbgrader generate_assignment` takes a solution as it is.
"""
import ast
import inspect
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.output_widget import OutputWidget

from utils.checks import find_check

ROOT = Path(__file__).resolve().parent.parent
EXERCISE = re.compile(r"^@exercise\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)  # the first lines of a learner's function
DIFFICULTY = re.compile(r"difficulty (\d)/5")  # in the markdown cell above it, as is "10 minutes"


def lessons():
    """The notebooks of lessons/, in order."""
    return sorted((ROOT / "lessons").glob("*.ipynb"))


def solution_of(lesson):
    """solutions/NAME.ipynb for lessons/NAME.ipynb."""
    return ROOT / "solutions" / lesson.name


def build(lesson):
    """The solution of a lesson (a path), not yet run: a notebook with the lesson's cells, ids and metadata."""
    notebook = nbformat.read(lesson, as_version=4)
    points = 1
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            points = int((DIFFICULTY.findall(cell.source) or [points])[-1])
        elif name := exercise_name(cell):
            cell.source = fill(cell.source, name)
            cell.metadata["nbgrader"] = nbgrader(name, solution=True)
        elif check := re.search(r"^check\((\w+)\)", cell.source, re.MULTILINE):
            cell.metadata["nbgrader"] = nbgrader(f"check_{check[1]}", solution=False, points=points)
    return notebook


def exercise_name(cell):
    """The name of the function that a cell asks the learner to write, or None."""
    match = EXERCISE.search(cell.source) if cell.cell_type == "code" else None
    return match and match[1]


def fill(source, name):
    """The source of an exercise cell with the function of utils in the place of the learner's.

    What stands above `@exercise` is kept. Raises KeyError if there is no such exercise.
    """
    return source[:source.index("@exercise")] + "@exercise\n" + mark(inspect.getsource(find_check(name).reference))


def mark(source):
    """A function's source with its body, docstring aside, between nbgrader's markers."""
    function = ast.parse(source).body[0]
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    lines = source.rstrip().split("\n")
    first = body[0].lineno - 1
    while lines[first - 1].lstrip().startswith("#"):  # a comment belongs to what it stands above
        first -= 1
    marked = lines[:first] + ["    ### BEGIN SOLUTION"] + lines[first:] + ["    ### END SOLUTION"]
    return "\n".join(marked)


def nbgrader(grade_id, solution, **points):
    """nbgrader's metadata: for the cell that the student fills, or for the check that grades it."""
    return {"grade": not solution, "grade_id": grade_id, "locked": not solution, **points, "schema_version": 3,
            "solution": solution, "task": False}


class SilentOutput(OutputWidget):
    """nbclient's place for what a control prints, but it sends nothing back to the kernel, which has no use for it.

    A message sent while nbclient waits for a reply can make it miss the reply, and wait until its timeout.
    """

    def send(self, *args, **kwargs):
        pass


def run(notebook, folder, strict=True):
    """Run a notebook in `folder` as its lesson would be, and keep its outputs in it.

    strict: stop at an exercise whose answer is blank or wrong. Raises nbclient's CellExecutionError, as for any error.
    """
    metadata = dict(notebook.metadata)  # without the exact version of Python, which the kernel would add
    environment = {**os.environ, "COURSE_STRICT": str(int(strict))}
    client = NotebookClient(notebook, kernel_name="python3", timeout=600, record_timing=False,
                            resources={"metadata": {"path": str(folder)}})
    client.widget_registry["@jupyter-widgets/output"]["OutputModel"] = SilentOutput
    client.execute(env=environment)
    notebook.metadata = nbformat.from_dict(metadata)


def refuse_private(notebook, name):
    """Raise ValueError where an output holds a path of this machine, or anything on stderr: warnings, progress bars."""
    private = [str(ROOT), str(Path.home()), tempfile.gettempdir() + os.sep]
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise ValueError(f"{name}, cell {number} writes to stderr, which may differ each time: {output.text}")
            for path in private:
                if repr(path)[1:-1] in str(output):
                    raise ValueError(f"{name}, cell {number}: its output holds a path of this machine, {path}")


def stripped(notebook):
    """A notebook as text without outputs, to compare two."""
    notebook = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(notebook)


def out_of_date():
    """One sentence for each solution that is missing, differs from what would be built, or has no lesson."""
    faults = []
    for lesson in lessons():
        solution = solution_of(lesson)
        if not solution.is_file():
            faults.append(f"solutions/{lesson.name} is missing.")
        elif stripped(nbformat.read(solution, as_version=4)) != stripped(build(lesson)):
            faults.append(f"solutions/{lesson.name} differs from its lesson, or from utils.")
    orphans = {path.name for path in (ROOT / "solutions").glob("*.ipynb")} - {path.name for path in lessons()}
    return faults + [f"solutions/{name} has no lesson." for name in sorted(orphans)]


def main(arguments):
    """Return the exit status: 0, or 1 if something is out of date."""
    if arguments == ["--check"]:
        faults = out_of_date()
        print("\n".join(faults + ["Run `make solutions`."] if faults else ["solutions/ is up to date."]))
        return int(bool(faults))
    os.environ.pop("COURSE_MODEL", None)  # solutions show the organism
    for lesson in [Path(argument).resolve() for argument in arguments] or lessons():
        print(f"solutions/{lesson.name}", flush=True)
        notebook = build(lesson)
        run(notebook, lesson.parent)
        refuse_private(notebook, lesson.name)
        solution_of(lesson).parent.mkdir(exist_ok=True)
        nbformat.write(notebook, solution_of(lesson))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
