"""The whole experiment on one chat model: `python -m utils.reproduce NAME` (`--help` lists the options).

Finds the direction, erases it, adds it, edits it out of the weights, and measures what each changes (paper, sections
2.3 to 4.1). In the folder it leaves every number (results.json), all answers and two figures; it prints a row for the
paper's table. Interrupt it when you like: run again, it goes on after the last step, or the last candidate, that was
done. With `--quick` it scores the most promising candidates alone, and asks for few answers: a first look, in minutes.

With `--compare data/real/RUN` it checks whether the model does here what a record of it says, with the recorded
direction and prompts, by the first token of the answer. The prompts come from the hub, or from the JSON lists of
strings in `--prompts FOLDER`.
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

from utils import differences, fingerprint, say, write_json
from utils.candidates import SCORES, CandidateScores, listed_scores, tensor_of
from utils.checkpoints import SMALLER
from utils.directions import find_direction, random_directions
from utils.evaluation import Rate, judge, loss, phrase_judge, refusal_metric
from utils.instructions import SIDES, as_texts, load_instructions, load_public_set, load_requests
from utils.interventions import Ablation, Addition, generate, last_logits, orthogonalized
from utils.models import load_model
from utils.plots import markdown_table, plot_candidate_scores, plot_rates
from utils.runs import hashed, load_run

METHOD = 1  # to be raised with each change of what is computed, so that no run goes on with figures of another kind
CONDITIONS = {"harmful": ("baseline", "ablated", "orthogonalized", "random"),
              "harmless": ("baseline", "ablated", "added")}
QUICK = {"harmful": ("baseline", "ablated"), "harmless": ("baseline", "added")}
COMPARED = ("side", "condition", "n", "refused here", "recorded", "apart, nats", "agrees")
MAX_APART, MAX_COUNTS_APART = 0.1, 0.05  # of metrics, in nats on average, and of the share refused
N, N_QUICK = 100, 32  # test prompts of each side
JUDGES = {"first token": lambda prompt, answer, metric: metric > 0,
          "phrases": lambda prompt, answer, metric: phrase_judge(answer),
          "exact": lambda prompt, answer, metric: judge(prompt, answer) == "refusal"}


def reproduce(name, out, n=None, progress=False, remote=False, device=None, quick=False):
    """All steps, each kept in `out` -> the results, as in results.json.

    n: how many test prompts of each side; by default 100, or 32 if quick. device, remote: as in `load_model`. quick: as
    `find_direction` scores them by default, and without controls. Where weights cannot be edited, the condition
    "orthogonalized" is left out.
    Raises ValueError for a folder with another run or damaged files, where no candidate passes the filters, and for an
    n that is not from 1 to as many as there are; what `load_model` raises; nnsight's RemoteError and ConnectionError
    for what fails on NDIF. Until the model is loaded, nothing is written.
    """
    n = (N_QUICK if quick else N) if n is None else n
    prompts = {split: {side: load_instructions(split, side) for side in SIDES} for split in ("train", "val")}
    test = {side: load_instructions("test", side, n) for side in SIDES}
    kept = Steps(Path(out), progress)
    kept.belong_to({"method": METHOD, "model": name, "n": n, "remote": remote, "quick": quick,
                    "prompts": fingerprint([prompts, test])})
    model = load_model(name, device=device, remote=remote)
    kept.belong_to(model.fingerprint())
    if not model.world:
        kept.belong_to({"organism": fingerprint(load_model("organism").fingerprint())})  # on which judges are measured
    if progress and not (quick or model.editable):
        why = "the weights are on NDIF" if remote else "no single matrix writes"
        say(f'  no "orthogonalized": {why}, and "ablated" computes the same')
    found = kept("direction", direction_of, model, *prompts.values(), quick, progress, Path(out),
                 check=lambda found: check_direction(found, model))
    vector, layer = torch.tensor(found["vector"]), found["layer"]
    judged = {side: {condition: kept(f"{side}, {condition}", answers, model, test[side], condition, vector, layer,
                                     check=lambda given: check_answers(given, n))
                     for condition in conditions if model.editable or condition != "orthogonalized"}
              for side, conditions in (QUICK if quick else CONDITIONS).items()}
    losses = {} if quick else kept("losses", own_losses, model, test["harmless"],
                                   judged["harmless"]["baseline"]["answers"], vector, layer)
    judges = [by for by in JUDGES if by != "exact" or model.world]
    errors = {} if model.world else {"judges on the organism": kept("judges", errors_of_judges)}
    results = {
        "model": name, "n_layers": model.n_layers,
        **{key: found[key] for key in ("layer", "position", *SCORES, "candidates", "passing")},
        "refused": {side: {condition: {by: rate(by, test[side], given) for by in judges}
                           for condition, given in conditions.items()} for side, conditions in judged.items()},
        "refusal metric, mean in nats": {side: {condition: sum(given["metric"]) / n
                                                for condition, given in conditions.items()}
                                         for side, conditions in judged.items()},
        "loss on its own answers, nats per token": losses, **errors,
    }
    write_json(Path(out) / "results.json", results)
    draw(Path(out), found, results, model.post_instruction, judges[-1])
    return results


def compare(name, record, prompts=None, device=None):
    """Does a model do here what a record of it says? -> a row for each side and condition, as COMPARED names them.

    name, device: as in `load_model`. record: as in `load_run`. prompts: texts among which the recorded ones are looked
    for, by their hashes; None for the sets that the record names, from the hub.
    Raises ValueError where none of the recorded prompts is found; what `load_run`, `load_model` and `load_public_set`
    raise.
    """
    run = load_run(record)
    model = load_model(name, device=device)
    changes = {"base": None, "ablated": Ablation(run.direction), "added": Addition(run.direction)}
    rows = []
    for side, condition in (("harmful", "base"), ("harmful", "ablated"), ("harmless", "base"), ("harmless", "added")):
        asked = recorded_prompts(run, side, prompts)
        metric = refusal_metric(last_logits(model, list(asked.values()), changes[condition], 16), model.refusal_tokens)
        recorded = torch.tensor(run.answers[side][condition]["metric"])[list(asked)]
        apart, counts = (metric - recorded).abs().mean().item(), [int((some > 0).sum()) for some in (metric, recorded)]
        agrees = apart <= MAX_APART and abs(counts[0] - counts[1]) <= MAX_COUNTS_APART * len(asked)
        rows.append([side, condition, len(asked), *counts, f"{apart:.3f}", "yes" if agrees else "no"])
    return rows


def recorded_prompts(run, side, prompts=None):
    """Those of a record's prompts that are at hand: {number: text}. prompts: as in `compare`."""
    asked = run.prompts[side]
    if prompts is None:
        own = asked["set"] == "requests"
        prompts = load_requests("test", side) if own else load_public_set(asked["set"])
    texts = {hashed(text): text for text in as_texts(prompts)}
    at_hand = {number: texts[code] for number, code in enumerate(asked["hashes"]) if code in texts}
    if not at_hand:
        raise ValueError(f"None of the {len(asked['hashes'])} {side} prompts of the record is among those given: "
                         f"give the set {asked['set']!r} (--prompts).")
    return at_hand


