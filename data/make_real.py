"""Record what a model of real weights does under the method: `make real MODEL=... RUN=... OPTIONS=...`.

    python data/make_real.py FOLDER --run qwen2.5-coder-0.5b --prompts FOLDER

--prompts is a folder of JSON lists of strings, the paper's splits: harmful_train, harmless_train, harmful_val,
harmless_val, jailbreakbench (100 harmful ones), harmless_test (Alpaca), harmbench_test (held out: harmful). Without it,
the course's own requests in plain English. Each step is kept in reproduced/RUN: run again, it goes on after the last
one. The record is written to data/real/RUN: no text of a public set, and of an answer to a harmful request its first
four words.
"""
import argparse
import hashlib
import json
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from utils import DATA, fingerprint, write_json
from utils.activations import head_attributions, mean_residual_stream, residual_stream, trace_heads
from utils.candidates import SCORES, listed_scores, score_candidates, score_finalists
from utils.directions import kept_prompts, nearest_miss, random_directions, select_direction
from utils.evaluation import (
    Rate,
    answer_kl,
    answer_losses,
    kl_divergence,
    phrase_judge,
    rates_by_group,
    refusal_metric,
    text_losses,
)
from utils.instructions import SIDES, Instruction, load_requests
from utils.interventions import Ablation, Addition, every_pair, generate, last_logits, orthogonalized
from utils.models import load_model, rewrite
from utils.probes import fit_probe, probe_accuracy, shuffle_balanced
from utils.reproduce import Steps
from utils.runs import REAL, hashed

