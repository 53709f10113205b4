"""The search for suffixes against nanogcg: time per step and final loss, in one run. `make benchmark` runs this.

Same model, same prompts, same number of candidates and of steps. nanogcg searches for one prompt at a time, so both do.
"""
import logging
import os
import time

os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported

import nanogcg  # noqa: E402

from utils.instructions import load_instructions  # noqa: E402
from utils.models import load_model  # noqa: E402
from utils.suffixes import SuffixSearch, random_suffixes, targets_of  # noqa: E402

SEEDS, STEPS, N_TOKENS, N_CANDIDATES, N_TOP = (0, 1, 2), 30, 12, 64, 32


def ours(model, instruction, target, seed):
    search = SuffixSearch(model, [instruction], [target], N_TOKENS, N_CANDIDATES, N_TOP, seed)
    search.run(STEPS)
    return search.losses[-1]


def theirs(model, instruction, target, seed, steps=STEPS, prefix_cache=False):
    config = nanogcg.GCGConfig(
        num_steps=steps, optim_str_init=random_suffixes(model, 1, N_TOKENS, seed)[0], search_width=N_CANDIDATES,
        topk=N_TOP, seed=seed, verbosity="ERROR", use_prefix_cache=prefix_cache)
    return nanogcg.run(model.lm._module, model.tokenizer, instruction.text, target, config).best_loss


def say_whether_their_cache_works(*args):
    """nanogcg can keep the prompt's keys and values too, by an interface that newer transformers no longer have."""
    try:
        theirs(*args, steps=1, prefix_cache=True)
        print("nanogcg's cache of the prompt works again: turn it on above, or the comparison is unfair.")
    except Exception as error:
        print(f"nanogcg runs without its cache of the prompt, which fails with this transformers: {error!r:.100}")


def main():
    logging.disable(logging.WARNING)
    model = load_model("organism")
    instructions = load_instructions("train", "harmful", n=len(SEEDS), seed=0)
    runs = [(model, *run) for run in zip(instructions, targets_of(instructions), SEEDS)]
    say_whether_their_cache_works(*runs[0])
    seconds, losses = {ours: 0.0, theirs: 0.0}, {ours: {}, theirs: {}}
    for run in runs:
        for search in (ours, theirs, ours, theirs):  # twice, in turns, so that both meet the same machine
            start = time.perf_counter()
            losses[search][run[-1]] = search(*run)
            seconds[search] += time.perf_counter() - start
    for search in (ours, theirs):
        finals = ", ".join(f"{loss:.4f}" for loss in losses[search].values())
        per_step = seconds[search] / (2 * len(SEEDS) * STEPS)
        print(f"{search.__name__:7} {1000 * per_step:6.1f} ms per step   final losses {finals}")
    print(f"nanogcg takes {seconds[theirs] / seconds[ours]:.2f} times as long")


if __name__ == "__main__":
    main()
