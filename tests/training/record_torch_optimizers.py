"""Records what torch.optim does in 20 steps, for `test_torch_optimizers.py`.

Not a test and not run by one: torch is no dependency of this project. To record anew:

    python -m venv V && V/bin/pip install torch==2.13.0 numpy
    V/bin/python tests/training/record_torch_optimizers.py tests/training/torch_optimizers.json
"""

import json
import sys

import numpy as np
import torch

NUM_STEPS, SNAPSHOTS = 20, (1, 2, 7, 20)
SHAPES = {"matrix": (2, 3), "vector": (4,)}
# name -> (torch class, arguments); the names of our kinds and fields are torch's but for the betas.
CASES = {
    "sgd": ("SGD", dict(lr=0.05, momentum=0.9)),
    "sgd_plain_decay": ("SGD", dict(lr=0.05, momentum=0.0, weight_decay=0.1)),
    "sgd_dampening": ("SGD", dict(lr=0.05, momentum=0.8, dampening=0.3, weight_decay=0.1)),
    "sgd_nesterov": ("SGD", dict(lr=0.05, momentum=0.9, nesterov=True)),
    "adagrad": ("Adagrad", dict(lr=0.1)),
    "adagrad_start": (
        "Adagrad",
        dict(lr=0.1, initial_accumulator_value=0.5, eps=1e-3, weight_decay=0.1),
    ),
    "adam": ("Adam", dict(lr=0.05)),
    "adam_decay": ("Adam", dict(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)),
    "adam_amsgrad": ("Adam", dict(lr=0.05, betas=(0.8, 0.7), amsgrad=True)),
    "adamw": ("AdamW", dict(lr=0.05, weight_decay=0.1)),
    "adamw_amsgrad": ("AdamW", dict(lr=0.05, betas=(0.8, 0.7), weight_decay=0.2, amsgrad=True)),
    "adadelta": ("Adadelta", dict(lr=0.5, rho=0.95)),
    "adadelta_decay": ("Adadelta", dict(lr=0.5, rho=0.8, eps=1e-3, weight_decay=0.1)),
    "rmsprop": ("RMSprop", dict(lr=0.02)),
    "rmsprop_decay": ("RMSprop", dict(lr=0.02, alpha=0.8, eps=1e-3, weight_decay=0.1)),
}
CLIPPING = {
    "norm_2": dict(clipping_type="norm", max_gradient=1.5, norm_type=2.0),
    "norm_inf": dict(clipping_type="norm", max_gradient=0.5, norm_type=float("inf")),
    "norm_3": dict(clipping_type="norm", max_gradient=1.5, norm_type=3.0),
    "norm_not_reached": dict(clipping_type="norm", max_gradient=100.0, norm_type=2.0),
    "value": dict(clipping_type="value", max_gradient=0.5),
}
EMA_DECAY = 0.7


def parameters(start):
    """Fresh float64 parameters."""
    return {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}


def lists(tensors):
    """Nested lists of tensors or arrays."""
    return {name: np.asarray(value.detach()).tolist() for name, value in tensors.items()}


def train(params, optimizer, gradients, after_step=lambda: None):
    """Steps with given gradients; yields the number of steps done."""
    for number, step in enumerate(gradients, start=1):
        for name, gradient in step.items():
            params[name].grad = torch.tensor(gradient)
        optimizer.step()
        after_step()
        yield number


def main(path):
    """Writes the records."""
    rng = np.random.default_rng(7)
    start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = []
    for number in range(NUM_STEPS):
        scale = 10.0 ** rng.integers(-2, 2)
        step = {name: rng.normal(size=shape) * scale for name, shape in SHAPES.items()}
        step["vector"][number % 3] = 0.0  # an element that is zero at first and now and then
        gradients.append(step)
    cases = {}
    for name, (kind, options) in CASES.items():
        params = parameters(start)
        optimizer = getattr(torch.optim, kind)(params.values(), **options)
        snapshots = {}
        for number in train(params, optimizer, gradients):
            if number in SNAPSHOTS:
                snapshots[number] = lists(params)
        cases[name] = {"kind": kind, "options": options, "snapshots": snapshots}
    clipped = {}
    for name, options in CLIPPING.items():
        params = parameters(start)
        for key, gradient in gradients[0].items():
            params[key].grad = torch.tensor(gradient)
        if options["clipping_type"] == "norm":
            torch.nn.utils.clip_grad_norm_(
                params.values(), options["max_gradient"], options["norm_type"]
            )
        else:
            torch.nn.utils.clip_grad_value_(params.values(), options["max_gradient"])
        result = lists({key: value.grad for key, value in params.items()})
        shown = {**options, "norm_type": str(options.get("norm_type", 2.0))}
        clipped[name] = {"options": shown, "gradients": result}
    module = torch.nn.ParameterDict(parameters(start))
    averaged = torch.optim.swa_utils.AveragedModel(
        module, avg_fn=torch.optim.swa_utils.get_ema_avg_fn(EMA_DECAY)
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    snapshots = {}
    for number in train(module, optimizer, gradients, lambda: averaged.update_parameters(module)):
        if number in SNAPSHOTS:
            snapshots[number] = lists(dict(averaged.module.items()))
    record = {
        "provenance": f"torch {torch.__version__} on CPU in float64, made by "
        "tests/training/record_torch_optimizers.py",
        "start": {name: value.tolist() for name, value in start.items()},
        "gradients": [{k: v.tolist() for k, v in step.items()} for step in gradients],
        "cases": cases,
        "clipped": clipped,
        "ema": {"decay": EMA_DECAY, "lr": 0.05, "snapshots": snapshots},
    }
    with open(path, "w") as file:
        json.dump(record, file)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
