"""What the processes of a training do together: begin, agree, and end."""

import json
import os
import secrets
import selectors
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from asymflow.errors import InputError

PATIENCE = timedelta(minutes=30)  # with a rank that lives but does not answer; one that died is noticed at once
KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, times: 35 s in all


class AgreedError(InputError):
    """An InputError that every rank raises alike: it is nobody's own."""


# ---- Beginning -------------------------------------------------------------------------------------------------------
def start_processes() -> torch.device:
    """Join the processes that `deepspeed`, `torchrun` or nobody started, and return the device of this one."""
    cuda = torch.cuda.is_available()
    backend = "nccl" if cuda else "gloo"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    try:
        if dist.is_initialized():
            pass
        elif not alone.keys() <= os.environ.keys():  # plain python
            os.environ.update(alone)
            dist.init_process_group(backend, f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        else:
            dist.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise InputError(f"the processes could not find each other: {str(e).splitlines()[0]}") from None
    if not cuda:
        return torch.device("cpu")
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= there:
        raise InputError(f"there are {there} GPUs here, too few for process {local + 1}: start no more than that")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


# ---- Agreeing --------------------------------------------------------------------------------------------------------
def together(action: Callable, failure: str = "") -> list:
    """Do it on every rank, and return what each returned. If one cannot, all raise AgreedError, and none waits."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, attempt(action))
    faults = [(rank, fault) for rank, (_, fault) in enumerate(everyone) if fault is not None]
    if faults:
        same = len(faults) == len(everyone) and len({fault for _, fault in faults}) == 1
        said = faults[0][1] if same else "; ".join(f"rank {rank}: {fault}" for rank, fault in faults)
        raise AgreedError(f"{failure}: {said}" if failure else said)
    return [value for value, _ in everyone]


def each(action: Callable, failure: str = ""):
    """Do it on every rank, and return what it returned on this one. If one cannot, all raise AgreedError."""
    value, fault = attempt(action)

    def again():
        if fault is not None:
            raise InputError(fault)

    together(again, failure)
    return value


def on_first(action: Callable, failure: str = ""):
    """Do it on rank 0 alone, and return on every rank what it returned there. Raises AgreedError as `together`."""
    done = [attempt(action) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(done)
    value, fault = done[0]
    if fault is not None:
        raise AgreedError(f"{failure}: {fault}" if failure else fault)
    return value


def attempt(action: Callable) -> tuple:
    """What it returns, and None; or None, and what went wrong outside of this program."""
    try:
        return action(), None
    except (InputError, OSError, SafetensorError) as e:
        return None, str(e)


# ---- Ending ----------------------------------------------------------------------------------------------------------
class Lifeline:
    """Ends all processes as soon as one of them fails or dies, and says why, once.

    Each process holds a connection to a thread of rank 0. A process that fails says so on it; of one that is killed,
    the kernel closes it. Either way rank 0 shows the first cause, and tells all others to end quietly, whatever they
    are waiting for: gloo would notice by itself that a process is gone, nccl only after minutes.
    """

    def __init__(self):
        self.rank, self.world, self.finished, self.connection = dist.get_rank(), dist.get_world_size(), False, None
        if self.world == 1:
            return
        server = listening(self.world) if self.rank == 0 else None
        told = [(server.getsockname()[1], secrets.token_hex(8)) if server else None]
        dist.broadcast_object_list(told)
        port, token = told[0]
        if server:
            threading.Thread(target=self.attend, args=(server, token), daemon=True).start()
        self.connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=60)
        keep_alive(self.connection)
        self.connection.sendall(f"{token} {self.rank}\n".encode())
        if self.rank > 0:
            threading.Thread(target=self.listen, daemon=True).start()

    def close(self) -> None:
        """To be called by every rank, when all has ended well."""
        self.finished = True
        if self.connection:
            dist.barrier()
            self.connection.sendall(b'{"done": true}\n')

    def fail(self, text: str, code: int) -> int:
        """End all processes with this text and exit code. Returns, with the code, only if there is no other process."""
        if self.connection is None:
            show(text)
            return code
        with suppress(OSError):  # rank 0 may have died
            self.connection.sendall(json.dumps({"text": text, "code": code}).encode() + b"\n")
            time.sleep(10)  # and be ended meanwhile
        leave(code, text)

    def listen(self) -> None:
        """On all ranks but the first: wait for the word to end."""
        word = read_line(self.connection)
        if word:
            leave(json.loads(word)["code"])
        if not self.finished:
            leave(1, died(0) if self.rank == 1 else "")

    def attend(self, server: socket.socket, token: str) -> None:
        """On rank 0: wait for the first that fails or dies."""
        watched, lines = selectors.DefaultSelector(), {}
        watched.register(server, selectors.EVENT_READ)
        while len(lines) < self.world or len(watched.get_map()) > 1:
            for key, _ in watched.select():
                if key.fileobj is server:
                    self.welcome(server, token, watched, lines)
                elif word := heard(watched, key):
                    show(first_cause(watched, word)["text"])
                    for rank, line in lines.items():
                        if rank > 0:
                            tell(line, word["code"])
                    leave(word["code"])

    def welcome(self, server: socket.socket, token: str, watched: selectors.BaseSelector, lines: dict) -> None:
        """Take the connection of a rank; others, which do not know the token, are turned away."""
        line, _ = server.accept()
        line.settimeout(10)
        said, _, rank = read_line(line).partition(" ")
        if secrets.compare_digest(said.encode(), token.encode()):
            keep_alive(line)
            lines[int(rank)] = line
            watched.register(line, selectors.EVENT_READ, int(rank))
        else:
            line.close()


def heard(watched: selectors.BaseSelector, key: selectors.SelectorKey) -> dict | None:
    """What a rank had to say, or that it died; None if it is done."""
    watched.unregister(key.fileobj)
    word = json.loads(read_line(key.fileobj) or "{}") or {"text": died(key.data), "code": 1, "died": True}
    return None if word.get("done") else word


def first_cause(watched: selectors.BaseSelector, word: dict) -> dict:
    """A rank that fails may only have noticed the death of another, of which the kernel is about to tell."""
    until = time.monotonic() + 0.5
    while not word.get("died") and (left := until - time.monotonic()) > 0:
        for key, _ in watched.select(left):
            if key.data is not None and (later := heard(watched, key)) and later.get("died"):
                return later
    return word


def listening(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def keep_alive(line: socket.socket) -> None:
    """Wait on it without end, but not for a machine that has lost its power."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def read_line(line: socket.socket) -> str:
    """The one word that comes on it; empty if it was closed without one."""
    read = bytearray()
    try:
        while not read.endswith(b"\n"):
            if not (more := line.recv(1 << 16)):
                return ""
            read += more
    except OSError:
        return ""
    return read.decode(errors="replace").strip()


def tell(line: socket.socket, code: int) -> None:
    with suppress(OSError):  # it may have died meanwhile
        line.sendall(json.dumps({"code": code}).encode() + b"\n")


def died(rank: int) -> str:
    return f"train_ddp.py: error: rank {rank} died without a word: was it killed, or out of memory?"


def show(text: str) -> None:
    if text:
        tqdm.write(text, file=sys.stderr)


def leave(code: int, text: str = "") -> None:
    show(text)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
