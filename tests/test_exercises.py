"""Every exercise in its three states (blank, right, wrong in each named way), the strict switch, and the summary."""
import inspect
from pathlib import Path
from types import FunctionType

import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from utils import checks, exercises
from utils.checks import all_checks
from utils.evaluation import Rate
from utils.exercises import check, exercise, is_blank, predicted, summary

CHECKS = all_checks()
MISTAKES = [pytest.param(name, sentence, id=f"{name}: {sentence[:50]}")
            for name in CHECKS for sentence in CHECKS[name].mistakes]


@pytest.fixture(autouse=True)
def new_lesson(monkeypatch):
    monkeypatch.setattr(exercises, "EXERCISES", {})
    monkeypatch.delenv("COURSE_STRICT", raising=False)


def answer_with(name, function):
    """What `@exercise` makes of `function`, written by the learner under the exercise's name."""
    return exercise(FunctionType(function.__code__, function.__globals__, name, function.__defaults__,
                                 function.__closure__))


def blank(name):
    """What `@exercise` makes of an empty cell."""
    def attempt(*args, **kwargs):
        """Say what to write."""
        ...  # your code here
    attempt.__name__ = name
    return exercise(attempt)


# the three states of each exercise

def test_every_check_stands_in_the_file_named_after_its_functions_module():
    files = {path.stem for path in Path(checks.__file__).parent.glob("*.py")}
    assert files == {"__init__", *checks.MODULES}
    for one in CHECKS.values():
        assert one.cases.__module__.split(".")[-1] == one.reference.__module__.split(".")[-1]


@pytest.mark.parametrize("name", CHECKS)
def test_blank_is_answered_by_the_reference_and_said_once(name, capsys):
    answer = blank(name)
    for args in CHECKS[name].cases():
        expected = CHECKS[name].call(CHECKS[name].reference, *args)
        assert not checks.difference(CHECKS[name].call(answer, *args), expected, CHECKS[name])
    check(answer)
    assert capsys.readouterr().out == f"{name} is still blank: the reference answers in its place.\n"
    assert answer.state == "blank"


@pytest.mark.parametrize("name", CHECKS)
def test_right_is_said_and_kept(name, capsys):
    calls = []
    answer = answer_with(name, lambda *args, **kwargs: calls.append(1) or CHECKS[name].reference(*args, **kwargs))
    check(answer)
    assert capsys.readouterr().out == f"Right: {name} is yours from here on.\n"
    calls.clear()
    CHECKS[name].call(answer, *CHECKS[name].cases()[0])
    assert calls  # it was the learner's function that answered


@pytest.mark.parametrize("name, sentence", MISTAKES)
def test_wrong_is_named_and_replaced(name, sentence, capsys):
    answer = answer_with(name, CHECKS[name].mistakes[sentence])
    check(answer)
    assert capsys.readouterr().out == (f"Not yet: {name}: {sentence}\n"
                                       "Until it is right, the reference answers in its place.\n")
    args = CHECKS[name].cases()[0]
    expected = CHECKS[name].call(CHECKS[name].reference, *args)
    assert not checks.difference(CHECKS[name].call(answer, *args), expected, CHECKS[name])


@pytest.mark.parametrize("name", CHECKS)
def test_at_least_two_mistakes_are_recognised(name):
    assert len(CHECKS[name].mistakes) >= 2
    assert all(sentence.endswith(".") for sentence in CHECKS[name].mistakes)


# right answers written another way

def another_difference_in_means(harmful, harmless):
    return sum(harmful) / len(harmful) - torch.einsum("n...->...", harmless) / len(harmless)


def another_ablate(x, direction):
    projector = torch.eye(len(direction)) - torch.outer(direction, direction) / direction.dot(direction)
    return x @ projector


def another_add(x, direction, coefficient=1.0):
    return torch.stack([token + coefficient * direction for row in x for token in row]).view_as(x)


def another_refusal_metric(logits, refusal_tokens):
    others = [token for token in range(logits.shape[1]) if token not in refusal_tokens]
    log_probs = logits.double().log_softmax(-1)
    return torch.logsumexp(log_probs[:, refusal_tokens], -1) - torch.logsumexp(log_probs[:, others], -1)


