"""Several processes of one run: how they start, agree, exchange small values and end together.

Everything about a process's number is asked here. A run of one process never waits: every function
then returns at once. Values go through the key-value store of `jax.distributed`, not through
collectives of devices, so that a process that is late or gone is noticed by name. Where arrays live
is in `partition.py`.
"""

import contextlib
import faulthandler
import hashlib
import importlib.metadata
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import distributed  # JAX has no public name for the key-value store

_POLL_S = 1.0  # how often a process looks whether another one has stopped
_FAREWELL_S = 5.0  # how long the first process stays, so that the others can read why
_MARK_S = 30.0  # network file systems show a new file late
_MAX_SILENT = 5  # answers of the store that may fail in a row before nobody is watched
_FAILED = "hstu_jax/failed/"
_ANSWER_MS = 5_000  # a wait for a key is cut into pieces, so that Ctrl-C is heard

_heartbeat_timeout_s = 0  # set by `start`
_is_over = threading.Event()  # all processes are done: nobody needs to be watched
_num_exchanges = 0  # of this process; equal on all, since all exchange in the same order


def count() -> int:
    """Number of processes of this run."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def index() -> int:
    """This process's number, from 0."""
    return distributed.global_state.process_id if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return index() == 0


def say(text: str) -> None:
    """Prints a line in the first process."""
    if is_first():
        print(text, flush=count() > 1)


def start(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    initialization_timeout_s: int,
    heartbeat_timeout_s: int,
) -> None:
    """Meets the other processes; before any use of a device.

    Args:
        coordinator_address: host:port of the first process; None, with the next two, leaves it to
            JAX to ask the launcher.
        num_processes: of the run.
        process_id: of this process, from 0.
        local_device_ids: devices of this host that are the process's own; None = as JAX chooses.
        initialization_timeout_s: how long to wait for the others.
        heartbeat_timeout_s: a process that is silent for so long is lost, and ends the others.

    Raises:
        ValueError: the coordinator cannot listen, or JAX does not find the launcher's addresses.
    """
    # JAX would catch SIGTERM, wait for a common step to stop at, and go on. A run is stopped by
    # ending it: the same command goes on from its checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    has_met = threading.Event()
    limit = threading.Thread(
        target=_end_if_alone, args=(has_met, initialization_timeout_s, coordinator_address)
    )
    limit.daemon = True
    limit.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids=local_device_ids,
            cluster_detection_method=None if coordinator_address is None else "deactivate",
            # JAX ends the process without a word of the cause; `_end_if_alone` comes before it.
            initialization_timeout=initialization_timeout_s + 30,
            heartbeat_timeout_seconds=heartbeat_timeout_s,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        where = "" if coordinator_address is None else f"={coordinator_address}"
        raise ValueError(
            f"coordinator_address{where}: the processes cannot meet ({error}); give "
            "--coordinator_address=HOST:PORT of the first process with a free port, "
            "--num_processes and --process_id, or --launcher=none for a run of its own."
        ) from error
    finally:
        has_met.set()
    if count() > 1:
        # JAX aborts a process when another one is lost: its message is not to be buried under the
        # stacks of all threads, which absl has switched on.
        faulthandler.enable(all_threads=False)
        global _heartbeat_timeout_s
        _heartbeat_timeout_s = heartbeat_timeout_s
        threading.Thread(target=_end_with_the_others, daemon=True).start()


