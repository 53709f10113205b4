"""Checks of the exercises on models: prompts, tokens and the stream."""
from utils import models
from utils.checks import register

register(
    models.shared_tail,
    cases=lambda: [([5, 1, 8, 2, 3, 4], [5, 7, 1, 9, 2, 3, 4]), ([9, 2, 6], [2, 9, 4, 6]), ([2, 3], [1, 2, 3]),
                   ([1, 2], [3, 4, 5])],
    mistakes={
        "you compared from the beginning. Compare the last tokens, then the last but one, and so on.":
            lambda one, two: [a for i, (a, b) in enumerate(zip(one, two)) if one[:i + 1] == two[:i + 1]],
        "the last token comes first in your answer. Give them in the order in which they stand.":
            lambda one, two: models.shared_tail(one, two)[::-1],
        "you went on past the first difference. Stop there, even if tokens before it agree by chance.":
            lambda one, two: [a for a, b in zip(one[::-1], two[::-1]) if a == b][::-1],
        "you kept every token that is somewhere in both. Only those at the end count, place by place.":
            lambda one, two: [token for token in one if token in two],
        "this is how many there are. Return the tokens themselves.":
            lambda one, two: len(models.shared_tail(one, two)),
        "where nothing is shared, your answer is the whole of `one`, for one[-0:] is one[0:]. Return an empty list.":
            lambda one, two: one[-len(models.shared_tail(one, two)):],
    },
)
