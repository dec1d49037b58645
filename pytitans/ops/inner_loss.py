"""The memory's own loss by hand: the pieces of its gradient, and of that gradient's gradient.

What `pytitans.ops.naive` leaves to autograd and `pytitans.ops.chunk_plain` does itself.
"""

import torch
from torch import Tensor

from pytitans.ops.naive import Activation, Objective

SQRT_HALF, INV_SQRT_2PI = 0.5**0.5, 0.3989422804014327


def slope(x: Tensor, activation: Activation) -> Tensor:
    """The derivative of the memory's activation."""
    if activation == "silu":
        s = x.sigmoid()
        return s * (1 + x * (1 - s))
    return 0.5 * (1 + torch.erf(x * SQRT_HALF)) + x * torch.exp(-0.5 * x * x) * INV_SQRT_2PI


def curvature(x: Tensor, activation: Activation) -> Tensor:
    """The second derivative of the memory's activation."""
    if activation == "silu":
        s = x.sigmoid()
        return s * (1 - s) * (2 + x * (1 - 2 * s))
    return (2 - x * x) * torch.exp(-0.5 * x * x) * INV_SQRT_2PI


def standardise(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm's unit vector, and the factor it was multiplied by."""
    variance, mean = torch.var_mean(z, dim=-1, keepdim=True, correction=0)
    scale = (variance + eps).rsqrt()
    return (z - mean) * scale, scale


def standardise_back(g: Tensor, unit: Tensor, scale: Tensor) -> Tensor:
    return scale * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))


def output_error(k, z, v, norm, objective: Objective, eps: float) -> Tensor:
    """The loss's gradient in z, the MLP's output: through the residual and LayerNorm if any."""
    if norm is None:
        return -v if objective == "dot" else z - v
    weight, bias = norm
    unit, scale = standardise(z, eps)
    error = -v if objective == "dot" else k + unit * weight + bias - v
    return standardise_back(error * weight, unit, scale)


def output_error_back(g_d, k, z, v, norm, objective: Objective, eps: float):
    """From the gradient in `output_error` to those in k, z, v and, if any, the norm's two."""
    if norm is None:
        return (None, None, -g_d, None) if objective == "dot" else (None, g_d, -g_d, None)
    weight, bias = norm
    unit, scale = standardise(z, eps)
    error = -v if objective == "dot" else k + unit * weight + bias - v
    g = error * weight
    along = (g * unit).mean(-1, keepdim=True)
    bare = g - g.mean(-1, keepdim=True) - unit * along  # the error is scale * bare
    g_bare = g_d * scale
    g_along = (g_bare * unit).mean(-1, keepdim=True)
    g_g = g_bare - g_bare.mean(-1, keepdim=True) - unit * g_along
    g_unit = -g_bare * along - g * g_along
    g_error, g_weight = g_g * weight, g_g * error
    if objective == "l2":
        g_unit = g_unit + g_error * weight
        g_weight = g_weight + g_error * unit
    g_scale = (g_d * bare).mean(-1, keepdim=True)
    g_z = standardise_back(g_unit, unit, scale) - g_scale * scale * scale * unit
    if objective == "dot":
        return None, g_z, -g_error, (g_weight, torch.zeros_like(g_error))
    return g_error, g_z, -g_error, (g_weight, g_error)
