"""How long the course's work takes, as ratios within one run: `make bench` writes them to tests/BENCHMARK.md.

    python tests/benchmark.py                                       the organism alone, a few minutes
    python tests/benchmark.py --model FOLDER --prompts FOLDER       a real model too; prompts: harmful_train.json,
                                                                    harmless_train.json, harmful_val.json,
                                                                    harmless_val.json, each a list of strings
    python tests/benchmark.py ... --sweep FILE                      and the sweep of all its candidates, for hours: each
                                                                    score is kept in FILE, where the next run goes on

The paper's procedure is timed as its authors run it: plain PyTorch hooks, batches of 32, three forward passes for each
candidate, logits at all positions.
"""
import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from utils.activations import mean_residual_stream
from utils.candidates import (
    AT_A_TIME,
    N_ESTIMATE,
    N_HEAT,
    CandidateScores,
    Scorer,
    first_order,
    score_finalists,
    screen,
    spread,
)
from utils.directions import find_direction, kept_prompts, lowest_bypass, mean_of_kept, select_direction
from utils.evaluation import kl_divergence, refusal_metric
from utils.instructions import SIDES, load_instructions
from utils.interventions import Ablation, generate
from utils.models import load_model

FINALISTS = 12
SAMPLE = 4  # of a real model's candidates: each costs the same three passes


def seconds(work, *args, **options):
    """How long one call takes, and what it gives."""
    start = time.perf_counter()
    outcome = work(*args, **options)
    return time.perf_counter() - start, outcome


# The paper's procedure, in plain hooks.

@contextmanager
def hooks(module, before=(), after=()):
    """Change what enters or leaves modules: lists of (module, function of a tensor)."""
    def enters(change):
        return lambda module, args: (change(args[0]), *args[1:])

    def leaves(change):
        return lambda module, args, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    with ExitStack() as stack:
        for part, change in before:
            stack.callback(part.register_forward_pre_hook(enters(change)).remove)
        for part, change in after:
            stack.callback(part.register_forward_hook(leaves(change)).remove)
        yield


def ablated(module, direction):
    unit = direction / direction.norm()

    def erase(x):
        return x - (x @ unit)[..., None] * unit

    layers = module.model.layers
    writers = [part for layer in layers for part in (layer.self_attn, layer.mlp)]
    return hooks(module, [(layer, erase) for layer in layers], [(part, erase) for part in writers])


def added(module, layer, direction):
    return hooks(module, [(module.model.layers[layer], lambda x: x + direction)])


def plain_logits(model, prompts):
    """Logits of all positions, as the authors' code computes them; those of the last are kept."""
    chunks = [prompts[start:start + 32] for start in range(0, len(prompts), 32)]
    return torch.cat([model.lm._module(**model.encode(chunk)).logits[:, -1].float() for chunk in chunks])


def plain_metric(model, prompts):
    return refusal_metric(plain_logits(model, prompts), model.refusal_tokens)


def plain_means(model, prompts):
    """The mean stream at the post-instruction tokens -> [n_layers, n_positions, d_model]."""
    totals = torch.zeros(model.n_layers, len(model.positions), model.d_model, dtype=torch.float64)

    def keep(layer):
        def hook(module, args):
            totals[layer] += args[0][:, model.positions].double().sum(dim=0)
        return hook

    with ExitStack() as stack:
        for layer, module in enumerate(model.lm._module.model.layers):
            stack.callback(module.register_forward_pre_hook(keep(layer)).remove)
        plain_logits(model, prompts)
    return (totals / len(prompts)).float()


def plain_scores(model, candidates, places, harmful, harmless):
    """bypass, induce, kl of the candidates at these places, one after the other."""
    module, unchanged, scores = model.lm._module, plain_logits(model, harmless), []
    for layer, index in tqdm(places, desc="the paper's procedure", leave=False):
        direction = candidates[layer, index]
        with ablated(module, direction):
            bypass = plain_metric(model, harmful).mean()
        with added(module, layer, direction):
            induce = plain_metric(model, harmless).mean()
        with ablated(module, direction):
            kl = kl_divergence(unchanged, plain_logits(model, harmless)).mean()
        scores.append((bypass.item(), induce.item(), kl.item()))
    return scores