N_PROMPTS = {"train": 256, "val": 32, "test": 100}  # at most, of each side
N_FINALISTS = 24
N_RANDOM, N_GENERATED, N_TOKENS = 20, 5, 24
DOSES, RANDOM_DOSES = (-1.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (1.0, 2.0)
N_DOSED = 32  # harmless prompts at each dose
FIRST_WORDS = 4


class EqualShadow:
    """Each write to the residual stream gives up as much as erasing r would take from it, along another direction.

    r, other: [d_model]. So the stream is moved as far as by erasing r, at each token and layer, but another way.
    """

    def __init__(self, r, other):
        self.r, self.other = F.normalize(r, dim=-1), F.normalize(other, dim=-1)

    def apply(self, model):
        model.layers[0].input = self.change(model.layers[0].input)
        for layer in model.layers:
            for module in model.writers(layer):
                rewrite(module, self.change)

    def change(self, x):
        return x - (x @ self.r.to(x))[..., None] * self.other.to(x)


def conditions(model, vector, layer):
    """What is done to the model, for each side: {side: {condition: intervention, or None}}."""
    randoms = random_directions(N_RANDOM, like=vector)
    harmful = {"base": None, "ablated": Ablation(vector), "subtracted": Addition(vector, layer, -1.0),
               "equal_shadow": EqualShadow(vector, random_directions(1, like=vector, seed=1)[0])}
    harmful |= {"orthogonalized": None} if model.editable else {}
    harmful |= {f"random_{number}": Ablation(random) for number, random in enumerate(randoms, start=1)}
    return {"harmful": harmful,
            "harmless": {"base": None, "ablated": Ablation(vector), "added": Addition(vector, layer)},
            "held out": {"base": None, "ablated": Ablation(vector)}}


def read_prompts(folder):
    """{split: {side: prompts}} for train, val, test; and where the test prompts come from.

    In the test there is a third side, "held out": harmful prompts of another set, if there is one.
    """
    if folder is None:
        return ({split: {side: load_requests(split, side) for side in SIDES} for split in ("train", "val", "test")},
                dict.fromkeys(SIDES, "requests"))
    names = {split: {side: f"{side}_{split}" for side in SIDES} for split in ("train", "val")} | {
        "test": {"harmful": "jailbreakbench", "harmless": "harmless_test", "held out": "harmbench_test"}}
    return ({split: {side: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
                     for side, name in sides.items()} for split, sides in names.items()},
            {"harmful": "jailbreakbench", "harmless": "alpaca", "held out": "harmbench, test"})


def drawn(prompts, split):
    """Up to N_PROMPTS of a split, of each side."""
    return {side: list(some)[:N_PROMPTS[split]] for side, some in prompts[split].items()}


def direction_of(model, candidates, val, sweep, file):
    """The pick, its vector and scores, and how many validation prompts of each side were kept.

    candidates: [n_layers, n_positions, d_model]. file: where exact scores are kept.
    """
    kept = {side: kept_prompts(model, val[side], side == "harmful", 16)[0] for side in SIDES}
    asked = [kept[side] or val[side] for side in SIDES]
    settings = {"batch_size": 16, "progress": True, "file": file}
    scores = score_candidates(model, candidates, *asked, **settings) if sweep else \
        score_finalists(model, candidates, *asked, N_FINALISTS, **settings)
    layer, index = select_direction(scores) if scores.passing().any() else nearest_miss(scores)
    return {"vector": candidates[layer, index].tolist(), "layer": layer, "position": model.positions[index],
            "passes": bool(scores.passing()[layer, index]), "n_val": {side: len(kept[side]) for side in SIDES},
            "scores": {name: listed_scores(getattr(scores, name)) for name in SCORES}}


def streams_of(model, train, file):
    """Write the mean residual streams of the prompts that are kept -> how many they are, {side: n}.

    {side: [n_layers, 1 + n_positions, d_model]}: at the last token of the instruction, then at the
    post-instruction tokens. The difference of the sides is the candidates.
    """
    positions = [model.positions[0] - 1, *model.positions]
    kept = {side: kept_prompts(model, train[side], side == "harmful", 16)[0] for side in SIDES}
    save_file({side: mean_residual_stream(model, kept[side] or train[side], positions, 16) for side in SIDES}, file)
    return {side: len(prompts) for side, prompts in kept.items()}


def probes_of(model, train, test):
    """Probes at the last token, fitted on train prompts, tell harmful test prompts from harmless ones.

    -> {"real", "shuffled"}: for each layer [right, n]. shuffled: fitted to labels that mean nothing.
    """
    streams = {name: {side: residual_stream(model, split[side], [-1], 16)[:, :, 0] for side in SIDES}
               for name, split in (("train", train), ("test", test))}
    x, labels = {}, {}
    for name, sides in streams.items():
        x[name] = torch.cat([sides[side] for side in SIDES])
        labels[name] = [side == "harmful" for side in SIDES for _ in sides[side]]
    targets = {"real": labels["train"], "shuffled": shuffle_balanced(labels["train"])}
    return {name: [[rate.successes, rate.n] for rate in (
        probe_accuracy(fit_probe(x["train"][:, layer], target), x["test"][:, layer].numpy(), labels["test"])
        for layer in range(model.n_layers))] for name, target in targets.items()}


def dose_of(model, prompts, vector, layer, doses):
    """How many of the prompts are refused, by phrases, at each coefficient: [[coefficient, refused, n]]."""
    asked, rows = every_pair(prompts, torch.tensor(doses)[:, None] * vector)
    refused = map(phrase_judge, generate(model, asked, Addition(rows, layer), N_TOKENS, batch_size=50))
    return [[dose, rate.successes, rate.n] for dose, rate in zip(doses, rates_by_group(refused, len(doses)))]


def heads_of(model, test, vector):
    """What each head writes along r̂ at the last token, on average: {side: [n_layers, n_heads]}; None for a hybrid."""
    try:
        outputs = {side: torch.cat([trace_heads(model, inputs)[0].cpu() for _, inputs in
                                    model.batches(model.tokens(test[side]), 16)]) for side in SIDES}
    except ValueError:
        return None
    matrices = [layer.self_attn.o_proj._module.weight.detach().cpu() for layer in model.layers]
    return {side: [[round(value, 4) for value in row] for row in
                   head_attributions(some, matrices, vector).mean(dim=0).tolist()] for side, some in outputs.items()}


def measured(model, prompts, condition, change, vector, whole, unchanged):
    """Refusal metrics, whole answers if wanted, and KL to the unchanged model's first token, prompt by prompt.

    unchanged: a function that gives the unchanged model's logits for these prompts.
    """
    with orthogonalized(model, vector) if condition == "orthogonalized" else nullcontext():
        logits = last_logits(model, prompts, change, batch_size=16)
        answers = generate(model, prompts, change, N_TOKENS, batch_size=50) if whole else None
    kl = None if condition == "base" else kl_divergence(unchanged(), logits).tolist()
    return {"metric": refusal_metric(logits, model.refusal_tokens).tolist(), "answers": answers, "kl": kl}


def costs_of(model, change, answered):
    """What a change costs, in means: nats per token of plain paragraphs; how many questions with four choices are
    right, and of how many; KL from the unchanged model at the first token of its own answers, and over their first 32.

    answered: harmless Instructions with the unchanged model's answers.
    """
    paragraphs = [line["text"] for line in read_lines("paragraphs")]
    questions = read_lines("questions")
    asked = [Instruction(id="", text=one["question"], answer=choice) for one in questions for choice in one["choices"]]
    losses = torch.tensor([losses.mean() for losses in answer_losses(model, asked, change, 16)]).view(-1, 4)
    right = losses.argmin(dim=1) == torch.tensor([one["answer"] for one in questions])
    costs = {"paragraphs": torch.cat(text_losses(model, paragraphs, change, 8)).double().mean().item(),
             "choices": [int(right.sum()), len(right)]}
    if change is not None and answered:
        kl = answer_kl(model, answered, change, 8)
        costs |= {"kl_first": mean(values[0].item() for values in kl),
                  "kl_32": mean(values[:32].mean().item() for values in kl)}
    return costs


def read_lines(name):
    return [json.loads(line) for line in (DATA / "costs" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def told(side, given):
    """What the record says of one condition: refused by phrases where there are whole answers, else by first token."""
    judge = "phrases" if given["answers"] else "first token"
    refused = [phrase_judge(text) for text in given["answers"]] if given["answers"] else \
        [metric > 0 for metric in given["metric"]]
    rate = Rate.of(refused)
    shown = {} if not given["answers"] else {
        "begins": [text if side == "harmless" else " ".join(text.split()[:FIRST_WORDS]) for text in given["answers"]],
        "verdicts": ["refusal" if one else "answer" for one in refused]}
    return {"refused": rate.successes, "n": rate.n, "interval": list(rate.interval), "judge": judge,
            "metric": [round(value, 3) for value in given["metric"]],
            "kl": given["kl"] and round(sum(given["kl"]) / len(given["kl"]), 4), **shown}


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def record(name, run, weights, folder, sweep):
    """All steps, kept in reproduced/RUN, and the record in data/real/RUN."""
    model = load_model(name)
    prompts, sources = read_prompts(folder)
    steps = Steps(Path("reproduced") / run, progress=True)
    steps.belong_to({"model": name, "sweep": sweep, "prompts": fingerprint(prompts), **model.fingerprint()})
    train, val, test = (drawn(prompts, split) for split in ("train", "val", "test"))
    n_train = steps("streams", streams_of, model, train, steps.folder / "streams.safetensors")
    streams = load_file(steps.folder / "streams.safetensors")
    candidates = (streams["harmful"] - streams["harmless"])[:, 1:]
    found = steps("direction", direction_of, model, candidates, val, sweep, steps.folder / "scores.safetensors")
    vector, layer = torch.tensor(found["vector"]), found["layer"]
    results = {
        "weights": weights, "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "n_layers": model.n_layers, "post_instruction": model.post_instruction,
        "refusal_tokens": model.refusal_tokens, "openings": model.decode([[token] for token in model.refusal_tokens]),
        "pick": {"layer": layer, "position": found["position"], "passes": found["passes"]},
        "n": {"train": n_train, "val": found["n_val"]}, "candidates": found["scores"],
        "probes": steps("probes", probes_of, model, train, test),
        "heads": steps("heads", heads_of, model, test, vector),
        "answers": answers_of(steps, model, test, vector, layer),
        "dose": doses_of(steps, model, test["harmless"][:N_DOSED], vector, layer),
        "costs": all_costs(steps, model, test["harmless"], vector),
        "prompts": {side: {"set": sources[side], "hashes": list(map(hashed, test[side]))} for side in test}}
    out = REAL / run
    out.mkdir(parents=True, exist_ok=True)
    save_file({"direction": vector}, out / "direction.safetensors")
    save_file({side: means.half() for side, means in streams.items()}, out / "streams.safetensors")
    write_json(out / "results.json", results)


def answers_of(steps, model, test, vector, layer):
    """What the record says of each condition: {side: {condition: ...}}, as `told` gives it."""
    answers = {side: {} for side in test}
    for side, changes in conditions(model, vector, layer).items():
        if side not in test:
            continue
        unchanged = cache(partial(last_logits, model, test[side], batch_size=16))  # once, if a step asks for it
        for condition, change in changes.items():
            number = int(condition.removeprefix("random_")) if condition.startswith("random") else 0
            answers[side][condition] = told(side, steps(f"{side}, {condition}", measured, model, test[side], condition,
                                                        change, vector, number <= N_GENERATED, unchanged))
    return answers


def doses_of(steps, model, prompts, vector, layer):
    """As `dose_of`, for r and for a random direction as long: {"r", "random"}."""
    random = random_directions(1, like=vector)[0]
    return {"r": steps("dose, r", dose_of, model, prompts, vector, layer, DOSES),
            "random": steps("dose, random", dose_of, model, prompts, random, layer, RANDOM_DOSES)}


def all_costs(steps, model, prompts, vector):
    """As `costs_of`, for the unchanged model, with r erased, and with a random direction erased."""
    answers = steps.read("harmless, base")["answers"]
    answered = [Instruction(id="", text=getattr(prompt, "text", prompt), answer=answer)
                for prompt, answer in zip(prompts, answers) if answer.strip()]
    changes = {"base": None, "ablated": Ablation(vector), "random_1": Ablation(random_directions(1, like=vector)[0])}
    return {name: steps(f"costs, {name}", costs_of, model, change, answered) for name, change in changes.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, GGUF file, hub id, or smollm2-refuser")
    parser.add_argument("--run", required=True, help="the name of the record")
    parser.add_argument("--prompts", type=Path, help="a folder of JSON lists; by default the course's own requests")
    parser.add_argument("--sweep", action="store_true", help="score every candidate, not the best estimates alone")
    parser.add_argument("--id", default="", help="the publisher's id of the weights")
    parser.add_argument("--file", type=Path, help="the file that the weights come from, for its SHA-256")
    parser.add_argument("--quantization", default="none")
    args = parser.parse_args()
    weights = {"id": args.id or args.model, "file": args.file.name if args.file else "",
               "quantization": args.quantization, "sha256": sha256(args.file) if args.file else ""}
    record(args.model, args.run, weights, args.prompts, args.sweep)


if __name__ == "__main__":
    main()
