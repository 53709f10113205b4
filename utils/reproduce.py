"""The whole experiment on one chat model: `python -m utils.reproduce NAME [--out FOLDER] [--n PROMPTS] [--remote]`.

Finds the direction, erases it, adds it, edits it out of the weights, and measures what each changes (paper, sections
2.3 to 4.2). In the folder it leaves every number (results.json), all answers and two figures; it prints a row for the
paper's table. Interrupt it when you like: run again, it goes on after the last step that was done.
"""
import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from nnsight.intervention.backends.remote import RemoteError

from utils import write_json
from utils.directions import CandidateScores, find_direction, random_directions
from utils.evaluation import Rate, judge, loss, phrase_judge, refusal_metric
from utils.instructions import load_instructions
from utils.interventions import Ablation, Addition, generate, last_logits, orthogonalized
from utils.models import is_own, load_model
from utils.plots import plot_candidate_scores, plot_rates

CONDITIONS = {"harmful": ("baseline", "ablated", "orthogonalized", "random"),
              "harmless": ("baseline", "ablated", "added")}
SCORES = ("bypass", "induce", "kl")
JUDGES = {"phrases": lambda prompt, answer, metric: phrase_judge(answer),
          "first token": lambda prompt, answer, metric: metric > 0,
          "exact": lambda prompt, answer, metric: judge(prompt, answer) == "refusal"}


def reproduce(name, out, n=100, progress=False, remote=False):
    """All steps, each kept in `out` -> the results, as in results.json.

    n: how many test prompts of each side. remote: run the model on NDIF, without the condition "orthogonalized".
    Raises ValueError for a folder with another run, where no candidate passes the filters, and for an n that is not
    from 1 to as many as there are; what `load_model` raises; nnsight's RemoteError for what fails on NDIF.
    """
    kept = Steps(Path(out), {"model": name, "n": n, "remote": remote}, progress)
    test = {side: load_instructions("test", side, n) for side in CONDITIONS}
    model = load_model(name, remote=remote)
    if remote and progress:
        print('  no "orthogonalized": the weights are on NDIF, and "ablated" computes the same')
    found = kept("direction", direction_of, model, progress)
    vector, layer = torch.tensor(found["vector"]), found["layer"]
    judged = {side: {condition: kept(f"{side}, {condition}", answers, model, test[side], condition, vector, layer)
                     for condition in conditions if not (remote and condition == "orthogonalized")}
              for side, conditions in CONDITIONS.items()}
    spoken = judged["harmless"]["baseline"]["answers"]
    losses = kept("losses", own_losses, model, test["harmless"], spoken, vector, layer)
    judges = [by for by in JUDGES if by != "exact" or is_own(name)]
    results = {
        "model": name, "n_layers": model.n_layers,
        **{key: found[key] for key in ("layer", "position", *SCORES, "candidates", "passing")},
        "refused": {side: {condition: {by: rate(by, test[side], given) for by in judges}
                           for condition, given in conditions.items()} for side, conditions in judged.items()},
        "refusal metric, mean in nats": {side: {condition: sum(given["metric"]) / n
                                                for condition, given in conditions.items()}
                                         for side, conditions in judged.items()},
        "loss on its own answers, nats per token": losses,
    }
    write_json(Path(out) / "results.json", results)
    draw(Path(out), found, results, model.post_instruction, judges[-1])
    return results


