"""Several processes for one command: started here (``--devices``), or by torchrun, whose variables these are.

Each process works on its own share of the data; torchmetrics adds the counts up. Only rank 0 speaks and writes.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .cli import one_line
from .errors import InputError

GRACE = 5.0  # seconds that rank 0 has to say itself what went wrong
LOST = 75  # the status of a process that ended because another one did
LAUNCHED = "PMPSEG_LAUNCHED"  # in the environment of what ``launch`` started
# Of what torch.distributed raises when another process is gone.
GONE = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")


def launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def launch(module: str, args: Sequence[str], count: int) -> None:
    """Runs ``python -m module args`` in ``count`` processes on this machine and waits for all of them.

    The output is that of rank 0. Raises InputError with the last line of what another one said, if that one failed first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCHED: 1}
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    with tempfile.TemporaryDirectory() as folder, _ended_by_sigterm():
        processes = []
        for rank in range(count):
            of_rank = {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            said = None if rank == 0 else open(f"{folder}/{rank}", "w")  # noqa: SIM115
            command = [sys.executable, "-m", module, *args]
            processes.append(subprocess.Popen(command, env=os.environ | threads | of_rank, stdout=said, stderr=said))
        try:
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if failed:
            with open(f"{folder}/{failed}") as file:
                lines = file.read().strip().splitlines()
            status = processes[failed].returncode
            reason = one_line(lines[-1]).removeprefix("pmpseg: error: ") if lines and status > 0 else _ending(status)
            raise InputError(f"process {failed} of {count} failed: {reason}")
    status = processes[0].returncode
    if status < 0 or status == LOST:
        raise InputError(f"process 0 of {count} failed: {_ending(status) if status < 0 else 'another one was lost'}")
    if status:
        sys.exit(status)  # it has said why


def _wait(processes: list[subprocess.Popen]) -> int:
    """The first rank other than 0 that failed by itself, and not because another one did; 0 if there is none."""
    deadline = None
    while True:
        states = [process.poll() for process in processes]
        wrong = [rank for rank, state in enumerate(states) if rank and state and state != LOST]
        if all(state == 0 for state in states) or states[0] not in (None, 0, LOST):
            return 0
        if wrong and states[0] is not None:
            return wrong[0]
        if any(states):  # rank 0 may say itself what is wrong, and who was only waiting may be first to end
            deadline = deadline or time.monotonic() + GRACE
            if time.monotonic() > deadline:
                return wrong[0] if wrong else 0
        time.sleep(0.05)


def _ending(status: int) -> str:
    return f"it was ended by signal {-status}, which may mean that memory ran out" if status < 0 else f"status {status}"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM becomes SystemExit, so that what was started here is ended, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def together(device: str) -> Iterator[tuple[int, str]]:
    """Joins the processes that a launcher started, if one did: rank and device of this one."""
    if not launched():
        yield 0, device
        return
    import torch

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} on this machine has no GPU: there are {torch.cuda.device_count()}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield rank, device
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in GONE):
            raise
        if LAUNCHED in os.environ:  # the other one's words are told by ``launch``
            sys.exit(LOST)
        raise InputError("another process of this evaluation ended early: see what it said") from error
    finally:
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that speaks and writes."""
    import torch

    return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or torch.distributed.get_rank() == 0


def of_all(value: Any) -> list[Any]:
    """What each process has, in the order of ranks."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