def another_kl_divergence(logits, changed_logits):
    return torch.nn.functional.kl_div(changed_logits.log_softmax(-1), logits.log_softmax(-1), log_target=True,
                                      reduction="none").sum(-1)


def another_wilson(successes, n, z=1.96):
    """The roots of (p - successes / n)² = z² p (1 - p) / n, as a tensor."""
    a, b, c = 1 + z**2 / n, -(2 * successes / n + z**2 / n), (successes / n) ** 2
    root = (b**2 - 4 * a * c) ** 0.5
    return torch.tensor([(-b - root) / (2 * a), (-b + root) / (2 * a)])


def another_shared_tail(one, two):
    if not one or not two or one[-1] != two[-1]:
        return []
    return another_shared_tail(one[:-1], two[:-1]) + [one[-1]]


def another_trace_residual_stream(model, inputs, positions):
    streams = []
    with torch.no_grad(), model.lm.trace(inputs):
        for layer in model.layers:
            streams.append(layer.input.save())
    return torch.stack([stream[:, positions] for stream in streams], dim=1)


def another_residual_stream(model, instructions, positions=None, batch_size=64):
    positions = model.positions if positions is None else positions
    return torch.cat([another_trace_residual_stream(model, model.encode([text]), positions) for text in instructions])


def another_filter_prompts(prompts, metric, refused):
    kept = []
    for i, value in enumerate(metric.tolist()):
        if (value > 0 and refused) or (value <= 0 and not refused):
            kept.append(prompts[i])
    return tuple(kept)


def another_cosine_similarities(directions):
    return torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=-1)


def another_refusal_when_ablated(model, direction, harmful):
    with model.lm.trace(model.encode(harmful)):
        for layer in model.layers:
            layer.input = another_ablate(layer.input, direction)
            attention = layer.self_attn.output
            layer.self_attn.output = (another_ablate(attention[0], direction), *attention[1:])
            layer.mlp.output = another_ablate(layer.mlp.output, direction)
        logits = model.lm.output.logits[:, -1].save()
    return another_refusal_metric(logits, model.refusal_tokens)


def another_refusal_when_added(model, direction, layer, harmless):
    with model.lm.trace(model.encode(harmless)):
        model.layers[layer].input = model.layers[layer].input + direction
        logits = model.lm.output.logits[:, -1].save()
    return another_refusal_metric(logits, model.refusal_tokens)


def another_select_direction(scores, max_kl=0.1, min_induce=0.0, max_layer=0.8):
    n_layers, n_positions = scores.bypass.shape
    places = [(layer, i) for layer in range(n_layers) for i in range(n_positions)]
    passing = [at for at in places
               if scores.kl[at] < max_kl and scores.induce[at] > min_induce and at[0] < max_layer * n_layers]
    return list(min(passing, key=lambda at: scores.bypass[at].item()))


def another_random_directions(n, like, seed=0):
    torch.manual_seed(seed)
    rows = [torch.randn(len(like)) for _ in range(n)]
    return torch.stack([row / row.norm() * (like @ like).sqrt() for row in rows])


def another_last_logits(model, instructions, intervention=None, batch_size=64):
    rows = []
    for instruction in instructions:
        with model.lm.trace(model.encode([instruction])):
            if intervention is not None:
                intervention.apply(model)
            rows.append(model.lm.output.logits[0, -1].save())
    return torch.stack(rows)


def another_ablate_everywhere(model, direction):
    """Each tensor edited in place, and of the layers' inputs the first alone: nothing else is written to the stream."""
    for number, layer in enumerate(model.layers):
        if number == 0:
            layer.input[:] = another_ablate(layer.input, direction)
        layer.self_attn.output[0][:] = another_ablate(layer.self_attn.output[0], direction)
        layer.mlp.output[:] = another_ablate(layer.mlp.output, direction)


def another_orthogonalize(weight, direction):
    edited = torch.eye(len(direction)) - torch.outer(direction, direction) / direction.dot(direction)
    return edited @ weight


