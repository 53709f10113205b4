"""What holds for all tests; and notebooks under nbval, each in a kernel of its own, which is watched here."""
import os
import re
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in each process: two run at a time. Here, for torch reads it once
os.environ["COURSE_MODEL"] = ""  # lessons are run with the organism

PEAK_MEMORY = 900  # MB, of a notebook's kernel
STRICT = os.environ.get("COURSE_STRICT", "0")


@pytest.hookimpl(tryfirst=True)  # the kernel is started after this, with the notebook's first cell
def pytest_runtest_setup(item):
    """In solutions/ every check is strict."""
    if item.path.suffix == ".ipynb":
        os.environ["COURSE_STRICT"] = "1" if item.path.parent.name == "solutions" else STRICT


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