class Steps:
    """What is done already, a file for each step in a folder: `steps(name, compute, *args)` computes what is not."""

    def __init__(self, folder, settings, progress):
        self.folder, self.progress = folder, progress
        self.folder.mkdir(parents=True, exist_ok=True)
        if self("settings", dict, settings) != settings:
            raise ValueError(f"The folder {folder} holds a run with other settings, {self.read('settings')}: "
                             "choose another one (--out), or delete it.")

    def __call__(self, name, compute, *args):
        if not self.path(name).is_file():
            if self.progress:
                print(f"  {name}", flush=True)
            write_json(self.path(name), compute(*args))
        return self.read(name)

    def path(self, name):
        return self.folder / f"{name.replace(', ', '-')}.json"

    def read(self, name):
        try:
            return json.loads(self.path(name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"The file {self.path(name)} is damaged ({error}): delete it, and run again.") from error


def direction_of(model, progress):
    """The direction that the method chooses, its scores, and those of all candidates."""
    sides = [load_instructions(split, side) for split in ("train", "val") for side in CONDITIONS]
    direction, scores = find_direction(model, *sides, progress=progress)
    place = direction.layer, model.positions.index(direction.position)
    return {"vector": direction.vector.tolist(), "layer": direction.layer, "position": direction.position,
            **{name: getattr(scores, name)[place].item() for name in SCORES},
            "candidates": scores.bypass.numel(), "passing": int(scores.passing().sum()),
            "scores": {name: getattr(scores, name).tolist() for name in SCORES}}


def answers(model, prompts, condition, vector, layer):
    """What the model answers under a condition, and its refusal metrics, one for each prompt."""
    change = {"ablated": Ablation(vector), "added": Addition(vector, layer),
              "random": Ablation(random_directions(1, vector)[0])}.get(condition)
    with orthogonalized(model, vector) if condition == "orthogonalized" else nullcontext():
        logits = last_logits(model, prompts, change)
        return {"metric": refusal_metric(logits, model.refusal_tokens).tolist(),
                "answers": generate(model, prompts, change)}


def own_losses(model, prompts, answered, vector, layer):
    """Loss on the model's own answers to harmless prompts, unchanged, ablated, and with r subtracted."""
    spoken = [replace(prompt, answer=answer) for prompt, answer in zip(prompts, answered) if answer]
    changes = {"baseline": None, "ablated": Ablation(vector), "subtracted": Addition(vector, layer, -1.0)}
    return {name: loss(model, spoken, change) for name, change in changes.items()} if spoken else {}


def rate(by, prompts, given):
    """[how many are refused by this judge, of how many, the ends of Wilson's 95% interval]"""
    refused = Rate.of(map(JUDGES[by], prompts, given["answers"], given["metric"]))
    return [refused.successes, refused.n, *refused.interval]


def draw(out, found, results, tokens, by):
    """Two figures: the candidates' scores, and what is refused under each condition."""
    scores = CandidateScores(*(torch.tensor(found["scores"][name]) for name in SCORES))
    chosen = found["layer"], len(tokens) + found["position"]
    rates = {side: {condition: Rate(*judged[by][:2]) for condition, judged in conditions.items()}
             for side, conditions in results["refused"].items()}
    figures = {"candidates": plot_candidate_scores(scores, tokens, chosen),
               "refusal": plot_rates(rates, title=f"{results['model']} (judge: {by})").figure}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=150)
        plt.close(figure)  # or a notebook would show it once more


def row(results):
    """The model's row for the table "paper | yours", in Markdown, refusals in per cent by the last judge."""
    def percent(judged):
        successes, n, *_ = list(judged.values())[-1]
        return f"{100 * successes / n:.0f}"

    def refused(side, *conditions):
        judged = results["refused"][side]
        return " / ".join(percent(judged[condition]) if condition in judged else "-" for condition in conditions)

    cells = [results["model"], results["position"], f"{results['layer']}/{results['n_layers']}",
             *(f"{results[name]:.3f}" for name in SCORES),
             refused("harmful", "baseline", "ablated", "orthogonalized"), refused("harmless", "baseline", "added")]
    return f"| {' | '.join(map(str, cells))} |"


HEAD = ("| model | position | layer | bypass | induce | KL | harmful refused: base / ablated / orthogonalized | "
        "harmless refused: base / added |\n|---|---|---|---|---|---|---|---|")


def main(arguments=None):
    """Return the exit status: 0, or 1 after one sentence on what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help='"organism", a folder, or a hub id')
    parser.add_argument("--out", type=Path, help="folder for the results; by default reproduced/NAME")
    parser.add_argument("--n", type=int, default=100, help="test prompts of each side (100)")
    parser.add_argument("--remote", action="store_true", help="run the model on NDIF")
    args = parser.parse_args(arguments)
    try:
        results = reproduce(args.name, args.out or Path("reproduced") / Path(args.name).name, args.n, progress=True,
                            remote=args.remote)
    except (OSError, ValueError, TypeError, MemoryError, RemoteError) as error:
        print(error, file=sys.stderr)
        return 1
    print(HEAD, row(results), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