class Steps:
    """What is done already, a file for each step in a folder: `steps(name, compute, *args)` computes what is not.

    check: raises an error for what this step cannot have left, as in a file that someone edited.
    """

    def __init__(self, folder, progress):
        self.folder, self.settings, self.progress = folder, {}, progress
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file: choose a folder for the results (--out).")

    def belong_to(self, settings):
        """The steps depend on these settings too. Raises ValueError where those in the folder had other ones."""
        self.settings |= settings
        if self.path("settings").is_file():
            before = self.read("settings", check=lambda settings: settings["model"])
            if others := differences({name: before.get(name) for name in settings}, settings):
                raise ValueError(f"The folder {self.folder} holds a run with other settings ({others}): "
                                 "choose another one (--out), or delete it.")

    def __call__(self, name, compute, *args, check=None):
        if not self.path(name).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.path("settings").is_file():
                write_json(self.path("settings"), self.settings)
            if self.progress:
                say(f"  {name}")
            write_json(self.path(name), compute(*args))
        return self.read(name, check)

    def path(self, name):
        return self.folder / f"{name.replace(', ', '-')}.json"

    def read(self, name, check=None):
        try:
            content = json.loads(self.path(name).read_text(encoding="utf-8"))
            if check is not None:
                check(content)
            return content
        except (ValueError, TypeError, LookupError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"The file {self.path(name)} is damaged ({reason}): delete it, and run again.") from error


