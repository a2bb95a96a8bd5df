"""FLOPs of a program's matrix products, counted in its jaxpr: every turn of a loop, what is computed again included."""

import math
from typing import Any

from jax.extend import core


def flops(jaxpr: Any) -> float:
    """Of all devices together; a multiplication and an addition are two. Of branches the dearest counts.

    A kernel counts as often as its grid has places, or by the estimate that it brings.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            summed = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * summed
        elif name == "conv_general_dilated":
            kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
            outputs = kernel[numbers.rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
        elif name == "scan":
            total += params["length"] * flops(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(flops(branch.jaxpr) for branch in params["branches"])
        elif name == "shard_map":
            mesh = params["mesh"]
            manual = params.get("manual_axes", frozenset(mesh.axis_names))
            total += math.prod(mesh.shape[axis] for axis in manual) * flops(params["jaxpr"])
        elif name == "pallas_call":
            known = params.get("cost_estimate")
            grid = params["grid_mapping"].grid
            places = math.prod(size for size in grid if isinstance(size, int))
            total += float(known.flops) if known is not None else places * flops(params["jaxpr"])
        else:
            total += sum(flops(inner) for value in params.values() for inner in _jaxprs(value))
    return total


def _jaxprs(value: Any) -> list[Any]:
    """The jaxprs that a parameter holds."""
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    if isinstance(value, (tuple, list)):
        return [inner for item in value for inner in _jaxprs(item)]
    return []
