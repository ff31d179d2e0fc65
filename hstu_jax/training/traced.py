"""What a traced program sends between devices and multiplies, read from its jaxpr.

A step is traced in seconds for any mesh, also one of more devices than there are, and nothing is
compiled. Here: collectives and operations of matrix products. Not here: the same collectives read
from a compiled program (`collectives.py`, which tests hold this to), and what either costs
(`scaling.py`).
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core

from hstu_jax.features import pipeline as pipeline_lib
from hstu_jax.training import collectives, partition, step
from hstu_jax.training import run as run_lib

_KINDS = {
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "all_to_all": "all-to-all",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "ppermute": "collective-permute",
    "psum": "all-reduce",
    "psum2": "all-reduce",
    "psum_invariant": "all-reduce",
    "ragged_all_to_all": "ragged-all-to-all",
    "reduce_scatter": "reduce-scatter",
}
# These name mesh axes and send nothing.
_LOCAL = {"axis_index", "pbroadcast", "pvary", "shard_map"}


@dataclasses.dataclass(frozen=True)
class Traced:
    """Figures of a program on one device.

    Attributes:
        collectives: in the order of the program; one in a loop of unknown length (the rounds of the
            exchange) counts as one run.
        products: kind of matrix product -> operations, 2 m n k for [m, k] times [k, n]. A kind is
            the inputs' dtype, or "float32 exact" where full precision is asked for.
    """

    collectives: tuple[collectives.Collective, ...]
    products: dict[str, int]


def trace_step(
    program: step.Program,
    pipeline: pipeline_lib.Pipeline,
    *,
    mesh: jax.sharding.AbstractMesh,
    groups_per_device: int,
) -> Traced:
    """Figures of a training step on a mesh that need not exist.

    Args:
        program: static parts of the step.
        pipeline: has the shapes of batches; the largest is traced.
        mesh: of the axes `partition.AXES`.
        groups_per_device: groups of a batch on every device.
    """
    spec = partition.spec_of_state(
        program.specs, mesh, replicated_bytes=program.config.mesh.replicated_table_bytes
    )
    mapped = jax.shard_map(
        functools.partial(step.train_step, program=program),
        mesh=mesh,
        in_specs=(spec, partition.SPLIT),
        out_specs=(spec, partition.REPLICATED),
        check_vma=False,
    )
    batch = run_lib.abstract_batch(pipeline, num_groups=groups_per_device * mesh.size)
    per_step = program.config.train.gradient_accumulation_steps
    batch = batch if per_step == 1 else (batch,) * per_step
    return read(jax.make_jaxpr(mapped)(run_lib.state_shapes(program.config), batch), mesh.shape)


def read(jaxpr: core.ClosedJaxpr, axis_sizes: Mapping[str, int]) -> Traced:
    """Figures of a traced program.

    Products inside `while` loops are left out, since their number is not known: of a training step
    those are the blocks of attention and, with the next-item objective, those of the loss
    (`query_softmax.looped_flops` has their number). Of a `cond`, the branch with most of both
    counts.

    Args:
        jaxpr: the program, of `jax.shard_map` for figures of one device.
        axis_sizes: length of every axis of its mesh, major first.

    Raises:
        ValueError: a primitive names axes of a mesh and is not known here.
    """
    found: list[collectives.Collective] = []
    products: collections.Counter[str] = collections.Counter()
    _walk(jaxpr.jaxpr, axis_sizes, (1, True), found, products)
    return Traced(collectives=tuple(found), products=dict(products))


def _walk(jaxpr, sizes, runs, found, products):
    """Adds the figures of a program; `runs` says how often it runs, and whether that is known."""
    times, is_known = runs
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general" and is_known:
            products[_product_kind(equation)] += times * _product_flops(equation)
        axes = _mesh_axes(params)
        if name in _KINDS:
            found.append(_collective(_KINDS[name], equation, axes, sizes, times))
        elif axes and name not in _LOCAL:
            raise ValueError(f"{name}: names the mesh axes {axes} and is not known here.")
        if name == "cond":
            _walk_largest(params["branches"], sizes, runs, found, products)
            continue
        inner = (times * (params["length"] if name == "scan" else 1), is_known and name != "while")
        for part in _programs(params):
            _walk(part, sizes, inner, found, products)


def _walk_largest(branches, sizes, runs, found, products):
    read = []
    for branch in branches:
        inside: tuple[list, collections.Counter] = ([], collections.Counter())
        _walk(branch.jaxpr, sizes, runs, *inside)
        read.append(inside)
    most = max(read, key=lambda r: (sum(c.sent_bytes for c in r[0]), r[1].total()))
    found.extend(most[0])
    products.update(most[1])


def _programs(params: Mapping[str, Any]) -> Iterator[Any]:
    """Programs that an equation holds."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def _mesh_axes(params: Mapping[str, Any]) -> tuple[str, ...]:
    value = params.get("axes", params.get("axis_name", ()))
    value = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(name for name in value if isinstance(name, str))


def _collective(kind, equation, axes, sizes, times) -> collectives.Collective:
    results = [variable.aval for variable in equation.outvars]
    return collectives.Collective(
        kind=kind,
        shape=" ".join(each.str_short() for each in results),
        result_bytes=sum(each.size * each.dtype.itemsize for each in results),
        group=collectives.group_along(axes, sizes),
        times=times,
    )


def _product_flops(equation) -> int:
    left = equation.invars[0].aval
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = math.prod(left.shape[axis] for axis in contracted)
    return 2 * depth * equation.outvars[0].aval.size


def _product_kind(equation) -> str:
    dtype = str(equation.invars[0].aval.dtype)
    precision = equation.params.get("precision")
    is_exact = dtype == "float32" and "HIGHEST" in str(precision)
    return f"{dtype} exact" if is_exact else dtype