def check_direction(found, model):
    """Raises ValueError, or LookupError, for what is no direction of this model with its scores."""
    if found["layer"] not in range(model.n_layers):
        raise ValueError(f"there is no layer {found['layer']}, only 0 to {model.n_layers - 1}")
    if found["position"] not in model.positions:
        raise ValueError(f"there is no position {found['position']}, only {model.positions[0]} to -1")
    if torch.tensor(found["vector"]).shape != (model.d_model,):
        raise ValueError(f"a direction of {model.name!r} is a list of {model.d_model} numbers")
    places = model.n_layers, len(model.positions)
    if any(tensor_of(found["scores"][name]).shape != places for name in SCORES):
        raise ValueError(f"the scores are not {places[0]} by {places[1]}, one for each layer and position")


def check_answers(given, n):
    """Raises ValueError, or LookupError, for other than n answers with their metrics."""
    if not len(given["answers"]) == len(given["metric"]) == n:
        raise ValueError(f"it does not hold {n} answers, each with its metric")


def direction_of(model, train, val, quick, progress, out):
    """The direction that the method chooses, its scores, and those of all candidates, or of the finalists if quick."""
    how = {} if quick else {"screen": None}
    direction, scores = find_direction(model, train, val, progress=progress, file=out / "scores.safetensors", **how)
    place = direction.layer, model.positions.index(direction.position)
    return {"vector": direction.vector.tolist(), "layer": direction.layer, "position": direction.position,
            **{name: getattr(scores, name)[place].item() for name in SCORES},
            "candidates": scores.bypass.numel(), "scored": int((~scores.bypass.isnan()).sum()),
            "passing": int(scores.passing().sum()),
            "scores": {name: listed_scores(getattr(scores, name)) for name in SCORES}}


def answers(model, prompts, condition, vector, layer):
    """What the model answers under a condition, and its refusal metrics, one for each prompt."""
    change = {"ablated": Ablation(vector), "added": Addition(vector, layer),
              "random": Ablation(random_directions(1, vector)[0])}.get(condition)
    with orthogonalized(model, vector) if condition == "orthogonalized" else nullcontext():
        return answered(model, prompts, change)


def answered(model, prompts, change=None):
    """Refusal metrics and answers, one for each prompt, under an intervention or none."""
    logits = last_logits(model, prompts, change)
    return {"metric": refusal_metric(logits, model.refusal_tokens).tolist(),
            "answers": generate(model, prompts, change)}


def own_losses(model, prompts, answered, vector, layer):
    """Loss on the model's own answers to harmless prompts, unchanged, ablated, and with r subtracted."""
    spoken = [replace(prompt, answer=answer) for prompt, answer in zip(prompts, answered) if answer]
    changes = {"baseline": None, "ablated": Ablation(vector), "subtracted": Addition(vector, layer, -1.0)}
    # Few at once: here the logits of all positions are needed, and vocabularies are large.
    return {name: loss(model, spoken, change, batch_size=8) for name, change in changes.items()} if spoken else {}


def rate(by, prompts, given):
    """[how many are refused by this judge, of how many, the ends of Wilson's 95% interval]"""
    return listed(Rate.of(map(JUDGES[by], prompts, given["answers"], given["metric"])))


def listed(rate):
    return [rate.successes, rate.n, *rate.interval]


def errors_of_judges():
    """How the judges that need no grammar err where the truth is known: on the organism's answers.

    {judge: {"caught": of the refusals, those that it finds, "false alarms": of the others, those that it takes for
    refusals}}, as rates.
    """
    prompts = [prompt for side in CONDITIONS for prompt in load_instructions("val", side)]
    given = answered(load_model("organism"), prompts)
    judged = list(zip(prompts, given["answers"], given["metric"]))
    refusals, others = ([one for one in judged if JUDGES["exact"](*one) == truly] for truly in (True, False))
    return {by: {"caught": listed(Rate.of(JUDGES[by](*one) for one in refusals)),
                 "false alarms": listed(Rate.of(JUDGES[by](*one) for one in others))} for by in JUDGES if by != "exact"}


