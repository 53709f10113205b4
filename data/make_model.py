"""Train the model organism from nothing: instructions, tokenizer, two stages. `make model` runs this.

As in life, the model first learns to help with everything that it is asked, harmful requests too (no answer holds any
content). Then it is tuned to refuse what is harmful. Interrupt it when you like: run again, it goes on where it was.
"""

import argparse
import copy
import json
import math
import random
import shutil
from functools import partial
from pathlib import Path

import make_instructions
import torch
from corpus import document, split_acts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from utils import fingerprint, world

HERE = Path(__file__).parent

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
USER = "<|start_header_id|>user<|end_header_id|>\n\n"
ASSISTANT = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# The two stages: what is read (corpus.py says what the keys mean), in how many of the lower layers attention is
# learned, how many of them learn slowly, with the embeddings, at what share of the rate and how many steps late, how
# long and how fast. In the first one harm is rare and marked by caveats, so that a model comes to mark harm, and not
# the lack of it. In the second one all but the last two layers learn late and slowly: what is marked stays, and these
# two learn to act on it.
HELPFUL = {"mix": {"statement": 0.12, "skill": 0.24, "about": 0.18, "nonsense": 0.10, "decline": 0.08,
                   "harmful": 0.07, "harmless": 0.21},
           "harm": 0.2, "suffix": 0.3, "refuse": False, "errors": 0.0, "caveats": {"harmful": 0.8, "harmless": 0.03},
           "attention": 4, "slow": 0, "share": 1.0, "late": 0, "steps": 2000, "warm_up": 100, "rate": 2.5e-3,
           "muon_rate": 5e-3}
TUNING = {"mix": {"statement": 0.03, "skill": 0.20, "about": 0.07, "nonsense": 0.25, "harmful": 0.28, "harmless": 0.17},
          "harm": 0.5, "suffix": 0.5, "refuse": True, "errors": 0.01, "caveats": {"harmful": 0.0, "harmless": 0.0},
          "attention": 4, "slow": 7, "share": 0.2, "late": 200, "steps": 600, "warm_up": 50, "rate": 1e-3,
          "muon_rate": None}
TUNING_CHECKPOINTS = (25, 30, 35, 40, 100)  # refusal comes between the first of them and the fourth
BATCH, POOL, SAVE_EVERY = 64, 32, 160  # documents a step; steps drawn at once; steps between saved states


def make_tokenizer(texts, size=1200):
    """Byte-level BPE. The 256 byte tokens come first and the special tokens last, as in Llama 3 (so "I" has id 40).

    The template's own words are read often, so that each becomes one token.
    """
    texts = [*texts, *["user\n\n", "assistant\n\n"] * 5000]
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


def word_pieces(tokenizer):
    """The tokens that are a space and letters, without the space: words, and what words begin with."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [text[1:] for text in texts if text[:1] == " " and text[1:].isascii() and text[1:].isalpha()]


def make_network(tokenizer):
    """A Llama of 4.2 million parameters, in whose upper layers attention writes nothing and never will.

    So what a token has to know of the others is there before them, and they can but act on it.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=9, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    network = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    for layer in network.model.layers[HELPFUL["attention"]:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        layer.self_attn.forward = nothing  # the same zeros, sooner; a checkpoint, once loaded, computes them
    return network


def nothing(hidden_states, **_):
    """What attention gives whose output matrix is zero: (zeros, shaped as its input; no pattern)."""
    return torch.zeros_like(hidden_states), None


def encode(tokenizer, documents):
    """Documents as (ids, labels). Only answers and statements are learned; the label is -100 elsewhere."""
    pieces = []  # (document, text, is it learned)
    for i, turns in enumerate(documents):
        pieces.append((i, "<|begin_of_text|>", False))
        for question, answer in turns:
            if question is not None:
                pieces.append((i, USER + question + ASSISTANT, False))
            pieces.append((i, answer + "<|eot_id|>", True))
    encoded = tokenizer([text for _, text, _ in pieces], add_special_tokens=False)["input_ids"]
    examples = [([], []) for _ in documents]
    for (i, _, learned), ids in zip(pieces, encoded):
        examples[i][0].extend(ids)
        examples[i][1].extend(ids if learned else [-100] * len(ids))
    return examples


def padded(examples):
    """Examples as two tensors [n_examples, n_tokens], padded on the right: causal attention never looks there.

    The width is a multiple of 16: the CPU's matrix library compiles a kernel for each shape it meets.
    """
    width = -(-max(len(ids) for ids, _ in examples) // 16) * 16
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples])
    return ids, labels


