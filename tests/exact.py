"""What is the same by its formula is the same to ten digits and more in float64, whatever the processor.

In float32 the last digits depend on the order in which it adds, and a bound that holds here may not hold elsewhere.
"""
import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Within the block, what asks for float32 gets float64.

    transformers computes norms and softmax in float32, whatever the model. And in float32 the mask of a model in
    float64 is minus infinity: where padding has nothing to look at, the softmax would be nan.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return function(*args, **kwargs)


# In relation to the largest number. We have seen 3e-15 and 3e-6.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}


def assert_same(found, expected):
    """Two tensors, or lists of them, are the same but for rounding, in relation to the largest number or to 1."""
    if not isinstance(expected, torch.Tensor):
        assert len(found) == len(expected)
        for pair in zip(found, expected):
            assert_same(*pair)
        return
    size = max(1, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING.get(expected.dtype, 0) * size)