def another_shifted_bias(bias, vector):
    return (torch.zeros_like(vector) if bias is None else bias) + vector


def another_residual_writers(model):
    writers = [model.lm.model.embed_tokens.weight.T]
    for layer in model.lm.model.layers:
        writers.append(layer.self_attn.o_proj.weight)
        writers.append(layer.mlp.down_proj.weight)
    return writers


def another_fit_probe(x, labels):
    x = x.double().numpy()
    return Pipeline([("scale", StandardScaler()), ("regress", LogisticRegression(C=0.1, max_iter=500))]).fit(x, labels)


def another_probe_direction(probe):
    """How the logit grows along each entry."""
    d_model = len(probe[0].scale_)
    steps = probe.decision_function([[float(i == j) for j in range(d_model)] for i in range(-1, d_model)])
    slopes = torch.tensor(steps[1:] - steps[0])
    return slopes / slopes.norm()


def another_fit_words(texts, labels):
    words = TfidfVectorizer(binary=True, use_idf=False, norm=None)
    return Pipeline([("words", words), ("regress", LogisticRegression(max_iter=500))]).fit(texts, labels)


def another_shuffle_balanced(labels, seed=0):
    torch.manual_seed(seed)
    new = torch.tensor(labels)
    for side in (True, False):
        places = torch.tensor([place for place, label in enumerate(labels) if label == side])
        half = places[torch.randperm(len(places))[:len(places) // 2]]
        new[half] = ~new[half]
    return new


def another_calibration(probabilities, labels, n_bins=5):
    found = []
    for low in range(n_bins):
        inside = [(p, label) for p, label in zip(probabilities, labels)
                  if low <= p * n_bins < low + 1 or (low == n_bins - 1 and p == 1)]
        if inside:
            found.append((torch.tensor([p for p, _ in inside]).mean(), Rate.of(label for _, label in inside)))
    return found


def another_add_at_layer(model, direction, layer, coefficient=1.0):
    model.layers[layer].input[:] += coefficient * direction


def another_rates_by_group(outcomes, n_groups):
    rows = torch.tensor(outcomes).view(n_groups, -1)
    return [Rate(int(row.sum()), len(row)) for row in rows]


def another_bootstrap_mean(values, n_boot=2000, seed=0):
    torch.manual_seed(seed)
    means = sorted(values[torch.randint(len(values), (len(values),))].mean() for _ in range(n_boot))
    return values.mean(), means[round(0.025 * n_boot)], means[round(0.975 * n_boot)]


def another_trace_generation(model, inputs, change, max_new_tokens=64):
    with model.lm.edit() as (tracer, edited):
        for _ in tracer.all():
            change.apply(model)
    with edited.generate(inputs, max_new_tokens=max_new_tokens, do_sample=False) as tracer:
        ids = tracer.result.save()
    return ids


def another_next_token_losses(logits, ids):
    log_probs = logits.log_softmax(-1)
    return torch.stack([-log_probs[:, i - 1].gather(1, ids[:, i:i + 1])[:, 0] for i in range(1, ids.shape[1])], dim=1)


def another_generate(model, instructions, intervention=None, max_new_tokens=64, batch_size=64):
    """Token by token, without a cache."""
    answers = []
    for instruction in instructions:
        tokens, new = model.tokens([instruction])[0], []
        while len(new) < max_new_tokens and model.tokenizer.eos_token_id not in new:
            with model.lm.trace(model.pad([tokens + new])):
                if intervention is not None:
                    intervention.apply(model)
                token = model.lm.output.logits[0, -1].argmax().save()
            new.append(int(token))
        answers.append(model.decode(new))
    return answers


def another_memory_needed(n_weights, dtype):
    return torch.empty(n_weights, dtype=dtype, device="meta").nbytes


def another_tokens_read(n_tokens, n_candidates, n_train, n_val):
    total = 0
    for n_side in (n_train, n_val):
        total += 2 * n_side * n_tokens * 2  # train: filter and mean; val: filter and unchanged logits
    for _score in ("bypass", "induce", "kl"):
        total += n_candidates * n_val * n_tokens
    return total


def another_first_order_ablation(writes, gradients, direction):
    """All writes at once, and the shadow as a vector."""
    w, g = torch.stack(writes), torch.stack(gradients)  # [n_writes, n_prompts, n_tokens, d_model]
    shadow = (w @ direction / direction.dot(direction))[..., None] * direction
    return (g * -shadow).sum(dim=(0, 2, 3))


def another_kept_out_by_one(filters):
    def others(condition):
        return [met for name, met in filters.items() if name != condition]
    return {condition: torch.stack([~met, *others(condition)]).all(dim=0) for condition, met in filters.items()}


def another_opening_tokens(harmful, harmless, least=0.05):
    p, q = (logits.double().exp() / logits.double().exp().sum(1, keepdim=True) for logits in (harmful, harmless))
    more = (p.mean(0) - q.mean(0)).tolist()
    return sorted((token for token, value in enumerate(more) if value > least), key=lambda token: -more[token])


def another_corrected_rate(observed, caught, false_alarms):
    return torch.tensor((false_alarms - observed) / (false_alarms - caught)).clamp(0, 1)


ANOTHER_WAY = {name[len("another_"):]: function for name, function in list(globals().items())
               if name.startswith("another_")}


@pytest.mark.parametrize("name", ANOTHER_WAY)
def test_right_in_another_way(name, capsys):
    answer = answer_with(name, ANOTHER_WAY[name])
    check(answer)
    assert answer.state == "right", capsys.readouterr().out


# what else can be wrong

def difference_in_means_checked(function, capsys):
    check(answer_with("difference_in_means", function))
    return capsys.readouterr().out


@pytest.mark.parametrize("function, said", [
    (lambda harmful, harmless: print(end=""), "returns nothing"),
    (lambda harmful, harmless: ..., "is of type ellipsis"),
    (lambda harmful, harmless: harmful.mean(), "the shape of your answer is [], and should be [4, 3, 5] = [n_layers,"),
    (lambda harmful, harmless: (harmful, harmless), "a tuple of 2"),
    (lambda harmful, harmless: 2 * (harmful.mean(0) - harmless.mean(0)), "the numbers differ"),
    (lambda harmful, harmless: (harmful.mean(0) - harmless.mean(0)).sub(9).log(), "holds nan"),
    (lambda harmful, harmless: harmful @ harmless, "stops at `(lambda harmful, harmless: harmful @ harmless, "),
    (lambda harmful: harmful, "TypeError"),
    (lambda harmful, harmless: harmful.sub_(1).mean(0) - harmless.sub_(1).mean(0), "changes its input in place"),
])
def test_other_faults_are_described(function, said, capsys):
    assert said in difference_in_means_checked(function, capsys)


def test_an_error_within_a_trace_is_shown_at_the_learners_line(capsys):
    def ablate_everywhere(model, direction):
        for layer in model.layers:
            layer.input = layer.input @ direction[:3]
    check(exercise(ablate_everywhere))
    assert "stops at `layer.input = layer.input @ direction[:3]` with RuntimeError" in capsys.readouterr().out


def test_unchecked_answer_is_the_learners():
    assert answer_with("ablate", lambda x, r: "mine")(1, 2) == "mine"


def test_mending_a_wrong_answer(capsys):
    check(answer_with("ablate", lambda x, r: x))
    mended = answer_with("ablate", CHECKS["ablate"].reference)
    check(mended)
    assert mended.state == "right"
    summary()
    assert "1 of 1 yours, 0 from the reference." in capsys.readouterr().out


def test_unknown_name_is_refused():
    with pytest.raises(KeyError, match="abblate is not an exercise.*ablate"):
        answer_with("abblate", lambda x: x)


def test_undecorated_function_is_refused():
    with pytest.raises(TypeError, match="@exercise"):
        check(CHECKS["ablate"].reference)


def test_learners_signature_and_docstring_are_kept():
    @exercise
    def ablate(x, direction):
        """What to write."""
        ...
    assert str(inspect.signature(ablate)) == "(x, direction)" and ablate.__doc__ == "What to write."


# blank or not

def test_blank_bodies():
    def dots(x): ...
    def passing(x): pass
    def documented(x):
        """Say."""
    def with_comment(x, y=2, *, z):
        """Say."""
        # first this, then that
        ...  # your code here
    def nbgrader(x):
        """Say."""
        # YOUR CODE HERE
        raise NotImplementedError()
    assert all(map(is_blank, (dots, passing, documented, with_comment, nbgrader)))


def test_written_bodies():
    def constant(x): return 0
    def argument(x): return x
    def assignment(x): y = x  # noqa: F841
    def other_error(x): raise ValueError()
    def not_implemented(x): raise NotImplementedError("this way")
    assert not any(map(is_blank, (constant, argument, assignment, other_error, not_implemented)))


def test_torchs_own_not_implemented_is_no_blank(capsys):
    def stopping(harmful, harmless):
        raise NotImplementedError("no kernel for this type")
    assert "stops" in difference_in_means_checked(stopping, capsys)


# the strict switch

def test_strict_raises_for_blank_and_wrong_and_not_for_right(monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    check(answer_with("ablate", CHECKS["ablate"].reference))
    with pytest.raises(AssertionError, match="ablate: the sign is flipped"):
        check(answer_with("ablate", lambda x, r: x + (x @ r)[..., None] * r / (r @ r)))
    with pytest.raises(AssertionError, match="ablate: still blank"):
        check(blank("ablate"))


def test_strict_grades_the_attempt_not_the_fallback(monkeypatch):
    answer = answer_with("ablate", lambda x, r: x)
    check(answer)  # the reference answers from here on
    monkeypatch.setenv("COURSE_STRICT", "1")
    with pytest.raises(AssertionError):
        check(answer)


def test_strict_summary_checks_what_was_not_checked(monkeypatch):
    monkeypatch.setenv("COURSE_STRICT", "1")
    answer_with("ablate", lambda x, r: x)
    with pytest.raises(AssertionError, match="ablate"):
        summary()


# the summary

def test_summary_counts(capsys):
    answer_with("difference_in_means", CHECKS["difference_in_means"].reference)  # never checked by the learner
    check(answer_with("ablate", CHECKS["ablate"].reference))
    check(answer_with("add", lambda x, r, coefficient=1.0: x))
    blank("wilson")
    blank("kl_divergence")
    capsys.readouterr()
    summary()
    assert capsys.readouterr().out == (
        "Right: difference_in_means is yours from here on.\n"
        "2 of 5 yours, 3 from the reference.\n"
        "Yours: difference_in_means, ablate.\n"
        "Still blank: wilson, kl_divergence.\n"
        "Not yet right: add.\n")


def test_fallback_answers_are_never_the_learners(capsys):
    blank("wilson")(3, 10)
    summary()
    assert "0 of 1 yours, 1 from the reference." in capsys.readouterr().out


def test_summary_of_nothing(capsys):
    summary()
    assert capsys.readouterr().out == "0 of 0 yours, 0 from the reference.\n"


# inside a trace

@pytest.mark.parametrize("guesses, said", [
    ([None], ""), ([None, None], ""), ([{"harmless": None, "harmful": None}], ""), ([0.0], "You predicted: 0.0\n"),
    ([None, "few"], "You predicted: None few\n"), ([[4, 5]], "You predicted: [4, 5]\n"),
    ([{"harmless": None, "harmful": 0}], "You predicted: {'harmless': None, 'harmful': 0}\n")])
def test_only_a_prediction_that_was_made_is_repeated(guesses, said, capsys):
    predicted(*guesses)
    assert capsys.readouterr().out == said


def test_an_exercise_used_inside_a_trace(capsys):
    model, ablate = checks.model(), blank("ablate")
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    with model.lm.trace(model.encode(["Hello."])):
        model.layers[0].input = ablate(model.layers[0].input, direction)
        found = model.layers[0].input.save()
    assert (found @ direction).abs().max() < 1e-3 * found.norm(dim=-1).max()
    assert "ablate is still blank" in capsys.readouterr().out
