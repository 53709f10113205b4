"""The whole experiment by one command: its numbers, its resumption, its one sentence when something is wrong."""
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import matplotlib
import pytest
import torch
from planted_model import planted_directions, planted_prompts, save_planted
from tiny_models import save_tiny, tiny_tokenizer

from utils import reproduce
from utils.instructions import Instruction, load_instructions

matplotlib.use("Agg")
MARKS = {"harmful": "#", "harmless": "+"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The checkpoint of a model with a known direction, which says "I" to refuse."""
    folder = Path(save_planted(tmp_path_factory.mktemp("planted")))
    (folder / "refusal_tokens.json").write_text("[40]")
    return str(folder)


@pytest.fixture
def its_prompts(monkeypatch):
    """Prompts that the planted model understands, in place of the course's."""
    def load(split, side, n=8):
        texts = planted_prompts(MARKS[side], n, seed=len(split))
        return [Instruction(id=text, text=text, side=side) for text in texts]
    monkeypatch.setattr(reproduce, "load_instructions", load)


def test_the_planted_direction_does_what_it_should(planted, its_prompts, tmp_path):
    results = reproduce.reproduce(planted, tmp_path, n=6)
    assert (results["layer"], results["n_layers"]) == (2, 6)
    vector = torch.tensor(json.loads((tmp_path / "direction.json").read_text())["vector"])
    assert torch.cosine_similarity(vector, planted_directions()[0], dim=0) > 0.99
    refused = {(side, condition): by["first token"][:2] for side, conditions in results["refused"].items()
               for condition, by in conditions.items() if condition != "random"}  # 32 dimensions are few for that
    assert refused == {
        ("harmful", "baseline"): [6, 6], ("harmful", "ablated"): [0, 6], ("harmful", "orthogonalized"): [0, 6],
        ("harmless", "baseline"): [0, 6], ("harmless", "ablated"): [0, 6], ("harmless", "added"): [6, 6]}
    assert "exact" not in results["refused"]["harmful"]["baseline"]  # its texts are not of the world's grammar
    metric = results["refusal metric, mean in nats"]["harmful"]
    assert metric["ablated"] == pytest.approx(metric["orthogonalized"], abs=1e-4)
    losses = results["loss on its own answers, nats per token"]
    assert losses["ablated"] == pytest.approx(losses["baseline"], abs=1e-3)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("candidates.png", "refusal.png"))
    assert reproduce.row(results).count("|") == reproduce.HEAD.splitlines()[0].count("|")


def test_interrupted_anywhere_and_run_again_it_gives_the_same_numbers(planted, its_prompts, tmp_path, monkeypatch):
    whole = reproduce.reproduce(planted, tmp_path / "whole", n=2)
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
            results = reproduce.reproduce(planted, tmp_path / "cut", n=2)
        except KeyboardInterrupt:
            interrupts += 1
    assert results == whole
    assert interrupts == len(list((tmp_path / "whole").glob("*.json"))) - 1

    for step in ("direction_of", "answers", "own_losses"):  # what is done is not done again
        monkeypatch.setattr(reproduce, step, None)
    left[0] = 1
    assert reproduce.reproduce(planted, tmp_path / "cut", n=2) == whole


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


# what is wrong, in one sentence

def fails(capsys, *arguments):
    assert reproduce.main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    return error[-1]


@pytest.fixture
def folder(tmp_path):
    return Path(save_tiny(tmp_path / "tiny"))


def test_a_folder_with_another_run_or_a_damaged_file(planted, its_prompts, tmp_path, capsys):
    assert reproduce.main([planted, "--out", str(tmp_path), "--n", "2"]) == 0
    assert "holds a run with other settings" in fails(capsys, planted, "--out", tmp_path, "--n", 3)
    os.truncate(tmp_path / "direction.json", 100)
    assert "direction.json is damaged" in fails(capsys, planted, "--out", tmp_path, "--n", 2)


def test_bad_models(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = ("--out", tmp_path / "out", "--n", 2)
    assert "There is no model 'organsim'" in fails(capsys, "organsim", *out)
    assert "could not be loaded" in fails(capsys, "nobody/nothing", "--out", tmp_path / "hub", "--n", 2)
    assert "holds" not in fails(capsys, folder, "--out", tmp_path / "random", "--n", 2)  # noise refuses nothing, or all
    os.truncate(folder / "model.safetensors", 1000)
    assert "are damaged" in fails(capsys, folder, "--out", tmp_path / "damaged", "--n", 2)
    (folder / "chat_template.jinja").unlink()
    tiny_tokenizer(template=None).save_pretrained(folder)
    assert "has no chat template" in fails(capsys, folder, "--out", tmp_path / "base", "--n", 2)


def test_a_base_model_whose_template_only_joins_texts(tmp_path, capsys):
    folder = save_tiny(tmp_path / "base", template="{{ bos_token }}{{ messages[0]['content'] }}")
    assert "puts no tokens after the instruction: choose a model whose template does" in \
        fails(capsys, folder, "--out", tmp_path / "out", "--n", 2)


def test_weights_of_another_shape(folder, tmp_path, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "have not the shapes that its config.json says" in fails(capsys, folder, "--out", tmp_path / "out", "--n", 2)


@pytest.mark.parametrize("status", [401, 403])  # not logged in; logged in, but the licence is not accepted
def test_a_gated_model(status, tmp_path, capsys, monkeypatch):
    """As the hub answers, by a server of our own."""
    class Gate(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
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
        error = fails(capsys, "somebody/gated-chat", "--out", tmp_path, "--n", 2)
        server.shutdown()
    assert error == ("'somebody/gated-chat' is gated: accept its licence at https://huggingface.co/somebody/"
                     "gated-chat, then run `hf auth login` with a token of that account, and load it again.")


def test_more_prompts_than_there_are(tmp_path, capsys):
    n = len(load_instructions("test", "harmful"))
    assert f"choose n from 1 to {n}, not {n + 1}" in fails(capsys, "organism", "--out", tmp_path, "--n", n + 1)
    assert "choose n from 1" in fails(capsys, "organism", "--out", tmp_path / "0", "--n", 0)
