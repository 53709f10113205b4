"""What holds for all tests; and notebooks under nbval, each in a kernel of its own, which is watched here.

Solutions are run with the organism. Lessons are run blank: with a tiny model of random weights, in a moment, or with
the model that COURSE_MODEL names.
"""
import functools
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in each process: two run at a time. Here, for torch reads it once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # more threads than cores get in each other's way as they wait
LESSONS_MODEL = os.environ.get("COURSE_MODEL")
os.environ["COURSE_MODEL"] = ""  # that is the organism

FOLDERS = []
PEAK_MEMORY = 900  # MB, of a notebook's kernel
STRICT = os.environ.get("COURSE_STRICT", "0")


@pytest.hookimpl(tryfirst=True)  # the kernel is started after this, with the notebook's first cell
def pytest_runtest_setup(item):
    """In solutions/ every check is strict."""
    if item.path.suffix == ".ipynb":
        solved = item.path.parent.name == "solutions"
        os.environ["COURSE_STRICT"] = "1" if solved else STRICT
        os.environ["COURSE_MODEL"] = "" if solved else LESSONS_MODEL or tiny_model(of_the_organism(item.path))


@functools.cache
def of_the_organism(lesson):
    """Whether a lesson takes no other models than those of the organism's world."""
    return "model = load_organism()" in lesson.read_text(encoding="utf-8")


@functools.cache
def tiny_model(worldly):
    """The folder of a model of random weights, of the organism's world or of none; it is gone when the tests end."""
    from tiny_models import save_terse, save_worldly
    folder = tempfile.TemporaryDirectory()
    FOLDERS.append(folder)  # or it would be gone at once
    return save_worldly(folder.name) if worldly else save_terse(folder.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """After a notebook's last cell: its kernel took no more memory than it may."""
    last = item.path.suffix == ".ipynb" and (nextitem is None or nextitem.path != item.path)
    peak = peak_memory(item.parent.kernel.km.provisioner.pid) if last and sys.platform == "linux" else 0
    result = yield  # the kernel is stopped
    assert peak <= PEAK_MEMORY, f"the kernel of {item.path.name} took {peak:.0f} MB"
    return result


def peak_memory(pid):
    """MB. Not by getrusage: its peak is also that of the process which started the kernel."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) / 1000
