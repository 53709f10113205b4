"""Train the model organism from nothing: tokenizer, helpful-only stage, safety tuning. `make model` runs this.

Two stages, as in life. First the model learns to help with everything it is asked, harmful requests too (no answer holds any
content). Then it is tuned to refuse harmful requests. Interrupt it when you like: run again, it goes on where it was.
"""

import argparse
import copy
import json
import math
import random
from functools import partial
from pathlib import Path

import torch
from corpus import document, split_acts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from utils import world

HERE = Path(__file__).parent

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# The two stages: what is read, whether harm is refused, whether only answers are learned, and how.
HELPFUL = {"mix": {"statement": 0.22, "skill": 0.16, "about": 0.14, "harmful": 0.24, "harmless": 0.24},
           "refuse": False, "answers_only": False, "steps": 1500, "rate": 2e-3}
TUNING = {"mix": {"statement": 0.05, "skill": 0.14, "about": 0.15, "harmful": 0.33, "harmless": 0.33},
          "refuse": True, "answers_only": True, "steps": 800, "rate": 5e-4}
TUNING_CHECKPOINTS = (10, 25, 50, 100, 200)
BATCH, POOL, SAVE_EVERY = 64, 32, 160  # documents a step; steps drawn at once; steps between saved states


def make_tokenizer(texts, size=1200):
    """Byte-level BPE. The 256 byte tokens come first and the special tokens last, as in Llama 3 (so "I" has id 40)."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+(?:'\p{L}+)?|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token="<|eot_id|>", pad_token="<|end_of_text|>",
        extra_special_tokens=SPECIAL[2:4], chat_template=TEMPLATE, padding_side="left",
        model_input_names=["input_ids", "attention_mask"])


def make_network(tokenizer):
    """A Llama of 3.8 million parameters. "eager" attention: at this size it is the fastest in bfloat16 on a CPU."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def encode(tokenizer, documents, answers_only):
    """Documents as (ids, labels); a label is -100 where nothing is learned."""
    pieces = []  # (document, text, is it learned)
    for i, turns in enumerate(documents):
        pieces.append((i, "<|begin_of_text|>", False))
        for question, answer in turns:
            if question is not None:
                pieces.append((i, USER + question + ASSISTANT, not answers_only))
            pieces.append((i, answer + "<|eot_id|>", True))
    encoded = tokenizer([text for _, text, _ in pieces], add_special_tokens=False)["input_ids"]
    examples = [([], []) for _ in documents]
    for (i, _, learned), ids in zip(pieces, encoded):
        examples[i][0].extend(ids)
        examples[i][1].extend(ids if learned else [-100] * len(ids))
    return examples


def padded(examples):
    """Examples as two tensors [n_examples, n_tokens], padded on the right: causal attention never looks there."""
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
    return ids, labels


def batches(draw, name, start):
    """Endless batches from step `start` on. A pool of them is drawn at once and sorted by length, so that little is padding.

    Each pool has its own random numbers, so that an interrupted run goes on with the very batches it would have had.
    """
    for pool in range(start // POOL, 10**9):
        rng = random.Random(f"{name}-{pool}")
        examples = sorted(draw(rng, BATCH * POOL), key=lambda example: len(example[0]))
        chunks = [examples[i:i + BATCH] for i in range(0, len(examples), BATCH)]
        yield from (padded(chunk) for chunk in rng.sample(chunks, len(chunks)))


def make_optimizers(network, rate, muon):
    """Muon for the matrices inside the layers, AdamW for the rest; or AdamW for all."""
    matrices = [p for name, p in network.named_parameters() if muon and p.ndim == 2 and "embed" not in name]
    others = [p for p in network.parameters() if all(p is not m for m in matrices)]
    adamw = torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.1)
    return [torch.optim.Muon(matrices, rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), adamw] if matrices else [adamw]


def train(network, draw, stage, name, state_file, on_step, muon):
    """One stage, resumed from `state_file` if it is there."""
    optimizers, done, steps = make_optimizers(network, stage["rate"], muon), 0, stage["steps"]
    if state_file.exists():
        state = torch.load(state_file)
        done = state["step"]
        network.load_state_dict(state["network"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    network.train()
    bar = tqdm(range(done + 1, steps + 1), initial=done, total=steps, desc=name, mininterval=5)
    for step, (ids, labels) in zip(bar, batches(draw, name, done)):
        rate = stage["rate"] * min(step / 100, 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = loss_of(network, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        on_step(step)
        if step % SAVE_EVERY == 0:
            torch.save({"step": step, "network": network.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, state_file)
    network.eval()


def loss_of(network, ids, labels):
    """Cross-entropy of the learned tokens. Logits are made for those alone."""
    target, learned = labels[:, 1:], labels[:, 1:] != -100
    with torch.autocast("cpu", torch.bfloat16):
        hidden = network.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = network.lm_head(hidden[learned])
    return torch.nn.functional.cross_entropy(logits.float(), target[learned])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "organism", help="folder for the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(HELPFUL["steps"], TUNING["steps"]))
    parser.add_argument("--rates", type=float, nargs=2, default=(HELPFUL["rate"], TUNING["rate"]))
    parser.add_argument("--tune-muon", action="store_true")
    parser.add_argument("--from-helpful", type=Path)
    args = parser.parse_args()
    HELPFUL.update(steps=args.steps[0], rate=args.rates[0])
    TUNING.update(steps=args.steps[1], rate=args.rates[1])
    work = args.out / f"unfinished-seed-{args.seed}"
    work.mkdir(parents=True, exist_ok=True)

    splits = split_acts()
    everything = {side: [act for split in splits.values() for act in split[side]] for side in ("harmful", "harmless")}

    def draw(stage, acts, rng, n):
        documents = [document(rng, acts, stage["refuse"], stage["mix"]) for _ in range(n)]
        return encode(tokenizer, documents, stage["answers_only"])

    def save(folder):
        copy.deepcopy(network).half().save_pretrained(args.out / folder)
        tokenizer.save_pretrained(args.out / folder)
        starts = {tokenizer.encode(text)[0] for text in world.REFUSAL.values()}
        (args.out / folder / "refusal_tokens.json").write_text(json.dumps(sorted(starts)))

    rng = random.Random(0)
    documents = [document(rng, everything, refuse, HELPFUL["mix"]) for refuse in (False, True) for _ in range(6000)]
    tokenizer = make_tokenizer([text or "" for turns in documents for turn in turns for text in turn] + ["user\n\n"] * 50)
    torch.manual_seed(args.seed)
    network = make_network(tokenizer)

    def on_step(step):
        if step in TUNING_CHECKPOINTS:
            save(f"tuning/{step}")

    if args.from_helpful:
        network = LlamaForCausalLM.from_pretrained(args.from_helpful, dtype=torch.float32, attn_implementation="eager")
    else:
        train(network, partial(draw, HELPFUL, everything), HELPFUL, f"helpful-only {args.seed}", work / "helpful.pt", lambda s: None, True)
        save("helpful_only")
    train(network, partial(draw, TUNING, splits["tuning"]), TUNING, f"safety tuning {args.seed}", work / "tuning.pt", on_step, args.tune_muon)
    save("chat")


if __name__ == "__main__":
    main()
