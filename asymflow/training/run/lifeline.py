"""The end of a training: all processes together, however one of them ends."""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress

import torch.distributed as dist
from tqdm import tqdm

KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, times: 35 s in all
DONE = b'{"done": true}\n'


class Lifeline:
    """Ends all processes as soon as one of them fails or dies, and says why, once.

    Each process holds a connection to a thread of rank 0. A process that fails says so on it; of one that is killed,
    the kernel closes it. Either way rank 0 shows the first cause, and tells all others to end quietly, whatever they
    are waiting for: gloo would notice by itself that a process is gone, nccl only after minutes. It needs no group and
    no GPU, so that it works before there are any.

    Launchers do not do this. Measured with two ranks, without it: if one raises or exits while the other is not in a
    collective, the other runs on for 30 seconds on the same machine (torchrun and deepspeed send SIGTERM, then
    SIGKILL), and without end on another machine, or if the ranks were started by hand. If one is killed, only the
    "connection closed" of the other is shown. An error that all ranks raise is shown by each.
    """

    def __init__(self, store: dist.Store):
        """Blocks until every rank is connected, so that none fails before all can be told."""
        self.rank, self.world, self.connection = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None
        if self.world == 1:
            return
        self.thread = threading.Thread(target=self.listen, daemon=True)
        if self.rank == 0:
            server, token = listening(self.world), secrets.token_hex(8)
            store.set("lifeline", f"{server.getsockname()[1]} {token}")
            self.thread = threading.Thread(target=self.attend, args=(server, token), daemon=True)
            self.thread.start()
        port, token = store.get("lifeline").decode().split()
        self.connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=60)
        keep_alive(self.connection)
        self.connection.sendall(f"{token} {self.rank}\n".encode())
        read_line(self.connection)  # the welcome
        if self.rank > 0:
            self.thread.start()

    def close(self) -> None:
        """To be called by every rank, when all has ended well. Returns when all have called it."""
        if self.connection:
            with suppress(OSError):  # rank 0 may have died, as the thread is about to say
                self.connection.sendall(DONE)
            self.thread.join()

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
        """On all ranks but the first: wait for the word to end, or that all are done."""
        word = json.loads(read_line(self.connection) or "{}")
        if not word:
            leave(1, died(0) if self.rank == 1 else "")
        if not word.get("done"):
            leave(word["code"])

    def attend(self, server: socket.socket, token: str) -> None:
        """On rank 0: wait for the first that fails or dies, or until all are done."""
        watched, lines = selectors.DefaultSelector(), {}
        watched.register(server, selectors.EVENT_READ)
        while len(lines) < self.world or len(watched.get_map()) > 1:
            for key, _ in watched.select():
                if key.fileobj is server:
                    self.welcome(server, token, watched, lines)
                    if len(lines) == self.world:
                        tell(lines, b"\n")
                elif word := heard(watched, key):
                    show(first_cause(watched, word)["text"])
                    tell(lines, json.dumps({"code": word["code"]}).encode() + b"\n")
                    leave(word["code"])
        tell(lines, DONE)

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
    """The next word that comes on it; empty if it was closed without one. Byte by byte: another may be behind it."""
    read = bytearray()
    try:
        while not read.endswith(b"\n"):
            if not (more := line.recv(1)):
                return ""
            read += more
    except OSError:
        return ""
    return read.decode(errors="replace").strip()


def tell(lines: dict[int, socket.socket], word: bytes) -> None:
    for line in lines.values():
        with suppress(OSError):  # one may have died meanwhile
            line.sendall(word)


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
