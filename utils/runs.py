"""What models of real weights did under the method, as it was recorded: `load_run(name)` reads data/real/NAME.

`make real` records a run; results.json says of which weights.
"""
import json
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load_file

from utils import DATA
from utils.candidates import SCORES, CandidateScores, tensor_of
from utils.directions import Direction
from utils.evaluation import Rate

REAL = DATA / "real"


@dataclass(frozen=True, eq=False)
class Run:
    """A recorded run.

    weights    {"id", "file", "quantization", "sha256"}: of which weights
    direction  Direction, the pick; passes: whether it passes the paper's filters
    n_layers   of the model; post_instruction: its template's tokens after the instruction, as strings
    scores     CandidateScores of the candidates, nan where none was computed
    answers    {"harmful", "harmless"} -> condition -> {"refused", "n", "interval", "judge", ...}
    """
    name: str
    weights: dict
    direction: Direction
    passes: bool
    n_layers: int
    post_instruction: list
    scores: CandidateScores
    answers: dict

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

    def random_rates(self):
        """Of harmful requests, how many are refused with each random direction erased: a list of Rates."""
        return [rate for condition, rate in self.rates("harmful").items() if condition.startswith("random_")]


def run_names():
    """The names of the recorded runs."""
    return sorted(path.parent.name for path in REAL.glob("*/results.json"))


def load_run(name):
    """A recorded run -> Run.

    Raises ValueError for a name that is none, and for files that are damaged.
    """
    folder = REAL / name
    if name not in run_names():
        raise ValueError(f"There is no run {name!r}: choose one of {', '.join(run_names())}; `make real` records one.")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        vector = load_file(folder / "direction.safetensors")["direction"]
        pick = results["pick"]
        scores = CandidateScores(*(tensor_of(results["candidates"][name]) for name in SCORES))
        return Run(name, results["weights"], Direction(vector, pick["layer"], pick["position"]), pick["passes"],
                   results["n_layers"], results["post_instruction"], scores, results["answers"])
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise ValueError(f"The run in {folder} is damaged ({error!r}): restore it from the course's repository."
                         ) from error
