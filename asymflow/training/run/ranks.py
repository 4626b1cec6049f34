"""How the processes of a training find each other, and how they act together. How they end: see lifeline.py."""

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
from asymflow.text import count

PATIENCE = timedelta(minutes=30)  # timeout for a rank that hangs; a rank that dies is noticed at once

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # set by deepspeed and torchrun
SRUN_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # the same three, set by srun
WORLD_SIZE_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # set by srun or mpirun
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
trainings = itertools.count()


class AgreedError(InputError):
    """An InputError that all ranks raise, with the same text: the message need not say which rank shows it."""


# ---- Finding each other ----------------------------------------------------------------------------------------------
def resolve_rank() -> int:
    """The rank of this process. Sets RANK, WORLD_SIZE and LOCAL_RANK if srun, or no launcher, started it.

    Raises AgreedError if the environment says that there are other processes, but not which one this is: each of them
    would train alone, all in one folder.
    """
    env = os.environ
    sizes = {env[name] for name in WORLD_SIZE_VARIABLES if env.get(name, "1") != "1"}
    given = [name for name in RANK_VARIABLES if name in env]
    if len(given) < len(RANK_VARIABLES) and env.get("WORLD_SIZE") != "1":
        if sizes == {env.get("SLURM_STEP_NUM_TASKS")} and {*SRUN_VARIABLES, *RENDEZVOUS_VARIABLES} <= env.keys():
            env.update({name: env[theirs] for name, theirs in zip(RANK_VARIABLES, SRUN_VARIABLES, strict=True)})
        elif given or sizes:
            said = ", ".join(f"{name} {env[name]}" for name in (*RANK_VARIABLES, *WORLD_SIZE_VARIABLES) if name in env)
            raise AgreedError(
                f"the environment says {said}, so there may be others, but not which one this is: start with "
                f"deepspeed, torchrun, or srun with {' and '.join(RENDEZVOUS_VARIABLES)} set (or set WORLD_SIZE to 1 "
                "to train alone)"
            )
    for name, alone in zip(RANK_VARIABLES, "010", strict=True):
        env.setdefault(name, alone)
    if not all(env[name].isdecimal() for name in RANK_VARIABLES) or int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        said = ", ".join(f"{name} {env[name]}" for name in RANK_VARIABLES)
        raise AgreedError(f"the environment says {said}, which cannot be: unset them, or start with torchrun")
    return int(env["RANK"])


def open_store() -> dist.Store:
    """A key-value store that all processes share; it works before there is a process group. Empty for each training."""
    return dist.PrefixStore(f"training{next(trainings)}", rendezvous_store())


@cache  # one for all trainings of this process, since it has one address
def rendezvous_store() -> dist.Store:
    if os.environ["WORLD_SIZE"] == "1":
        return dist.HashStore()
    with rendezvous_errors():
        return next(dist.rendezvous("env://", timeout=PATIENCE))[0]


@contextmanager
def rendezvous_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise InputError(f"the processes could not find each other: {str(e).splitlines()[0]}") from None


def join_group(store: dist.Store) -> torch.device:
    """Join the process group of all ranks, and return the device of this rank.

    Raises InputError, on this rank alone, if it has no GPU of its own or other hardware than rank 0: the Lifeline then
    ends the other ranks.
    """
    rank, world, local = (int(os.environ[name]) for name in RANK_VARIABLES)
    cuda, there = torch.cuda.is_available(), torch.cuda.device_count()
    if cuda and local >= there:
        raise InputError(
            f"process {local + 1} of this machine sees {count(there, 'GPU')}: start one for each GPU, and let all see "
            "all of them (srun: --gpus-per-node, not --gpus-per-task)"
        )
    backend = "nccl" if cuda else "gloo"
    if rank == 0:
        store.set("backend", backend)
    elif store.get("backend").decode() != backend:
        raise InputError(f"there is {'a' if cuda else 'no'} GPU here, but {'none' if cuda else 'one'} where rank 0 is")
    if cuda:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        # The default, not an argument: DeepSpeed makes groups of its own, and they need this timeout too.
        dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = PATIENCE
        with rendezvous_errors():
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    if not cuda and world > 1 and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, deepspeed does not
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
        torch.set_num_threads(max(1, torch.get_num_threads() // here))  # those of all processes share the cores
    return torch.device("cuda", local) if cuda else torch.device("cpu")


# ---- Acting together -------------------------------------------------------------------------------------------------
# All ranks must call these functions, in the same order. Each waits until `action` has succeeded or failed on every
# rank that runs it. If it failed on any (with an InputError, an OSError or a damaged safetensors file), all ranks raise
# an AgreedError with the same text: `failure`, then what went wrong. So no rank goes on alone and waits for the others.
def all_or_raise(action: Callable, failure: str = ""):
    """Every rank runs `action` and gets its own result; if it fails on one rank, all raise AgreedError."""
    value, fault = attempt(action)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, fault)
    faults = [(rank, fault) for rank, fault in enumerate(everyone) if fault is not None]
    if faults:
        same = len(faults) == len(everyone) and len({fault for _, fault in faults}) == 1
        said = faults[0][1] if same else "; ".join(f"rank {rank}: {fault}" for rank, fault in faults)
        raise AgreedError(f"{failure}: {said}" if failure else said)
    return value


def gather(action: Callable, failure: str = "") -> list:
    """Every rank runs `action` and gets the results of all, in the order of the ranks. They must be picklable."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, all_or_raise(action, failure))
    return everyone


def rank0_only(action: Callable, failure: str = ""):
    """Only rank 0 runs `action` and gets its result; the others wait for it and get None."""
    value, fault = attempt(action) if dist.get_rank() == 0 else (None, None)
    told = [fault]
    dist.broadcast_object_list(told)
    if told[0] is not None:
        raise AgreedError(f"{failure}: {told[0]}" if failure else told[0])
    return value


def rank0_broadcast(action: Callable, failure: str = ""):
    """Only rank 0 runs `action`; the others wait, and all get its result. It must be picklable."""
    told = [rank0_only(action, failure)]
    dist.broadcast_object_list(told)
    return told[0]


def attempt(action: Callable) -> tuple:
    """(result, None), or (None, message) after an error of the user or the system. Bugs are raised as they are."""
    try:
        return action(), None
    except (InputError, OSError, SafetensorError) as e:
        return None, str(e)