def plain_search(model, train, val, sample=None):
    """(seconds of the whole search, candidates, places, scores of these); `sample` places stand for all of them."""
    def prepare():
        kept = {}
        for side in SIDES:
            for name, prompts in (("train", train[side]), ("val", val[side])):
                metric = plain_metric(model, prompts)
                kept[name, side] = [p for p, value in zip(prompts, metric) if (value > 0) == (side == "harmful")]
        means = [plain_means(model, kept["train", side]) for side in SIDES]
        return means[0] - means[1], kept

    before, (candidates, kept) = seconds(prepare)
    every = [(layer, index) for layer in range(1, model.n_layers) for index in range(len(model.positions))]
    places = every if sample is None else random.Random(0).sample(every, sample)
    scoring, scores = seconds(plain_scores, model, candidates, places, *(kept["val", side] for side in SIDES))
    return before + scoring * len(every) / len(places), candidates, places, scores


# What is measured

def selection(name, model, train, val, sample):
    """Rows: how long the search takes, and that both searches score alike."""
    ours, (direction, _) = seconds(find_direction, model, train, val, screen=FINALISTS, strict=False)
    theirs, candidates, places, scores = plain_search(model, train, val, sample)
    at = direction.layer, model.positions.index(direction.position)
    gap = (candidates[at] - direction.vector).abs().max() / direction.vector.norm()
    rows = [(f"{name}: search, the paper's procedure / course (screen={FINALISTS})", f"{theirs / ours:.1f}",
             f"{theirs:.0f} s / {ours:.0f} s" + ("" if sample is None else
              f"; of the procedure's {(model.n_layers - 1) * len(model.positions)} candidates {sample} were timed")),
            (f"{name}: the two mean differences at the pick, largest difference / length", f"{gap:.0e}", "")]
    if sample is None:
        sweep, _ = seconds(find_direction, model, train, val, screen=None, strict=False)
        rows.append((f"{name}: search, the paper's procedure / course, every candidate (screen=None)",
                     f"{theirs / sweep:.1f}", f"{theirs:.0f} s / {sweep:.0f} s"))
    return rows


def overheads(name, model, prompts, n_tokens=16, repeats=3):
    """Rows: traces against plain forward passes, ablated generation against raw hooks and none."""
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    inputs = model.encode(prompts)

    def forward():
        model.lm._module(**inputs, use_cache=False, logits_to_keep=1)

    def plainly():
        model.lm._module.generate(**inputs, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False)

    def with_hooks():
        with ablated(model.lm._module, direction):
            plainly()

    work = {"forward": forward, "capture": lambda: mean_residual_stream(model, prompts, batch_size=len(prompts)),
            "plain": plainly, "hooks": with_hooks,
            "course": lambda: generate(model, prompts, Ablation(direction), n_tokens, batch_size=len(prompts))}
    took = {what: statistics.median(seconds(run)[0] for _ in range(repeats)) for what, run in work.items()}
    ratios = {"streams of all layers / a bare forward pass": took["capture"] / took["forward"],
              "ablated generation, course / raw hooks": took["course"] / took["hooks"],
              "ablated generation, course / no ablation": took["course"] / took["plain"]}
    note = f"{len(prompts)} prompts, {n_tokens} new tokens"
    return [(f"{name}: {what}", f"{ratio:.2f}", note) for what, ratio in ratios.items()]


def growth(name, model, train, val):
    """Rows: how the search grows with validation prompts and with finalists."""
    def search(n_val, n_finalists):
        few = {side: val[side][:n_val] for side in SIDES}
        return seconds(find_direction, model, train, few, screen=n_finalists, strict=False)[0]

    base = search(16, 6)
    return [(f"{name}: search, 32 + 32 validation prompts / 16 + 16 (screen=6)", f"{search(32, 6) / base:.2f}", ""),
            (f"{name}: search, screen=24 / screen=6 (16 + 16 prompts)", f"{search(16, 24) / base:.2f}", "")]