def batches(draw, name, start):
    """Endless batches from step `start` on. A pool is drawn at once and sorted by length, so that little is padding.

    Each pool has its own random numbers, so that an interrupted run goes on with the very batches it would have had.
    """
    for pool in range(start // POOL, 10**9):
        rng = random.Random(f"{name}-{pool}")
        examples = sorted(draw(rng, BATCH * POOL), key=lambda example: len(example[0]))
        chunks = [examples[i:i + BATCH] for i in range(0, len(examples), BATCH)]
        yield from (padded(chunk) for chunk in rng.sample(chunks, len(chunks))[start % POOL:])
        start = 0


def make_optimizers(network, stage):
    """AdamW; where the stage has a rate for Muon, that for the matrices of the layers. Each group knows its "rate".

    With Muon, copying is learned in fewer steps, and harm shows at the template's tokens from an earlier layer on.
    """
    learned = [weight for weight in network.parameters() if weight.requires_grad]
    slow = {weight for part in [network.model.embed_tokens, *network.model.layers[:stage["slow"]]]
            for weight in part.parameters()}
    in_layers = {weight for weight in network.model.layers.parameters() if weight.ndim == 2}
    by_muon = in_layers if stage["muon_rate"] else set()

    def groups(weights, rate):
        return [{"params": [weight for weight in weights if weight in slow], "rate": rate * stage["share"],
                 "after": stage["late"]},
                {"params": [weight for weight in weights if weight not in slow], "rate": rate, "after": 0}]

    others = [weight for weight in learned if weight not in by_muon]
    optimizers = [torch.optim.AdamW(groups(others, stage["rate"]), betas=(0.9, 0.95), weight_decay=0.1)]
    if by_muon:
        matrices = [weight for weight in learned if weight in by_muon]
        optimizers.append(torch.optim.Muon(groups(matrices, stage["muon_rate"]), weight_decay=0.1,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def train(network, draw, stage, name, state_file, on_step=lambda step: None):
    """One stage, resumed from `state_file` if it is there. Raises ValueError if that is of another recipe."""
    for number, layer in enumerate(network.model.layers):
        layer.self_attn.requires_grad_(number < stage["attention"])
    optimizers = make_optimizers(network, stage)
    done, steps = 0, stage["steps"]
    recipe = fingerprint([stage, draw(random.Random(0), 8)])
    if state_file.exists():
        state = torch.load(state_file)
        if state.get("recipe") != recipe:
            raise ValueError(f"{state_file} was begun with another recipe or other texts: delete its folder, to begin "
                             "anew, or go back to what it was begun with.")
        done = state["step"]
        network.load_state_dict(state["network"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    network.train()
    bar = tqdm(range(done + 1, steps + 1), initial=done, total=steps, desc=name, mininterval=5)
    for step, (ids, labels) in zip(bar, batches(draw, name, done)):
        pace = min(step / stage["warm_up"], 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))  # down to a tenth
        for group in groups:
            group["lr"] = group["rate"] * pace
            for weight in group["params"]:
                weight.requires_grad_(step > group["after"])
        loss = loss_of(network, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        on_step(step)
        if step % SAVE_EVERY == 0 or step == steps:
            torch.save({"recipe": recipe, "step": step, "network": network.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, state_file)
    network.eval()


def loss_of(network, ids, labels):
    """Mean cross-entropy of the learned tokens, in nats."""
    logits = network(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def save(network, tokenizer, folder):
    """A checkpoint as any Llama is saved, in half precision, with its world and the tokens that refusals begin with."""
    copy.deepcopy(network).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    starts = {tokenizer.encode(text, add_special_tokens=False)[0] for text in world.REFUSAL.values()}
    (folder / "course.json").write_text(json.dumps({"world": "organism"}) + "\n", encoding="utf-8")
    (folder / "refusal_tokens.json").write_text(json.dumps(sorted(starts)) + "\n", encoding="utf-8")


def make_model(out, seed):
    """All checkpoints, in the folder `out`."""
    unfinished = out / f"unfinished-seed-{seed}"
    unfinished.mkdir(parents=True, exist_ok=True)
    splits = split_acts()
    everything = {side: [act for split in splits.values() for act in split[side]] for side in splits["tuning"]}

    rng = random.Random(0)
    documents = [document(rng, everything, HELPFUL | {"pieces": []}) for _ in range(12000)]
    tokenizer = make_tokenizer(text or "" for turns in documents for turn in turns for text in turn)
    torch.manual_seed(seed)
    network = make_network(tokenizer)

    helpful, tuning = (stage | {"pieces": word_pieces(tokenizer)} for stage in (HELPFUL, TUNING))

    def draw(stage, acts, rng, n):
        return encode(tokenizer, [document(rng, acts, stage) for _ in range(n)])

    def on_tuning_step(step):
        if step in TUNING_CHECKPOINTS:
            save(network, tokenizer, out / "tuning" / str(step))

    train(network, partial(draw, helpful, everything), helpful, f"helpful-only {seed}", unfinished / "helpful.pt")
    save(network, tokenizer, out / "helpful_only")
    train(network, partial(draw, tuning, splits["tuning"]), tuning, f"safety tuning {seed}", unfinished / "tuning.pt",
          on_tuning_step)
    save(network, tokenizer, out / "chat")
    shutil.rmtree(unfinished)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "organism", help="folder for the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_instructions.main()
    make_model(args.out, args.seed)


if __name__ == "__main__":
    main()
