"""`lax.ragged_all_to_all` for CPUs, whose XLA has none: by its documented meaning, from gathers."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp

POISON = -(2**20)  # no key, place or value of a test


def ragged_all_to_all(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name
):
    """Slice i of a device's operand goes to device i // (slices per device).

    It is written from `output_offsets[i]` on, as its sender says. A device whose `recv_sizes` are
    not what it is sent gets poison everywhere: the real one may then hang or write anywhere.
    """
    own = jax.lax.axis_index(axis_name)
    gathered = [
        jax.lax.all_gather(each, axis_name)
        for each in (operand, input_offsets, send_sizes, output_offsets)
    ]
    per_device = len(input_offsets) // jax.lax.axis_size(axis_name)
    result, slots = output, jnp.arange(len(operand))
    for source, (data, starts, sizes, targets) in enumerate(zip(*gathered, strict=True)):
        for number in range(per_device):
            mine = own * per_device + number
            start, size, target = starts[mine], sizes[mine], targets[mine]
            where = jnp.where(slots < size, target + slots, len(output))
            result = result.at[where].set(data.at[start + slots].get(mode="clip"), mode="drop")
            is_agreed = recv_sizes[source * per_device + number] == size
            fits = (start + size <= len(data)) & (target + size <= len(output))
            result = jnp.where(is_agreed & fits, result, jnp.asarray(POISON, output.dtype))
    return result


@contextlib.contextmanager
def emulated(function=ragged_all_to_all):
    """A context in which JAX has the emulation, or a variant of it; gives its calls as traced."""
    calls = mock.Mock(side_effect=function)
    with mock.patch.object(jax.lax, "ragged_all_to_all", calls):
        yield calls