def memory(name, source):
    """Row: peak memory of a process that loads a model and finds its direction, of its float32 weights."""
    code = ("import resource, sys\nfrom utils.instructions import SIDES, load_instructions\n"
            "from utils.models import load_model\nfrom utils.directions import find_direction\n"
            f"model = load_model({str(source)!r})\n"
            "sets = [{side: load_instructions(split, side, 16) for side in SIDES} for split in ('train', 'val')]\n"
            "find_direction(model, *sets, strict=False)\n"
            "size = sum(4 * weight.numel() for weight in model.lm._module.parameters()) / 1e6\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, size, file=sys.stderr)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak, size = map(float, run.stderr.strip().splitlines()[-1].split())
    return [(f"{name}: peak memory of a whole search, MB", f"{peak:.0f}", f"the weights are {size:.0f} in float32")]


# Does the screen pick what the sweep picks?

def pick(scores):
    return select_direction(scores) if scores.passing().any() else lowest_bypass(scores)


def screened(scores, estimates, of_heat, real):
    """What the search picks that scores few candidates, from exact scores of all. of_heat: bypass on few prompts."""
    finalists = sorted(screen(estimates, real, FINALISTS), key=lambda place: of_heat[place].item())
    for end in range(AT_A_TIME, len(finalists) + AT_A_TIME, AT_A_TIME):
        unscored = torch.ones_like(real)
        for place in finalists[:end]:
            unscored[place] = False
        some = CandidateScores(*(score.masked_fill(unscored, torch.nan)
                                 for score in (scores.bypass, scores.induce, scores.kl)))
        if some.passing().any():
            break
    return pick(some)


def given_away(scores, ours):
    """(is our pick the sweep's?, nats of bypass that it gives away), from exact scores of all candidates."""
    swept = pick(scores)
    return swept == ours, (scores.bypass[ours] - scores.bypass[swept]).item()


def told(outcomes):
    """How often the pick is the same, and how large the loss is otherwise."""
    same, losses = zip(*outcomes)
    small = sum(loss <= 0.1 for loss in losses)
    return (f"{sum(same)} of {len(same)}",
            f"bypass given away ≤ .1 nat in {small} of {len(losses)}, at most {max(losses):.2f} nats")


def draws(model, n=20):
    """The organism: training and validation prompts drawn anew, every candidate scored."""
    outcomes = []
    for seed in tqdm(range(n), desc="draws"):
        train, val = ({side: load_instructions(split, side, size, seed) for side in SIDES}
                      for split, size in (("train", 64), ("test", 24)))
        means = [mean_of_kept(model, train[side], side == "harmful")[0] for side in SIDES]
        kept = [kept_prompts(model, val[side], side == "harmful")[0] for side in SIDES]
        scorer = Scorer(model, means[0] - means[1], *kept)
        sweep(scorer)
        scores = score_finalists(model, scorer.candidates, *kept, FINALISTS)
        outcomes.append(given_away(scorer.scores, pick(scores)))
    return outcomes


def sweep(scorer, progress=False):
    """Measure all scores of the candidates that the rule allows."""
    early = torch.arange(scorer.model.n_layers) < 0.8 * scorer.model.n_layers
    for layer, index in tqdm((scorer.real & early[:, None]).nonzero().tolist(), desc="sweep", disable=not progress):
        for name in scorer.values:
            scorer.measure(name, layer, index)


def resampled(scorer, harmful, harmless, n=100):
    """Validation prompts drawn with replacement, from the exact scores and estimates of each prompt."""
    estimates = [first_order(scorer.model, scorer.candidates, [one], [other])
                 for one, other in zip(*padded(harmful, harmless))]
    bypass, induce = (torch.stack([getattr(one, score) for one in estimates]) for score in ("bypass", "induce"))
    generator, outcomes = torch.Generator().manual_seed(0), []
    for _ in range(n):
        rows = {side: torch.randint(len(prompts), (len(prompts),), generator=generator)
                for side, prompts in (("harmful", harmful), ("harmless", harmless))}
        side = {"bypass": "harmful", "induce": "harmless", "kl": "harmless"}
        scores = CandidateScores(*(scorer.values[name][..., rows[side[name]]].mean(dim=-1) for name in side))
        few = {side: spread(drawn.tolist(), N_ESTIMATE) for side, drawn in rows.items()}
        guess = CandidateScores(bypass[few["harmful"]].mean(dim=0), induce[few["harmless"]].mean(dim=0),
                                torch.full_like(bypass[0], torch.nan))
        of_heat = scorer.values["bypass"][..., spread(rows["harmful"].tolist(), N_HEAT)].mean(dim=-1)
        outcomes.append(given_away(scores, screened(scores, guess, of_heat, scorer.real)))
    return outcomes


def padded(one, other):
    """Two lists, the shorter one filled up with its last entry."""
    n = max(len(one), len(other))
    return [prompts + prompts[-1:] * (n - len(prompts)) for prompts in (one, other)]


def own_prompts():
    return [{side: load_instructions(split, side) for side in SIDES} for split in ("train", "val")]


def prompts_of(folder, n_train=128, n_val=32):
    """Training, validation and all remaining prompts from a folder of JSON lists, drawn with a fixed seed."""
    train, val, rest = {}, {}, {}
    for side in SIDES:
        for split, n, drawn in (("train", n_train, train), ("val", n_val, val)):
            prompts = json.loads((Path(folder) / f"{side}_{split}.json").read_text(encoding="utf-8"))
            random.Random(0).shuffle(prompts)
            drawn[side] = prompts[:n]
            rest[side] = rest.get(side, []) + prompts[n:]
    return train, val, rest


def table(rows):
    lines = [f"| {what} | {ratio} | {note} |" for what, ratio, note in rows]
    return "\n".join(["| what | figure | |", "|---|---|---|", *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a real model: folder, GGUF file or hub id")
    parser.add_argument("--prompts", help="a folder with its prompts; by default the course's own")
    parser.add_argument("--sweep", help="a file for the exact scores of all its candidates")
    parser.add_argument("--out", default=Path(__file__).with_name("BENCHMARK.md"), type=Path)
    args = parser.parse_args()
    organism, (train, val) = load_model("organism"), own_prompts()
    find_direction(organism, train, {side: val[side][:4] for side in SIDES})  # the first passes of all are slow
    rows = selection("organism", organism, train, val, None) + overheads("organism", organism, val["harmful"])
    rows += growth("organism", organism, train, val) + memory("organism", "organism")
    rows.append(("organism: the screen picks what the sweep picks, draws of prompts", *told(draws(organism))))
    if args.model:
        rows += of_real_model(args)
    head = (f"# Benchmark\n\nBy `make bench`: ratios within one run, because times differ from machine to machine.\n"
            f"This run: torch {torch.__version__}, {torch.get_num_threads()} threads.\n\n")
    args.out.write_text(f"{head}{table(rows)}\n", encoding="utf-8")
    print(table(rows))


def of_real_model(args):
    model = load_model(args.model)
    name = Path(args.model).name
    train, val, rest = prompts_of(args.prompts) if args.prompts else (*own_prompts(), dict.fromkeys(SIDES, []))
    rows = selection(name, model, train, val, SAMPLE) + overheads(name, model, val["harmful"][:8])
    if args.sweep:
        scorer, kept = begun_sweep(model, train, val, rest, args.sweep)
        sweep(scorer, progress=True)
        drawn = " + ".join(str(len(prompts)) for prompts in kept)
        rows.append((f"{name}: the screen picks what the sweep picks, {drawn} validation prompts resampled",
                     *told(resampled(scorer, *kept))))
    return rows


def begun_sweep(model, train, val, rest, file, n=20):
    """The Scorer of all candidates, on up to n prompts of each side that the model takes as they are meant, and these.

    A small model refuses few of 32: the pool is all that is not used for the means.
    """
    means = [mean_of_kept(model, train[side], side == "harmful")[0] for side in SIDES]
    pool = {side: (val[side] + rest[side])[:160] for side in SIDES}
    kept = [kept_prompts(model, pool[side], side == "harmful")[0][:n] for side in SIDES]
    return Scorer(model, means[0] - means[1], *kept, file=file), kept


if __name__ == "__main__":
    main()
