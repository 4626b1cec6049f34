"""What the processes of a training do together: begin, and agree. How they end: see lifeline.py."""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from asymflow.errors import InputError

PATIENCE = timedelta(minutes=30)  # with a rank that lives but does not answer; one that died is noticed at once

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # of a process, as deepspeed and torchrun say it in the environment
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # the same as srun says it, but no other part of Slurm
SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # how many were started, by srun or an mpirun
MEETING = ("MASTER_ADDR", "MASTER_PORT")
meetings = itertools.count()


class AgreedError(InputError):
    """An InputError that every rank raises alike: it is nobody's own."""


# ---- Beginning -------------------------------------------------------------------------------------------------------
def take_place() -> int:
    """Which of the processes this is. Afterwards the environment says so, also if srun or nobody started it.

    Raises AgreedError if there are others, but no telling which of them this is: each would train alone, all in one
    folder.
    """
    env = os.environ
    sizes = {env[name] for name in SIZES if env.get(name, "1") != "1"}
    given = [name for name in PLACE if name in env]
    if len(given) < len(PLACE) and env.get("WORLD_SIZE") != "1":
        if sizes == {env.get("SLURM_STEP_NUM_TASKS")} and {*SRUN, *MEETING} <= env.keys():
            env.update({name: env[theirs] for name, theirs in zip(PLACE, SRUN, strict=True)})
        elif given or sizes:
            said = ", ".join(f"{name} {env[name]}" for name in (*PLACE, *SIZES) if name in env)
            raise AgreedError(
                f"the environment says {said}, so there may be others, but not which one this is: start with "
                f"deepspeed, torchrun, or srun with {' and '.join(MEETING)} set (or set WORLD_SIZE to 1 to train alone)"
            )
    for name, alone in zip(PLACE, "010", strict=True):
        env.setdefault(name, alone)
    if not all(env[name].isdecimal() for name in PLACE) or int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        said = ", ".join(f"{name} {env[name]}" for name in PLACE)
        raise AgreedError(f"the environment says {said}, which cannot be: unset them, or start with torchrun")
    return int(env["RANK"])


def meet() -> dist.Store:
    """Where the processes that `deepspeed`, `torchrun`, srun or nobody started leave word before they are a group."""
    return dist.PrefixStore(f"training{next(meetings)}", meeting_place())


@cache  # it is one address for as long as the process lives
def meeting_place() -> dist.Store:
    if os.environ["WORLD_SIZE"] == "1":
        return dist.HashStore()
    with meeting_others():
        return next(dist.rendezvous("env://", timeout=PATIENCE))[0]


@contextmanager
def meeting_others() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise InputError(f"the processes could not find each other: {str(e).splitlines()[0]}") from None


def join(store: dist.Store) -> torch.device:
    """Make all processes a group, and return the device of this one.

    Raises InputError if there is none for it, which the others hear of by the Lifeline.
    """
    rank, world, local = (int(os.environ[name]) for name in PLACE)
    cuda, there = torch.cuda.is_available(), torch.cuda.device_count()
    if cuda and local >= there:
        raise InputError(
            f"process {local + 1} of this machine sees {there} GPUs: start one for each GPU, and let all see all "
            "of them (srun: --gpus-per-node, not --gpus-per-task)"
        )
    backend = "nccl" if cuda else "gloo"
    if rank == 0:
        store.set("backend", backend)
    elif store.get("backend").decode() != backend:
        raise InputError(f"there is {'a' if cuda else 'no'} GPU here, but {'none' if cuda else 'one'} where rank 0 is")
    if cuda:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        # Not an argument: it is to hold for the groups that DeepSpeed makes, too.
        dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = PATIENCE
        with meeting_others():
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return torch.device("cuda", local) if cuda else torch.device("cpu")


# ---- Agreeing --------------------------------------------------------------------------------------------------------
def each(action: Callable, failure: str = ""):
    """Do it on every rank, and return what it returned on this one. If one cannot, all raise AgreedError."""
    value, fault = attempt(action)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fault)
    faults = [(rank, fault) for rank, fault in enumerate(everyone) if fault is not None]
    if faults:
        same = len(faults) == len(everyone) and len({fault for _, fault in faults}) == 1
        said = faults[0][1] if same else "; ".join(f"rank {rank}: {fault}" for rank, fault in faults)
        raise AgreedError(f"{failure}: {said}" if failure else said)
    return value


def together(action: Callable, failure: str = "") -> list:
    """As `each`, but return what it returned on all ranks, in their order; it has to be pickled."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, each(action, failure))
    return everyone


def only_first(action: Callable, failure: str = ""):
    """Do it on rank 0 alone, and return there what it returned, and None elsewhere. Raises AgreedError as `each`."""
    value, fault = attempt(action) if dist.get_rank() == 0 else (None, None)
    told = [fault]
    dist.broadcast_object_list(told)
    if told[0] is not None:
        raise AgreedError(f"{failure}: {told[0]}" if failure else told[0])
    return value


def on_first(action: Callable, failure: str = ""):
    """As `only_first`, but return on every rank what it returned there; it has to be pickled."""
    told = [only_first(action, failure)]
    dist.broadcast_object_list(told)
    return told[0]


def attempt(action: Callable) -> tuple:
    """What it returns, and None; or None, and what went wrong outside of this program."""
    try:
        return action(), None
    except (InputError, OSError, SafetensorError) as e:
        return None, str(e)
