"""Replays recorded cases of the table optimizer and of the learning-rate schedules.

Whole trainings are in `golden_training_runners.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hstu_jax.config import train_schema
from hstu_jax.tables import lookup, optimizers, update
from hstu_jax.training import schedules
from tests import golden_cases, golden_runners

_G = (1e-6, 1e-6)
_RATE = (0.0, 1e-6)
_SCHEDULES = {
    "ConstantLR": "constant",
    "ExponentialDecayLR": "exponential_decay",
    "ManualStepLR": "manual_step",
    "CosineAnnealingLR": "cosine_annealing",
    "CosineAnnealingWarmRestartsLR": "cosine_annealing_warm_restarts",
}


def run_rowwise_adagrad(case: golden_cases.Case) -> None:
    """Family G: table lookup, duplicate sums and the update, step by step."""
    args = case.args
    rule = optimizers.RowwiseAdagrad(
        args.get("weight_decay", 0.0), args["weight_decay_mode"].lower()
    )
    max_gradient = args["max_gradient"] if args.get("gradient_clipping") else None
    weights = jnp.asarray(case["in.weight0"])

    @jax.jit
    def advance(state, ids, bags, cotangent, rate):
        unique = lookup.unique_rows(ids, capacity=len(ids), sentinel=weights.shape[0])

        def look_up(rows):
            vectors = lookup.expand(rows, unique, max_gradient=max_gradient)
            if args["pooling"] == "NONE":
                return vectors
            return jax.ops.segment_sum(vectors, bags, num_segments=cotangent.shape[0])

        out, vjp = jax.vjp(look_up, lookup.gather(state.weights, unique))
        new_state = update.apply(state, unique, vjp(cotangent)[0], rule=rule, learning_rate=rate)
        return out, new_state

    assert args["pooling"] in ("NONE", "SUM"), args["pooling"]
    state = update.TableState(weights, {"accumulator": jnp.zeros(weights.shape[0])})
    num_steps = len([name for name in case.arrays if name.endswith(".ids")])
    rates = args["lr_steps"] or [args["lr"]] * num_steps
    for step, rate in zip(range(num_steps), rates, strict=True):
        ids = jnp.asarray(case[f"step{step}.ids"], jnp.int32)
        counts = np.diff(case[f"step{step}.offsets"])
        bags = jnp.asarray(np.repeat(np.arange(counts.size), counts), jnp.int32)
        cotangent = jnp.asarray(case[f"step{step}.cot"])
        out, state = advance(state, ids, bags, cotangent, jnp.float32(rate))
        golden_runners.close(out, case[f"step{step}.out"], _G, f"step{step}.out")
        golden_runners.close(state.weights, case[f"step{step}.weight"], _G, f"step{step}.weight")
        golden_runners.close(
            state.slots["accumulator"], case[f"step{step}.sum"], _G, f"step{step}.sum"
        )


def run_lr_schedules(case: golden_cases.Case) -> None:
    """Family I: the rate in force after 0, 1, ... steps of the scheduler."""
    for name, recorded in case.args["schedules"].items():
        args = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}
        base, num_steps = args.pop("base_lr"), args.pop("n")
        args.pop("by_epoch", None)  # what a step of the scheduler is does not show in the numbers
        config = train_schema.LearningRateConfig(schedule=_SCHEDULES[args.pop("cls")], **args)
        run = schedules.RunLength(num_steps=num_steps)

        @jax.jit
        @jax.vmap
        def rates(step, config=config, base=base, run=run):
            return schedules.learning_rate(config, base=base, run=run, step=step)

        got = rates(jnp.arange(num_steps, dtype=jnp.int32))
        golden_runners.close(got, case[f"lr.{name}"], _RATE, f"lr.{name}")
