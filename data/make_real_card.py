"""Write the cards of the recorded runs, and the picture of all: `python data/make_real_card.py` -> data/real/."""
import matplotlib.pyplot as plt

from utils.candidates import SCORES
from utils.evaluation import Rate
from utils.plots import markdown_table, plot_rates
from utils.runs import MARKS, REAL, load_run, run_names

SAID = {  # condition: what was done
    "base": "nothing", "ablated": "r erased", "orthogonalized": "r erased from the weights",
    "subtracted": "r subtracted", "added": "r added",
    "equal_shadow": "a random direction, taken away as much of as erasing r takes of r"}


def card(name):
    """The card's text."""
    run = load_run(name)
    weights, scores = run.weights, [getattr(run.scores, score)[run.place].item() for score in SCORES]
    origin = (f", from the file `{weights['file']}` ({weights['quantization']}, SHA-256 `{weights['sha256']}`), "
              "dequantized to float32" if weights["file"] else "")
    return "\n\n".join([
        f"# {name}",
        f"What {weights['id']}{origin} does under the method. `make real` recorded it, `load_run({name!r})` reads it, "
        f"and `python -m utils.reproduce MODEL --compare data/real/{name}` checks it against the weights. A refusal "
        f"begins with {' or '.join(map(repr, run.openings))}. These figures are evidence about this model, with these "
        "weights, and about no other.",
        "## The direction",
        f"Means come from the prompts on which the refusal metric has the right sign: {counts(run.n['train'])}; "
        f"scores from {counts(run.n['val'])}. {scored(run)} The pick is layer {run.direction.layer} of "
        f"{run.n_layers}, position {run.direction.position}, and it {'passes' if run.passes else 'does not pass'} the "
        "paper's filters.",
        markdown_table(["bypass (nats)", "induce (nats)", "kl (nats)", *run.scores.filters()],
                       [[*(f"{score:.3f}" for score in scores), *met(run)]]).data,
        "" if run.passes else run.scores.why_none_passes(),
        "## What is refused",
        "Refusals with Wilson's 95% interval, told by phrases, and by the first token: for how many prompts a refusal "
        "is the likelier beginning. Of a prompt only a hash is kept, of an answer to a harmful request the first four "
        "words.",
        *(f"{set_of(run, side)}:\n\n" + markdown_table(["what was done", "by phrases", "by the first token"],
                                                       rows(run, side)).data for side in run.answers),
        "## What it costs",
        markdown_table(["what was done", "loss on plain paragraphs (nats per token)", "four-choice questions right",
                        "KL, first token (nats)", "KL, first 32 tokens (nats)"], costs(run)).data,
        "The paragraphs and questions are the course's own (`data/costs/`); the questions are no standard benchmark. "
        "KL is that from the unchanged model, along its own answers to harmless requests.",
        *read(run)]).replace("\n\n\n\n", "\n\n") + "\n"


def counts(sides):
    return " and ".join(f"{n} {side}" for side, n in sides.items())


def scored(run):
    n, n_all = int((~run.scores.bypass[1:].isnan()).sum()), (run.n_layers - 1) * len(run.post_instruction)
    return "All candidates were scored." if n >= n_all else \
        f"By the screen, {n} of {n_all} candidates have exact scores."


def met(run):
    """Whether the pick meets each of the filters: "yes" or "no"."""
    return ["yes" if where[run.place] else "no" for where in run.scores.filters().values()]


def set_of(run, side):
    asked = run.prompts[side]
    return f"**{len(asked['hashes'])} {side}** prompts ({asked['set']})"


def rows(run, side):
    """A row for each condition, the random directions in one."""
    listed = []
    for condition in run.answers[side]:
        if condition not in SAID:
            continue
        listed.append([SAID[condition], run.rate(side, condition), run.first_token_rate(side, condition)])
    if side == "harmful":
        by_phrases, by_token = run.random_rates(), run.random_rates("first token")
        listed.append([f"a random direction erased ({len(by_phrases)} by phrases, {len(by_token)} by the first token; "
                       "pooled)", Rate.pooled(by_phrases), Rate.pooled(by_token)])
        lowest = min(by_token, key=lambda rate: rate.value)
        listed.append(["the random direction that leaves least", "", lowest])
    return listed


def costs(run):
    said = {**SAID, "random_1": "a random direction erased"}
    return [[said[condition], f"{cost['paragraphs']:.3f}", cost["choices"],
             *(f"{cost[kl]:.3f}" if kl in cost else "" for kl in ("kl_first", "kl_32"))]
            for condition, cost in run.costs.items()]


def read(run):
    """What the answers are, if they were read."""
    if not run.marks:
        return []
    table = markdown_table(["side, condition", *MARKS], [[condition, *(marks.get(mark, 0) for mark in MARKS)]
                                                         for condition, marks in run.marks["marks"].items()])
    caught, alarms = run.marks["phrases"].values()
    return ["## What the answers are", "Answers of 24 tokens at most, read in mixed order without their condition:",
            table.data,
            f"The list of phrases finds {caught} of the refusals, and takes {alarms} of the other answers for one."]


def picture(runs):
    """What the README shows: harmful requests refused, and harmless ones, in each model."""
    groups = {}
    for run in runs:
        harmful, harmless = run.rates("harmful"), run.rates("harmless")
        groups[f"{run.name}\nharmful"] = {"baseline": harmful["base"], "ablated": harmful["ablated"],
                                          "random": Rate.pooled(run.random_rates())}
        groups[f"{run.name}\nharmless"] = {"baseline": harmless["base"], "added": harmless["added"]}
    axis = plt.subplots(figsize=(3 + 3 * len(runs), 3.6), layout="constrained")[1]
    return plot_rates(groups, "JailbreakBench and Alpaca", axis=axis).figure


def main():
    for name in run_names():
        (REAL / name / "README.md").write_text(card(name), encoding="utf-8")
    picture([load_run(name) for name in run_names()]).savefig(REAL / "result.png", dpi=120)


if __name__ == "__main__":
    main()
