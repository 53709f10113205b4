"""The whole experiment by one command: its numbers, its resumption, its one sentence when something is wrong."""
import io
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib
import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteError
from planted_model import planted_directions, planted_prompts, save_planted
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_tokenizer
from transformers import GenerationConfig

from utils import reproduce, say, write_json
from utils.candidates import AT_A_TIME, Scorer
from utils.instructions import Instruction
from utils.models import load_model

matplotlib.use("Agg")
MARKS = {"harmful": "#", "harmless": "+"}
N = 4  # prompts of each side


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The checkpoint of a model with a known direction, which says "I" to refuse."""
    folder = Path(save_planted(tmp_path_factory.mktemp("planted")))
    (folder / "refusal_tokens.json").write_text("[40]")
    return str(folder)


def load_marked(split, side, n=8):
    """Prompts that the planted model understands, in place of the course's."""
    texts = planted_prompts(MARKS[side], n, seed=len(split))
    return [Instruction(id=text, text=text, side=side) for text in texts]


ERRORS = {by: {"caught": [3, 4, 0.3, 0.95], "false alarms": [0, 4, 0.0, 0.49]} for by in ("first token", "phrases")}


@pytest.fixture
def its_prompts(monkeypatch):
    monkeypatch.setattr(reproduce, "load_instructions", load_marked)
    monkeypatch.setattr(reproduce, "errors_of_judges", lambda: ERRORS)  # the organism does not understand these prompts


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    """The folder of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "load_instructions", load_marked)
        patch.setattr(reproduce, "errors_of_judges", lambda: ERRORS)
        reproduce.reproduce(planted, folder, n=N)
    return folder


def test_the_planted_direction_does_what_it_should(whole):
    results = json.loads((whole / "results.json").read_text())
    assert (results["layer"], results["n_layers"]) == (2, 6)
    vector = torch.tensor(json.loads((whole / "direction.json").read_text())["vector"])
    assert torch.cosine_similarity(vector, planted_directions()[0], dim=0) > 0.99
    refused = {(side, condition): by["first token"][:2] for side, conditions in results["refused"].items()
               for condition, by in conditions.items() if condition != "random"}  # 32 dimensions are few for that
    assert refused == {
        ("harmful", "baseline"): [N, N], ("harmful", "ablated"): [0, N], ("harmful", "orthogonalized"): [0, N],
        ("harmless", "baseline"): [0, N], ("harmless", "ablated"): [0, N], ("harmless", "added"): [N, N]}
    assert list(results["refused"]["harmful"]["baseline"]) == ["first token", "phrases"]  # its texts have no grammar
    assert results["judges on the organism"] == ERRORS
    metric = results["refusal metric, mean in nats"]["harmful"]
    assert metric["ablated"] == pytest.approx(metric["orthogonalized"], abs=1e-4)  # in float32; the metric reaches 78
    losses = results["loss on its own answers, nats per token"]
    assert losses["ablated"] == pytest.approx(losses["baseline"], abs=1e-3)
    assert all((whole / name).stat().st_size > 10_000 for name in ("candidates.png", "refusal.png"))
    assert reproduce.row(results).count("|") == reproduce.HEAD.splitlines()[0].count("|")


def test_the_errors_of_judges_are_those_on_the_organism():
    errors = reproduce.errors_of_judges()
    assert list(errors) == list(ERRORS)
    for by in errors.values():
        (caught, n_refusals, *_), (false_alarms, n_others, *_) = by["caught"], by["false alarms"]
        assert n_refusals + n_others == 64 and n_refusals >= 30 and 16 <= caught <= n_refusals and false_alarms <= 3


def test_the_figure_says_how_its_judge_errs(planted, its_prompts, whole, monkeypatch):
    titles = []
    draw_rates = reproduce.plot_rates
    monkeypatch.setattr(reproduce, "plot_rates",
                        lambda rates, title: titles.append(title) or draw_rates(rates, title=title))
    assert reproduce.reproduce(planted, whole, n=N) == json.loads((whole / "results.json").read_text())
    assert titles == [f"{planted} (judge: phrases)\non the organism it finds 75% of refusals, 0% false alarms"]


@pytest.mark.slow
def test_interrupted_anywhere_and_run_again_it_gives_the_same_numbers(planted, whole, its_prompts, tmp_path,
                                                                      monkeypatch):
    expected = json.loads((whole / "results.json").read_text())
    write, left = reproduce.write_json, [0]

    def one_then_none(path, content):
        if left[0] == 0:
            path.with_suffix(".part").write_text("{")  # cut off in the middle of a file
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, content)

    monkeypatch.setattr(reproduce, "write_json", one_then_none)
    interrupts, results = 0, None
    while results is None:
        left[0] = 1
        try:
            results = reproduce.reproduce(planted, tmp_path / "cut", n=N)
        except KeyboardInterrupt:
            interrupts += 1
    assert results == expected
    assert interrupts == len(list(whole.glob("*.json"))) - 1

    for step in ("direction_of", "answers", "own_losses"):  # what is done is not done again
        monkeypatch.setattr(reproduce, step, None)
    left[0] = 1
    assert reproduce.reproduce(planted, tmp_path / "cut", n=N) == expected


@pytest.mark.slow
def test_the_sweep_goes_on_after_the_last_candidate(planted, whole, its_prompts, tmp_path, monkeypatch):
    measured, measure = [], Scorer.measure

    def interrupted(scorer, name, *place):
        if len(measured) == 20:
            raise KeyboardInterrupt
        measured.append((name, *place))
        measure(scorer, name, *place)

    monkeypatch.setattr(Scorer, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(planted, tmp_path, n=N)
    with safe_open(tmp_path / "scores.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in reproduce.SCORES}
    assert not any(kept[name][layer, index].isnan().any() for name, layer, index in measured)
    assert any(values.isnan().any() for values in kept.values())
    monkeypatch.setattr(Scorer, "measure", measure)
    assert reproduce.reproduce(planted, tmp_path, n=N) == json.loads((whole / "results.json").read_text())


def test_quick(planted, whole, its_prompts, tmp_path, capsys):
    """The same direction by fewer scores, a first table, and no controls; its folder takes no other run."""
    assert reproduce.main([planted, "--quick", "--n", "3", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].count(" / - | ") == 1  # no "orthogonalized"
    results, full = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, whole))
    refused = {side: {condition: by["first token"][:2] for condition, by in conditions.items()}
               for side, conditions in results["refused"].items()}
    assert refused == {"harmful": {"baseline": [3, 3], "ablated": [0, 3]},
                       "harmless": {"baseline": [0, 3], "added": [3, 3]}}
    # All positions of this layer hold the planted direction: which of them a few prompts prefer, rounding may decide.
    assert results["layer"] == full["layer"]
    assert full["bypass"] - 1e-3 <= results["bypass"] <= full["bypass"] + 0.1
    swept = json.loads((whole / "direction.json").read_text())["scores"]["bypass"][results["layer"]]
    assert results["bypass"] == pytest.approx(swept[results["position"]], abs=1e-3)

    found = json.loads((tmp_path / "direction.json").read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    scored = [score for layer in found["scores"]["bypass"] for score in layer if score is not None]
    # The five at layer 0 change nothing, and keep the unchanged model's scores.
    assert 5 + AT_A_TIME <= len(scored) < results["candidates"]
    assert (tmp_path / "candidates.png").stat().st_size > 10_000
    assert "other settings (quick)" in sentence_of(capsys, [planted, "--n", "3", "--out", tmp_path])


@pytest.mark.parametrize("arguments, n, out", [
    (["organism"], None, "organism"), (["organism", "--quick"], None, "organism-quick"),
    (["a/folder", "--quick", "--n", "7"], 7, "folder-quick")])
def test_what_the_command_asks_for(monkeypatch, arguments, n, out):
    asked = []
    monkeypatch.setattr(reproduce, "reproduce", lambda *args, **options: asked.append((args, options)) or stop())
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(arguments)
    [((_, folder, n_asked), options)] = asked
    assert (folder, n_asked, options["quick"]) == (Path("reproduced") / out, n, "--quick" in arguments)


@pytest.mark.slow
def test_the_organism_by_the_command(tmp_path, capsys):
    assert reproduce.main(["organism", "--out", str(tmp_path), "--n", "10"]) == 0
    out = capsys.readouterr().out
    assert "harmful, ablated" in out and out.splitlines()[-1].startswith("| organism | -1 |")
    refused = json.loads((tmp_path / "results.json").read_text())["refused"]
    exact = {(side, condition): by["exact"][0] for side, by_condition in refused.items()
             for condition, by in by_condition.items()}
    assert exact["harmful", "baseline"] >= 8 and exact["harmful", "random"] >= 8
    assert exact["harmful", "ablated"] == exact["harmful", "orthogonalized"] == 0
    assert exact["harmless", "baseline"] == exact["harmless", "ablated"] == 0 and exact["harmless", "added"] >= 5


def test_where_weights_cannot_be_edited_it_does_without(planted, whole, its_prompts, tmp_path, monkeypatch, capsys):
    def load(*args, **options):
        model = load_model(*args, **options)
        model.editable = False
        return model
    monkeypatch.setattr(reproduce, "load_model", load)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "harmful-orthogonalized.json").unlink()
    assert reproduce.main([planted, "--out", str(tmp_path), "--n", str(N)]) == 0
    assert 'no "orthogonalized": no single matrix writes' in capsys.readouterr().out
    assert "orthogonalized" not in json.loads((tmp_path / "results.json").read_text())["refused"]["harmful"]


# what is wrong, in one sentence

def organism_run(folder, **changes):
    """A folder as a run with the organism leaves it after its first step, but for some changes."""
    found = {"vector": [1.0] * 192, "layer": 4, "position": -1, "scores": {}, **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "find_direction", lambda *args, **options: stop())
        with pytest.raises(KeyboardInterrupt):
            reproduce.reproduce("organism", folder, n=2)
    write_json(folder / "direction.json", found)
    return ["organism"]


def stop():
    raise KeyboardInterrupt


def tiny(tmp_path, **options):
    return Path(save_tiny(tmp_path / "tiny", **options))


def no_template(tmp_path, request):
    folder = tiny(tmp_path)
    (folder / "chat_template.jinja").unlink()
    tiny_tokenizer(template=None).save_pretrained(folder)
    return [folder]


def corrupt(tmp_path, request):
    folder = tiny(tmp_path)
    os.truncate(folder / "model.safetensors", 1000)
    return [folder]


def of_another_shape(tmp_path, request):
    folder = tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    return [folder]


def no_key(tmp_path, request):
    request.getfixturevalue("monkeypatch").setattr(nnsight.CONFIG.API, "APIKEY", None)
    return ["someone/large", "--remote"]


def gated(status):
    def prepare(tmp_path, request):
        request.getfixturevalue("gated_hub")(status)
        return ["somebody/gated-chat"]
    return prepare


def out_of_reach(tmp_path, request):
    request.getfixturevalue("monkeypatch").setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return ["nobody/nothing"]


BASE = "{{ bos_token }}{{ messages[0]['content'] }}"  # a template that joins texts, and marks no turns
BAD_INPUTS = {
    "unknown name": (lambda *_: ["organsim"], "There is no model 'organsim'"),
    "unknown hub id": (out_of_reach, "'nobody/nothing' could not be loaded"),
    "gated: not logged in": (gated(401), "is gated: accept its licence at https://huggingface.co/somebody/gated-chat,"),
    "gated: licence not accepted": (gated(403), "is gated: accept its licence"),
    "no template": (no_template, "has no chat template: choose the instruct or chat version"),
    "empty list": (lambda *_: ["organism", "--n", 0], "choose n from 1 to"),
    "more prompts than there are": (lambda *_: ["organism", "--n", 100_000], "choose n from 1 to"),
    "wrong shape: weights": (of_another_shape, "have not the shapes that its config.json says"),
    "wrong shape: direction": (lambda at, _: organism_run(at / "out", vector=[1.0] * 16), "of 'organism' is a list of"),
    "wrong shape: scores": (lambda at, _: organism_run(at / "out"), "direction.json is damaged (it lacks 'bypass')"),
    "corrupt safetensors": (corrupt, "are damaged"),
    "missing NDIF key": (no_key, "get one at https://login.ndif.us"),
    "negative layer": (lambda at, _: organism_run(at / "out", layer=-1), "there is no layer -1, only 0 to"),
    "a position that is none": (lambda at, _: organism_run(at / "out", position=3), "there is no position 3, only -"),
    "mixed devices: a GPU that is not here": (lambda at, _: ["organism", "--device", "cuda:7"], "no device 'cuda:7'"),
    "mixed devices: two at once": (lambda at, _: ["organism", "--device", "cpu,mps"], "no device 'cpu,mps' here"),
    "mixed devices: no device": (lambda at, _: ["organism", "--device", "gpu"], "no device 'gpu' here: choose cpu"),
    "base model": (lambda at, _: [tiny(at, template=BASE)], "puts no tokens after the instruction: choose"),
    "unknown family": (lambda at, _: [tiny(at, architecture="gpt2")], "GPT2LMHeadModel, which, unlike Llama, lacks"),
}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sentence_of(capsys, arguments):
    """The one line that the command leaves on stderr, beside progress bars, when it fails."""
    assert reproduce.main([str(argument) for argument in arguments]) == 1
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("prepare, words", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs(prepare, words, tmp_path, request, capsys):
    """Exit status 1 after one sentence, all files as they were, and no folder for results that will never be."""
    arguments = prepare(tmp_path, request)
    before = files(tmp_path)
    n = [] if "--n" in arguments else ["--n", 2]
    assert words in sentence_of(capsys, [*arguments, *n, "--out", tmp_path / "out"])
    assert files(tmp_path) == before and (tmp_path / "out").exists() == ("out" in {path.parent.name for path in before})


@pytest.fixture
def gated_hub(monkeypatch):
    """As the hub answers, by a server of our own: call this with the status that it answers with."""
    class Gate(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(Gate.status)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args): pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Gate) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            hub + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield lambda status: setattr(Gate, "status", status)
        server.shutdown()


@pytest.mark.parametrize("n, out, damage, words", [
    (N + 1, "", {}, "holds a run with other settings"),
    (N, "results.json", {}, "is a file: choose a folder"),
    (N, "", {"settings.json": ""}, "settings.json is damaged"),
    (N, "", {"direction.json": '{"vector": [0.1'}, "direction.json is damaged"),
    (N, "", {"harmless-added.json": '{"metric": [], "answers": []}'}, "does not hold 4 answers"),
])
def test_a_folder_with_another_run_or_a_damaged_file(planted, whole, its_prompts, tmp_path, capsys, n, out, damage,
                                                     words):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name, content in damage.items():
        (tmp_path / name).write_text(content)
    before = files(tmp_path)
    assert words in sentence_of(capsys, [planted, "--out", tmp_path / out, "--n", n])
    assert files(tmp_path) == before


# a folder holds the results of one very model, prompts and method

def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def other_weights(folder, patch):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] *= 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_config(folder, patch):
    edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-3))


def other_tokenizer(folder, patch):
    edit_json(folder / "tokenizer.json", lambda tokenizer: tokenizer["model"]["merges"].pop())


def other_template(folder, patch):
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("{% for", "Be brief. {% for"))


def other_ends(folder, patch):
    GenerationConfig(eos_token_id=[328, 327]).save_pretrained(folder)


def other_refusal_tokens(folder, patch):
    (folder / "refusal_tokens.json").write_text("[40, 41]")


def other_prompts(folder, patch):
    patch.setattr(reproduce, "load_instructions", lambda split, side, n=8: load_marked(split[::-1] + "!", side, n))


def other_method(folder, patch):
    patch.setattr(reproduce, "METHOD", reproduce.METHOD + 1)


def other_organism(folder, patch):
    patch.setattr(reproduce, "load_model", lambda name, **options: load_model(
        "helpful_only" if name == "organism" else name, **options))


def half_precision(folder, patch):
    patch.setattr(reproduce, "load_model", lambda name, **options: load_model(name, dtype=torch.bfloat16, **options))


@pytest.mark.parametrize("change, part", [
    (other_weights, "weights"), (other_config, "config"), (other_tokenizer, "tokenizer"), (other_template, "template"),
    (other_ends, "turn ends"), (other_refusal_tokens, "refusal tokens"), (other_prompts, "prompts"),
    (other_method, "method"), (other_organism, "organism"), (half_precision, "weights, precision")])
def test_results_of_something_else_are_not_gone_on_with(planted, whole, its_prompts, tmp_path, monkeypatch, capsys,
                                                        change, part):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(planted, model)
    shutil.copytree(whole, out)
    edit_json(out / "settings.json", lambda settings: settings.update(model=str(model)))
    change(model, monkeypatch)
    before = files(out)
    assert f"with other settings ({part}): choose another" in sentence_of(capsys, [model, "--out", out, "--n", N])
    assert files(out) == before


# consoles that lack a letter

@pytest.mark.parametrize("encoding, text, shown", [
    ("cp1252", "модель, café", "??????, café"), ("ascii", "r̂ é", "r? ?"), ("utf-8", "модель", "модель"),
    ("utf-8", "a\udcff", "a?")])  # a name of bytes that are no letters
def test_lines_are_printed_on_any_console(monkeypatch, encoding, text, shown):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", console)
    say(text)
    console.flush()
    assert console.buffer.getvalue().decode(encoding).splitlines() == [shown]


def test_the_row_of_a_model_with_an_odd_name(monkeypatch, whole):
    results = {**json.loads((whole / "results.json").read_text()), "model": "модель|1"}
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", console)
    monkeypatch.setattr(reproduce, "reproduce", lambda *args, **options: results)
    assert reproduce.main(["модель|1"]) == 0
    console.flush()
    head, *_, last = console.buffer.getvalue().decode("cp1252").splitlines()
    assert last.startswith(r"| ??????\|1 | -") and last.replace(r"\|", "").count("|") == head.count("|")


def test_noise_has_no_direction(tmp_path, capsys):
    assert "holds" not in sentence_of(capsys, [tiny(tmp_path), "--out", tmp_path / "out", "--n", N])


@pytest.mark.parametrize("error, words", [
    (RemoteError("Traceback (most recent call last):\n  File ...\nRuntimeError: CUDA error"),
     "NDIF could not do it (RuntimeError: CUDA error): run again later"),
    (RemoteError(""), "(no reason given)"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried ..."), "does not: choose a smaller model"),
    (ImportError("pip install accelerate."), "pip install accelerate."),
])
def test_what_breaks_off_on_the_way(error, words, tmp_path, capsys, monkeypatch):
    def fail(*args, **options):
        raise error
    monkeypatch.setattr(reproduce, "load_model", fail)
    assert words in sentence_of(capsys, ["someone/large", "--remote", "--out", tmp_path])