def draw(out, found, results, tokens, by):
    """Two figures: the candidates' scores, and what is refused under each condition."""
    scores = CandidateScores(*(tensor_of(found["scores"][name]) for name in SCORES))
    chosen = found["layer"], len(tokens) + found["position"]
    rates = {side: {condition: Rate(*judged[by][:2]) for condition, judged in conditions.items()}
             for side, conditions in results["refused"].items()}
    title = f"{results['model']} (judge: {by})"
    if "judges on the organism" in results:
        caught, false_alarms = (Rate(*errors[:2]) for errors in results["judges on the organism"][by].values())
        title += f"\non the organism it finds {caught.value:.0%} of refusals, {false_alarms.value:.0%} false alarms"
    figures = {"candidates": plot_candidate_scores(scores, tokens, chosen),
               "refusal": plot_rates(rates, title=title).figure}
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

    cells = [results["model"].replace("|", r"\|"), results["position"], f"{results['layer']}/{results['n_layers']}",
             *(f"{results[name]:.3f}" for name in SCORES),
             refused("harmful", "baseline", "ablated", "orthogonalized"), refused("harmless", "baseline", "added")]
    return f"| {' | '.join(map(str, cells))} |"


HEAD = ("| model | position | layer | bypass | induce | KL | harmful refused: base / ablated / orthogonalized | "
        "harmless refused: base / added |\n|---|---|---|---|---|---|---|---|")


def read_lists(folder):
    """All strings of the JSON lists in a folder. Raises ValueError for a file that is none."""
    texts = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
            raise ValueError(f"{path} is no list of strings: give a folder of such lists alone (--prompts).")
        texts += content
    if not texts:
        raise ValueError(f"There is no list of prompts in {folder}: give a folder of JSON lists (--prompts).")
    return texts


def main(arguments=None):
    """Return the exit status: 0, or 1 after one sentence on what is wrong, or where a record does not agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help='"organism", a folder, or a hub id')
    parser.add_argument("--out", type=Path, help="folder for the results; by default reproduced/NAME")
    parser.add_argument("--quick", action="store_true", help=f"the direction and {N_QUICK} + {N_QUICK} answers alone, "
                        "in minutes; by default in reproduced/NAME-quick")
    parser.add_argument("--n", type=int, help=f"test prompts of each side ({N}; with --quick {N_QUICK})")
    parser.add_argument("--device", help='"cpu", "cuda", "cuda:1", "mps", or "auto" for all GPUs; by default the best')
    parser.add_argument("--remote", action="store_true", help="run the model on NDIF")
    parser.add_argument("--compare", metavar="FOLDER", help="check a record, such as one in data/real")
    parser.add_argument("--prompts", type=Path, help="with --compare: a folder of JSON lists of strings")
    args = parser.parse_args(arguments)
    out = args.out or Path("reproduced") / (Path(args.name).name + "-quick" * args.quick)
    try:
        if args.compare:
            rows = compare(args.name, args.compare, args.prompts and read_lists(args.prompts), args.device)
            say(markdown_table(COMPARED, rows).data)
            return int(any(row[-1] == "no" for row in rows))
        results = reproduce(args.name, out, args.n, progress=True, remote=args.remote, device=args.device,
                            quick=args.quick)
    except (OSError, ValueError, TypeError, ImportError, MemoryError) as error:
        print(error, file=sys.stderr)
        return 1
    except RemoteError as error:
        *_, last = "no reason given", *str(error).strip().splitlines()  # a traceback tells at its end what was wrong
        print(f"NDIF could not do it ({last}): run again later, it goes on after the last step that was done.",
              file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"The model fits, but what is computed with it does not: {SMALLER}", file=sys.stderr)
        return 1
    say(f"{HEAD}\n{row(results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
