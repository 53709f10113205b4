"""The controls in JupyterLab, in a real browser: they are drawn, they move, and what they show follows them.

Needs Chromium or Chrome on the path; without one these tests are skipped.
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path")]

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]

CELLS = [
    """
from utils import widgets
from utils.directions import find_direction
from utils.instructions import load_instructions
from utils.models import load_model

model = load_model("organism")
SIDES = ("harmful", "harmless")
train, val = ({side: load_instructions(split, side) for side in SIDES} for split in ("train", "val"))
direction, scores = find_direction(model, train, val, screen=None)
""",
    """
import torch
along = {side: torch.randn(8, *scores.bypass.shape) for side in SIDES}
widgets.candidate_picker(scores, along, model.post_instruction)
""",
    'widgets.coefficient_slider(model, direction, val["harmless"][:2], [0.0, 0.5, 1.0, 1.5])',
    'widgets.request_builder(model, direction)',
]


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a notebook with the three controls: its address."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in CELLS])
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(notebook, folder / "controls.ipynb")
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False}), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
                   "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=test", f"--ServerApp.root_dir={folder}"]
    with open(tmp_path / "log", "w") as log, \
            subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/api", server)
            yield f"http://127.0.0.1:{port}/lab/tree/controls.ipynb?token=test&reset"
        finally:
            server.terminate()


def wait_for(address, server, seconds=60):
    for _ in range(seconds):
        assert server.poll() is None, "JupyterLab ended"
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(1)
    raise TimeoutError(f"JupyterLab did not answer within {seconds} seconds.")


@pytest.fixture
def page(lab):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 2400})
        page.set_default_timeout(90_000)
        expect.set_options(timeout=90_000)
        page.goto(lab)
        page.get_by_text("| Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        yield page
        browser.close()


def test_controls(page):
    boxes = page.locator(".jupyter-widgets.widget-interact")
    expect(boxes).to_have_count(3)
    picker, slider, builder = (boxes.nth(i) for i in range(3))

    expect(picker.locator("img")).to_have_count(2)
    before = picker.locator("pre").first.inner_text()
    picker.locator(".noUi-handle").first.press("ArrowRight")
    expect(picker.locator(".widget-readout").first).to_have_text("5")
    expect(picker.locator("pre").first).not_to_have_text(before)
    expect(picker.locator("img")).to_have_count(2)

    expect(slider.locator("table")).to_have_count(1)
    table = slider.locator("table").inner_text()
    slider.locator(".noUi-handle").first.press("ArrowLeft")
    slider.locator(".noUi-handle").first.press("ArrowLeft")
    unchanged = slider.locator("td").nth(1).inner_text()
    expect(slider.locator("td").nth(2)).to_have_text(unchanged)  # c = 0: the answer is as without
    assert slider.locator("table").inner_text() != table

    expect(builder.locator("td")).to_have_count(4)
    builder.locator("select").nth(1).select_option("teach")
    expect(builder.locator("td").first).to_contain_text("Teach me to")
    builder.locator("input[type=text]").fill("Explain how to <b>bake</b> bread.")
    builder.locator("input[type=text]").press("Enter")
    expect(builder.locator("td").first).to_have_text("Explain how to <b>bake</b> bread.")

    expect(page.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)
    expect(page.locator("[data-mime-type='application/vnd.jupyter.stderr']")).to_have_count(0)
