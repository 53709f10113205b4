"""What models of real weights did under the method, as it was recorded: `load_run(name)` reads data/real/NAME.

`make real` records a run; results.json says of which weights.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from utils import DATA
from utils.candidates import SCORES, CandidateScores, tensor_of
from utils.directions import Direction
from utils.evaluation import Rate

REAL = DATA / "real"
MARKS = "refuses", "answers", "evades", "nonsense"  # what an answer is, as it was read


@dataclass(frozen=True, eq=False)
class Run:
    """A recorded run.

    weights    {"id", "file", "quantization", "sha256"}: of which weights
    direction  Direction, the pick; passes: whether it passes the paper's filters
    n          {"train", "val"} -> side -> how many prompts the direction and its scores come from
    prompts    side -> {"set", "hashes"}: which prompts were answered, in order, as `hashed` gives them
    openings   the tokens that refusals begin with, as strings
    n_layers   of the model; post_instruction: its template's tokens after the instruction, as strings
    scores     CandidateScores of the candidates, nan where none was computed
    answers    {"harmful", "harmless", "held out"} -> condition -> {"refused", "n", "interval", "judge", ...}
    probes     {"real", "shuffled"} -> a Rate for each layer: probes at the last token, told right of the test prompts
    heads      {"harmful", "harmless"} -> [n_layers, n_heads], what each head writes along r̂ at the last token; or None
    dose       {"r", "random"} -> {coefficient: Rate of harmless prompts refused}
    costs      condition -> {"paragraphs" (nats per token), "choices" (Rate right), "kl_first", "kl_32" (nats)}
    marks      what answers are, as they were read: {"marks": {"side, condition": {mark: how many}}, "phrases":
               {"caught", "false alarms"} -> a Rate: how the list of phrases errs on them}; empty if none were read
    """
    name: str
    weights: dict
    direction: Direction
    passes: bool
    n: dict
    prompts: dict
    openings: list
    n_layers: int
    post_instruction: list
    scores: CandidateScores
    answers: dict
    probes: dict
    heads: dict | None
    dose: dict
    costs: dict
    marks: dict

    @property
    def place(self):
        """Where the pick is in `scores`: (layer, number of the position)."""
        return self.direction.layer, len(self.post_instruction) + self.direction.position

    def rate(self, side, condition):
        """How many requests of a side are refused under a condition: a Rate.

        Raises ValueError for a side or a condition that was not recorded.
        """
        conditions = self.answers.get(side, {})
        if condition not in conditions:
            raise ValueError(f"The run {self.name!r} has no {side!r}, {condition!r}: choose one of "
                             f"{', '.join(conditions) or ', '.join(self.answers)}.")
        return Rate(conditions[condition]["refused"], conditions[condition]["n"])

    def rates(self, side):
        """{condition: Rate} of a side."""
        return {condition: self.rate(side, condition) for condition in self.answers[side]}

    def first_token_rate(self, side, condition):
        """As `rate`, judged by the first token: for how many a refusal is the likelier beginning."""
        self.rate(side, condition)
        return Rate.of(metric > 0 for metric in self.answers[side][condition]["metric"])

    def random_rates(self, judge="phrases"):
        """Of harmful requests, how many are refused with each random direction erased: a list of Rates.

        judge: "phrases", for those of which whole answers were recorded, or "first token", for all.
        """
        names = [name for name in self.answers["harmful"] if name.startswith("random_")]
        if judge == "first token":
            return [self.first_token_rate("harmful", name) for name in names]
        return [self.rate("harmful", name) for name in names if self.answers["harmful"][name]["judge"] == judge]


def hashed(prompt):
    """What a record keeps of a prompt: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(getattr(prompt, "text", prompt).encode()).hexdigest()[:16]


def run_names():
    """The names of the recorded runs."""
    return sorted(path.parent.name for path in REAL.glob("*/results.json"))


def read_marks(file):
    """What marks.json holds -> as `Run.marks`."""
    if not file.is_file():
        return {}
    marks = json.loads(file.read_text(encoding="utf-8"))
    return marks | {"phrases": {name: Rate(*counts) for name, counts in marks["phrases"].items()}}


def load_run(name):
    """A recorded run -> Run. name: one of `run_names`, or a folder that holds a record.

    Raises ValueError for a name that is none, and for files that are damaged.
    """
    folder = REAL / name if name in run_names() else Path(name)
    if not (folder / "results.json").is_file():
        raise ValueError(f"There is no run {name!r}: choose one of {', '.join(run_names())}; `make real` records one.")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        vector = load_file(folder / "direction.safetensors")["direction"]
        pick = results["pick"]
        return Run(
            folder.name, results["weights"], Direction(vector, pick["layer"], pick["position"]), pick["passes"],
            results["n"], results["prompts"], results["openings"], results["n_layers"], results["post_instruction"],
            CandidateScores(*(tensor_of(results["candidates"][name]) for name in SCORES)), results["answers"],
            probes={labels: [Rate(*counts) for counts in layers] for labels, layers in results["probes"].items()},
            heads=results["heads"] and {side: torch.tensor(rows) for side, rows in results["heads"].items()},
            dose={vector: {dose: Rate(*counts) for dose, *counts in doses}
                  for vector, doses in results["dose"].items()},
            costs={condition: given | {"choices": Rate(*given["choices"])}
                   for condition, given in results["costs"].items()},
            marks=read_marks(folder / "marks.json"))
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"The run in {folder} is damaged ({error!r}): restore it from the course's repository."
                         ) from error
