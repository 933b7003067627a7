"""Training in bf16: forward and backward run on a copy of the model, optimisers move the fp32 weights it is of.

bf16 has 8 bits of precision, and most updates are smaller than that against their weight: added to weights in bf16 they
would be lost. What inference keeps in fp32 (the router's bias, the indexers' head weights) stays so in the copy.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from nanoglm.model import GLM
from nanoglm.weights.names import stored_dtype


def low_copy(model: GLM, dtype: torch.dtype = torch.bfloat16) -> GLM:
    """A copy in ``dtype`` for forward and backward. Its gradients go to ``model``'s parameters, in their dtype, as soon
    as each backward pass has them, so that a step's passes are summed there; :func:`refresh` renews its values."""
    copy = deepcopy(model)
    for (name, parameter), target in zip(copy.named_parameters(), model.parameters(), strict=True):
        parameter.data = parameter.data.to(stored_dtype(name, dtype))
        parameter.register_post_accumulate_grad_hook(partial(_hand_over, target))
    return copy


def _hand_over(target: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None
    grad, parameter.grad = parameter.grad.to(target.dtype), None
    target.grad = grad if target.grad is None else target.grad.add_(grad)


@torch.no_grad()
def refresh(copy: GLM, model: GLM) -> None:
    """Gives a :func:`low_copy` the model's values, configuration, and what is to learn."""
    copy.config = model.config
    for mine, parameter in zip(copy.parameters(), model.parameters(), strict=True):
        mine.copy_(parameter)
        mine.requires_grad_(parameter.requires_grad)
    for kept, buffer in zip(copy.buffers(), model.buffers(), strict=True):
        kept.copy_(buffer)
