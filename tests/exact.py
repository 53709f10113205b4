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


def assert_same(found, expected):
    """The same but for float64's rounding, in relation to the largest number, if that is above 1."""
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * max(1, expected.abs().max().item()))