def _end_if_alone(has_met: threading.Event, timeout_s: int, address: str | None) -> None:
    if has_met.wait(timeout_s):
        return
    where = f"--coordinator_address={address}" if address else "the launcher's first process"
    print(
        f"error: {where}: not all processes came within {timeout_s} s; see that every one is "
        "started, with the same address and number of processes, that the first one's host and "
        "port can be reached, and give --initialization_timeout_s more if they start slowly.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def exchange(topic: str, text: str) -> tuple[str, ...]:
    """The texts of all processes, in their order; every process must call it.

    Args:
        topic: what it is about; the same everywhere.
        text: this process's.
    """
    global _num_exchanges
    if count() == 1:
        return (text,)
    _num_exchanges += 1
    folder = f"hstu_jax/{_num_exchanges}/{topic}/"
    client = distributed.global_state.client
    client.key_value_set(f"{folder}{index()}", text)
    return tuple(_read(client, f"{folder}{number}") for number in range(count()))


def _read(client: Any, key: str) -> str:
    """Waits for a key without a limit: a process that is lost ends this one."""
    while True:
        try:
            return client.blocking_key_value_get(key, _ANSWER_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def wait_for_all(topic: str) -> None:
    """Returns when every process has come here."""
    exchange(topic, "")


def first_then_all(topic: str, action: Callable[[], None]) -> None:
    """Runs an action in the first process; the others go on when it is done."""
    if is_first():
        action()
    wait_for_all(topic)


def agree(topic: str, values: Mapping[str, str]) -> None:
    """Checks that every process has the same values.

    Args:
        topic: what they are about.
        values: name -> text; texts of several lines are compared line by line.

    Raises:
        ValueError: they differ; names the processes, and what they have beside the first one's.
    """
    if count() == 1:
        return
    hosts = exchange(f"{topic}/hosts", socket.gethostname())
    lines = []
    for name, text in values.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        if len(set(exchange(f"{topic}/digest of {name}", digest))) > 1:  # on every process alike
            lines += difference(name, exchange(f"{topic}/{name}", text), hosts)
    if lines:
        raise ValueError(
            "; ".join(lines) + ": every process must be started with the same command, on the same "
            "data and with the same packages; start them all again."
        )


def check_shared(folder: pathlib.Path) -> None:
    """Checks that a folder is the same one for all processes; makes it if it is missing.

    Raises:
        ValueError: a process does not see what the first one wrote; names it.
    """
    if count() == 1:
        return
    (token, *_) = exchange("token", secrets.token_hex(8))
    mark = folder / f".seen_by_all_{token}"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    wait_for_all("mark")
    seen = exchange("is seen", "yes" if comes_into_sight(mark) else socket.gethostname())
    if is_first():
        mark.unlink()
    missing = [f"{number} ({host})" for number, host in enumerate(seen) if host != "yes"]
    if missing:
        raise ValueError(
            f"workdir={str(folder)!r}: process {', '.join(missing[:5])} does not see what the "
            "first one wrote there; checkpoints need a folder that all hosts share."
        )


def comes_into_sight(path: pathlib.Path) -> bool:
    """Waits a while for what another process has written; returns whether it is there."""
    deadline = time.monotonic() + _MARK_S
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.2)
    return True


def difference(name: str, texts: Sequence[str], hosts: Sequence[str]) -> list[str]:
    """What sets processes apart from the first one, one line for each different text."""
    apart: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        if text != texts[0]:
            apart.setdefault(text, []).append(number)
    lines = []
    for text, numbers in apart.items():
        who = ", ".join(f"{number} ({hosts[number]})" for number in numbers[:5])
        more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
        lines.append(
            f"{name} of process {who}{more} differs from that of process 0 ({hosts[0]}): "
            f"{_changes(texts[0], text)}"
        )
    return lines


def _changes(first: str, other: str) -> str:
    old, new = first.splitlines(), other.splitlines()
    if len(old) <= 1 and len(new) <= 1:
        return f"{other!r}, not {first!r}"
    fields = [dict(line.partition(" = ")[::2] for line in lines) for lines in (old, new)]
    changed = [
        name for name in {**fields[0], **fields[1]} if fields[0].get(name) != fields[1].get(name)
    ]
    shown = ", ".join(
        f"{name}={fields[1].get(name, 'unset')}, not {fields[0].get(name, 'unset')}"
        for name in changed[:3]
    )
    return shown + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def versions() -> dict[str, str]:
    """What must be equal besides configuration and data, for `agree`."""
    packages = ("hstu_jax", "jax", "jaxlib", "numpy")
    return {f"version of {name}": importlib.metadata.version(name) for name in packages}


@contextlib.contextmanager
def ending_together(explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Ends all processes if one fails, and lets none leave before all are done.

    A process that fails says why, here and in the others, which stop too; all end with a status
    that is not 0. The block ends when every process has come to its end.

    Args:
        explain: the message of an error that is the user's to mend; None for others, which are
            printed with their traceback.
    """
    try:
        yield
        wait_for_all("end")
        _is_over.set()
    except BaseException as error:
        if count() == 1:
            raise
        message = explain(error) if isinstance(error, Exception) else type(error).__name__
        if message is None:
            traceback.print_exc()
            message = f"{type(error).__name__}: {error}"
        is_own = "RESOURCE_EXHAUSTED" in str(error)  # out of memory: no other one's doing
        if isinstance(error, jax.errors.JaxRuntimeError) and not is_own:
            # A collective fails when another process has ended. Whoever knows which ends this one
            # meanwhile: the thread below, or JAX, which names processes that are silent.
            print("error: waiting to hear whether another process is lost", file=sys.stderr)
            time.sleep(_heartbeat_timeout_s + 2 * _POLL_S)
        _give_up(message)


def _give_up(message: str) -> None:
    """Tells the others and ends this process at once.

    Not by `sys.exit`: JAX would then wait for processes that wait for this one in a collective.
    """
    who = f"process {index()} ({socket.gethostname()})"
    print(f"error: {who}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    with contextlib.suppress(Exception):  # the store may be gone with the first process
        client = distributed.global_state.client
        client.key_value_set(f"{_FAILED}{index()}", f"{who} stopped: {message}", True)
        if is_first():  # the store lives here
            deadline = time.monotonic() + _FAREWELL_S
            while len(client.key_value_dir_get(_FAILED)) < count() and time.monotonic() < deadline:
                time.sleep(0.1)
    os._exit(2)


def _end_with_the_others() -> None:
    """Body of the thread that ends this process when another one has failed."""
    client, mine = distributed.global_state.client, f"{_FAILED}{index()}"
    silent = 0
    while not _is_over.wait(_POLL_S):
        try:
            failed = client.key_value_dir_get(_FAILED)
        except Exception:  # noqa: BLE001 - late, or gone: then JAX's own thread ends us
            silent += 1
            if silent == _MAX_SILENT:
                return
            continue
        silent = 0
        causes = [text for key, text in failed if not key.endswith(mine) and text]
        if causes and not any(key.endswith(mine) for key, _ in failed):
            print(f"error: {causes[0]}", file=sys.stderr)
            print(f"error: process {index()} stops with it", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                client.key_value_set(mine, "", True)
            os._exit(2)
