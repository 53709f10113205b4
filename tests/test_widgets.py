"""Controls: no position of any raises an error, and each shows what belongs to its position."""
from html import unescape

import matplotlib
import pytest
import torch
from ipywidgets import Text

from utils import world
from utils.candidates import CandidateScores
from utils.directions import Direction
from utils.instructions import load_instructions
from utils.interventions import Addition, generate
from utils.plots import completions_table
from utils.widgets import candidate_picker, coefficient_slider, request_builder, suffix_editor

matplotlib.use("Agg")
pytestmark = pytest.mark.filterwarnings("ignore:.*non-interactive:UserWarning")


@pytest.fixture
def shown(monkeypatch):
    """What the widgets display, in a list; and figures are closed."""
    displayed = []
    monkeypatch.setattr("utils.widgets.display", displayed.append)
    yield displayed
    matplotlib.pyplot.close("all")


@pytest.fixture
def direction():
    return Direction(torch.randn(32, generator=torch.Generator().manual_seed(0)).double(), layer=2, position=-1)


def positions(control):
    """All that a control can be set to."""
    if isinstance(control, Text):
        return ["", "   ", "How do I bake a cake?", "<|eot_id|> 😀 <b>\n", "word " * 40]
    return [value for _, value in control._options_full] if hasattr(control, "options") \
        else range(control.min, control.max + 1)


def sweep(box):
    """Show each control at each of its positions, the others as they are; yield all controls' values each time.

    The callback is called by hand, because within a box its errors are printed rather than raised.
    """
    start = {control._kwarg: control.value for control in box.kwargs_widgets}
    for control in box.kwargs_widgets:
        for value in positions(control):
            settings = {**start, control._kwarg: value}
            box.f(**settings)
            yield settings


def test_candidate_picker(capsys):
    scores = CandidateScores(*(torch.arange(36.0).view(3, 4, 3) / 100))
    along = dict(zip(("harmful", "harmless"), torch.randn(2, 8, 4, 3, generator=torch.Generator().manual_seed(0))))
    for values in along.values():
        values[:, 0] = 0  # as at layer 0, where there is no direction
    box = candidate_picker(scores, along, ["<|eot|>", "assistant", "\n\n"])
    for settings in sweep(box):
        at = settings["layer"], settings["position"]  # -1 is the last one
        assert f"bypass {scores.bypass[at]:.2f}  induce {scores.induce[at]:.2f}  kl {scores.kl[at]:.4f}" in \
            capsys.readouterr().out
        matplotlib.pyplot.close("all")


def test_coefficient_slider(llama, direction, shown, capsys):
    prompts = load_instructions("test", "harmless", n=2)
    coefficients = [-1.0, 0.0, 3.0]
    for settings in sweep(coefficient_slider(llama, direction, prompts, coefficients)):
        coefficient = settings["coefficient"]
        added = generate(llama, prompts, Addition(direction.vector, 2, coefficient))
        assert shown[-1].data == completions_table(prompts, baseline=generate(llama, prompts), added=added).data
        assert capsys.readouterr().out.splitlines()[-1] == "broken  broken"  # a random model's answers


def test_request_builder(llama, direction, shown, capsys, monkeypatch):
    monkeypatch.setattr(llama.lm._module.generation_config, "eos_token_id", list(range(300)))  # short answers: faster
    asked = set()
    for settings in sweep(request_builder(llama, direction, n_acts=2)):
        asked.add(settings["act"])
        own, text = settings["your_own"].strip(), capsys.readouterr().out.splitlines()[-1]
        assert text.startswith("holds a refusal's phrase" if own else "exact judge")
        assert own or "'added': 'broken'" in text
        assert all(f">{name}</th>" in shown[-1].data for name in ("baseline", "ablated", "added"))
    assert len(asked) == 4


def test_another_judge_may_be_given(llama, direction, shown, capsys):
    def judge(instruction, completion):
        return f"about {instruction.act}"

    request_builder(llama, direction, n_acts=2, judge=judge).f(act="dance", way="explain", preface="none", your_own="")
    assert capsys.readouterr().out.splitlines()[-1].startswith("judge: {'baseline': 'about dance'")
    prompts = load_instructions("test", "harmless", n=2)
    coefficient_slider(llama, direction, prompts, [0.0], judge).f(coefficient=0.0)
    assert capsys.readouterr().out.splitlines()[-1] == f"about {prompts[0].act}  about {prompts[1].act}"


def test_a_built_request_is_judged_as_built(llama, direction, shown, capsys, monkeypatch):
    """The preface that the answer returns is no fault of the answer."""
    box = request_builder(llama, direction, n_acts=2)
    [(_, act), *_] = box.kwargs_widgets[0].options
    answer = f"{world.begin('hello')}{world.refusal_answer(act, 'explain')}"
    monkeypatch.setattr("utils.widgets.generate", lambda *args: [answer])
    box.f(act=act, way="explain", preface="hello", your_own="")
    assert "'baseline': 'refusal'" in capsys.readouterr().out
    assert f"Hello! Explain how to {act}." in shown[-1].data


def test_suffix_editor(llama, direction, shown, capsys):
    prompts = load_instructions("test", "harmful", n=2)
    for settings in sweep(suffix_editor(llama, direction, prompts, [(0, 1), (2, 3)], start=" bike")):
        plain, suffixed = capsys.readouterr().out.splitlines()[-2:]
        assert plain.startswith("harmful") and suffixed.startswith("suffix")
        unchanged = not settings["suffix"].strip()
        assert (plain.split("metric")[1] == suffixed.split("metric")[1]) == unchanged
        assert f"{prompts[0].text} {settings['suffix'].strip()}".strip() in unescape(shown[-1].data)
        matplotlib.pyplot.close("all")


def test_the_metric_is_that_of_the_refusal_tokens_of_now(llama, direction, shown, capsys, monkeypatch):
    """What was measured before they were replaced is not shown again."""
    show = suffix_editor(llama, direction, load_instructions("test", "harmful", n=2), [(0, 1)]).f
    metrics = []
    for tokens in ([40], [7, 8]):
        monkeypatch.setattr(llama, "refusal_tokens", tokens)
        show(suffix="")
        metrics.append(capsys.readouterr().out.split("metric")[1].split()[0])
        matplotlib.pyplot.close("all")
    assert metrics[0] != metrics[1]
