"""How the processes of a training find each other, agree, and end: what a launcher says, and what goes wrong early."""

import multiprocessing.util
import os
import threading
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from image_data import pixels, png, write_tar
from processes import Launched, metrics, same_bits, words
from ways_to_end import one_line, this_rank

from asymflow import opening
from asymflow.errors import InputError
from asymflow.subspace import Subspace
from asymflow.training import start
from asymflow.training.config.reading import load_config
from asymflow.training.run.ranks import AgreedError, all_or_raise, gather, rank0_broadcast, rank0_only, resolve_rank
from asymflow.training.start import initial_subspace, load_subspace, make_flow

NAMES = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"),
}
MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
BATCH = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # what sbatch says in its script
STEP = {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}  # and srun


def replace(name, function):
    """In a rank, `function` takes the place of `start.NAME`."""
    from asymflow.training import start

    setattr(start, name, function)


# ---- What the environment says ---------------------------------------------------------------------------------------
def place(monkeypatch, environment):
    with monkeypatch.context() as m:
        m.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in NAMES} | environment)
        rank = resolve_rank()
        assert os.environ["RANK"] == str(rank)
        return rank, int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        (BATCH, (0, 1, 0)),
        (BATCH | MEETING, (0, 1, 0)),
        (BATCH | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),  # the shell of salloc
        (STEP | MEETING, (5, 8, 1)),
        (STEP | MEETING | {"PMI_SIZE": "8"}, (5, 8, 1)),  # srun --mpi=pmi2
        (STEP | MEETING | {"WORLD_SIZE": "8"}, (5, 8, 1)),  # as many scripts for sbatch set it
        (STEP | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (1, 2, 0)),  # srun torchrun
        (STEP | {"WORLD_SIZE": "1"}, (0, 1, 0)),
    ],
)
def test_a_process_knows_its_rank(monkeypatch, environment, expected):
    assert place(monkeypatch, environment) == expected


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK 0, WORLD_SIZE 2"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK 1"),
        ({"RANK": "1"}, "RANK 1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE 2"),
        ({"PMI_SIZE": "2"} | MEETING, "PMI_SIZE 2"),
        (STEP, "SLURM_STEP_NUM_TASKS 8"),
        (STEP | {"OMPI_COMM_WORLD_SIZE": "16"} | MEETING, "OMPI_COMM_WORLD_SIZE 16"),  # mpirun, which uses srun
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK 2, WORLD_SIZE 2"),
        ({"RANK": "first", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK first"),
    ],
)
def test_one_of_many_that_does_not_know_which_is_refused(monkeypatch, environment, said):
    with pytest.raises(AgreedError, match=f"the environment says .*{said}.*torchrun"):
        place(monkeypatch, environment)


def only(environment, rank_name=None):
    """Of what the launcher has said, the process keeps this alone; and its rank, by another name."""
    rank = os.environ["RANK"]
    for name in NAMES & os.environ.keys() - MEETING.keys():
        del os.environ[name]
    os.environ.update(environment | ({rank_name: rank, "SLURM_LOCALID": rank} if rank_name else {}))


def by_srun_with_patience(minutes):
    """Started by srun. Each rank says in the end how long the groups of processes wait for one that does not answer."""
    from asymflow.training.loop import Training
    from asymflow.training.run import ranks

    only({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID")
    ranks.PATIENCE, fit = timedelta(minutes=minutes), Training.fit

    def replaced(self):
        stopped_by = fit(self)
        for group in dist.distributed_c10d._world.pg_map:
            print("patience", group._get_backend(torch.device("cpu")).options._timeout)
        return stopped_by

    Training.fit = replaced


@pytest.mark.slow
def test_srun_trains_one_model_and_all_groups_are_as_patient(tmp_path):
    launched = Launched(2, tmp_path / "run", "train.steps=1", patch=partial(by_srun_with_patience, 17))
    assert launched.wait() == [0, 0], launched.said()
    assert len(metrics(tmp_path / "run")) == 1
    said = [line for line in launched.said("out") if line.startswith("patience")]
    assert len(said) > 2  # also those of DeepSpeed
    assert set(said) == {"patience 0:17:00"}


@pytest.mark.slow
def test_mpirun_trains_nothing(tmp_path):
    launched = Launched(2, tmp_path / "run", patch=partial(only, {"OMPI_COMM_WORLD_SIZE": "2"}))
    assert launched.wait() == [2, 2]
    first, other = launched.said()
    assert first == other
    assert first.startswith("train_ddp.py: error: the environment says OMPI_COMM_WORLD_SIZE 2")
    assert not (tmp_path / "run").exists()


# ---- Before there is a group -----------------------------------------------------------------------------------------
def gpus(rank, count):
    """One rank sees GPUs, so many, and takes its time to use one; others see none."""
    if this_rank() == rank:
        torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: count
        torch.cuda.set_device = lambda device: time.sleep(1000)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_with_too_few_gpus_ends_all(tmp_path, rank):
    launched = Launched(3, tmp_path / "run", "train.global_batch_size=9", patch=partial(gpus, rank, rank))
    one_line(launched, f"rank {rank}: process {rank + 1} of this machine sees {('0 GPUs', '1 GPU')[rank]}:")


def test_a_machine_with_other_hardware_ends_all(tmp_path):
    one_line(Launched(2, tmp_path / "run", patch=partial(gpus, 1, 2)), "rank 1: there is a GPU here, but none where")
    one_line(Launched(2, tmp_path / "run", patch=partial(gpus, 0, 1)), "there is no GPU here, but one where rank 0 is")


def say_threads(given):
    """Threads are as on a machine of six cores, with OMP_NUM_THREADS as given. They are said, then it ends."""

    def end(args, device):
        raise InputError(f"{torch.get_num_threads()} threads")

    torch.set_num_threads(6)
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ |= {"OMP_NUM_THREADS": given} if given else {}
    replace("build", end)


@pytest.mark.parametrize(("ranks", "given", "used"), [(2, "", 3), (2, "4", 6), (1, "", 6), (3, "", 2)])
def test_processes_of_a_cpu_do_not_get_in_each_others_way(tmp_path, ranks, given, used):
    one_line(Launched(ranks, tmp_path / "run", patch=partial(say_threads, given)), f"{used} threads")


# ---- Acting together -------------------------------------------------------------------------------------------------
def refuse(rank):
    if rank in (None, dist.get_rank()):
        raise InputError("no")


def act_together(args, device):
    rank = dist.get_rank()
    lock = threading.Lock()  # which cannot be pickled
    assert all_or_raise(lambda: lock) is lock
    assert gather(lambda: 10 * rank) == [0, 10]
    assert rank0_only(lambda: lock) is (lock if rank == 0 else None)
    assert rank0_broadcast(lambda: 10 * rank + 1) == 1
    for function in (all_or_raise, gather):
        with pytest.raises(AgreedError, match=r"^this: rank 1: no$"):
            function(lambda: refuse(1), "this")
        with pytest.raises(AgreedError, match=r"^no$"):
            function(lambda: refuse(None))
    for function in (rank0_only, rank0_broadcast):
        with pytest.raises(AgreedError, match=r"^this: no$"):
            function(lambda: refuse(0), "this")
        assert function(lambda: refuse(1)) is None
    raise AgreedError("all is as it should be")


def test_who_runs_an_action_who_gets_its_result_and_who_raises(tmp_path):
    one_line(Launched(2, tmp_path / "run", patch=partial(replace, "build", act_together)), "all is as it should be")


def own_folders(folders):
    """Each rank is in a folder of its own, as if on a machine of its own. Only rank 0 can read the headers of tars."""
    from asymflow.data import shards

    os.chdir(folders / str(this_rank()))
    os.environ["LOCAL_RANK"] = "0"
    if this_rank() > 0:
        shards.tar_entries = None


def test_one_rank_reads_the_headers_and_none_begins_with_other_shards(tmp_path):
    for rank in range(2):
        write_tar(tmp_path / f"{rank}/0.tar", [("0.png", png(pixels(0))), ("0.cls", b"0")])
        write_tar(tmp_path / f"{rank}/1.tar", [("1.png", png(pixels(rank))), ("1.cls", b"1")])
    settings = ("data.kind=webdataset", "data.path=.", "train.global_batch_size=2", "model.num_classes=2")
    launched = Launched(2, tmp_path / "run", *settings, patch=partial(own_folders, tmp_path))
    one_line(launched, "error: rank 1: 1.tar is another file here than where the data was listed: give all machines")
    assert [path.name for path in sorted(tmp_path.rglob("*.npz"))] == ["0.index.npz", "1.index.npz"]
    assert all(path.parent.name == "0" for path in tmp_path.rglob("*.npz"))
    assert not (tmp_path / "run").exists()


# ---- Ending ----------------------------------------------------------------------------------------------------------
def ends(rank, args, device):
    """One rank dies when all is done but the end, and others wait for it, as nccl would, without noticing."""
    dist.barrier = lambda *args, **options: time.sleep(1000)

    def fit():
        if dist.get_rank() == rank:
            time.sleep(1)  # until the other waits, which makes no difference
            os._exit(7)

    return SimpleNamespace(fit=fit)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_in_the_end_ends_the_others(tmp_path, rank):
    launched = Launched(2, tmp_path / "run", patch=partial(replace, "build", partial(ends, rank)))
    codes = launched.wait()
    assert (codes[rank], codes[1 - rank]) == (7, 1)
    (said,) = launched.said()
    assert said.startswith(f"train_ddp.py: error: rank {rank} died without a word")


def fails_to_build(args, device):
    raise InputError("no")


def says_whether_there_is_a_group():
    """When the process ends, after `main`."""
    replace("build", fails_to_build)
    multiprocessing.util.Finalize(None, lambda: print("a group:", dist.is_initialized(), flush=True), exitpriority=1)


def test_a_process_that_is_alone_leaves_no_group_behind_when_it_fails(tmp_path):
    launched = Launched(1, tmp_path / "run", patch=says_whether_there_is_a_group)
    one_line(launched, "train_ddp.py: error: no")
    assert launched.said("out") == ["a group: False"]


# ---- The subspace ----------------------------------------------------------------------------------------------------
def up_to_the_subspace(checkpoint=None):
    """No further, and after `checkpoint`, as if it were one."""
    from asymflow.training.run import folder as run

    def that_far(*_):
        raise AgreedError("that far")

    replace("make_flow", that_far)
    if checkpoint:
        run.checkpoint_to_resume = lambda out, resume: (checkpoint, [])
    run.check_resume = lambda *_: None


def test_a_subspace_that_the_configuration_does_not_speak_of(tmp_path):
    def begin(name, setting, resume="auto", **patch):
        arguments = [*words(tmp_path / name, setting), "--resume", str(resume)]
        return Launched(1, arguments=arguments, patch=partial(up_to_the_subspace, **patch))

    file, other, large = (tmp_path / f"{name}.safetensors" for name in ("forty", "other", "large"))
    Subspace.random(192, 40, patch_size=8, token_order="channel_last").save(file)
    Subspace.random(192, 40, patch_size=8, token_order="channel_first").save(other)
    Subspace.random(768, 40, patch_size=16).save(large)
    for rank in ("0", "full"):
        one_line(begin("new", f"subspace={{rank: {rank}, file: {file}}}"), "the rank 40", f"subspace.rank is {rank}")
    one_line(begin("new", f"subspace={{rank: 40, file: {large}}}"), "dimension 768, of patches of 16", "3 x 8 x 8")
    one_line(begin("new", f"subspace={{rank: 40, file: {other}}}"), "channel_first tokens")
    one_line(begin("forty", f"subspace={{rank: auto, file: {file}}}"), "that far")
    whole = tmp_path / "forty" / "checkpoints" / "00000001"
    one_line(begin("new", "subspace.rank=0", whole), "forty/subspace.safetensors has the rank 40")
    assert not (tmp_path / "new").exists()
    one_line(begin("new", "subspace.rank=40", whole, checkpoint=whole), "that far")
    assert same_bits(*(opening.read_tensors(tmp_path / name / "subspace.safetensors")[0] for name in ("forty", "new")))
    file.unlink()  # the run has its own
    one_line(begin("forty", f"subspace={{rank: auto, file: {file}}}"), "that far")
    (tmp_path / "forty" / "subspace.safetensors").unlink()
    one_line(begin("third", "subspace.rank=40", whole, checkpoint=whole), "forty/subspace.safetensors is missing")


@pytest.mark.parametrize("color", [None, "rgb", "oklab"])
def test_a_training_from_scratch_takes_no_subspace_of_another_colour_space(tmp_path, color):
    """Its images are RGB, and what samples them would take them for Oklab. An objective of one's own may convert."""
    file = tmp_path / "subspace.safetensors"
    Subspace.random(48, 8, patch_size=4, color_space=color).save(file)
    usual, own = (load_config("shapes_tiny", ["subspace.rank=8", *more]) for more in ([], ["loss.objective=my:Own"]))
    assert load_subspace(file, own).color_space == color
    if color != "oklab":
        assert load_subspace(file, usual).color_space == color
    else:
        with pytest.raises(InputError, match=r"subspace\.safetensors is for tokens in oklab, .* --color rgb$"):
            load_subspace(file, usual)


@pytest.mark.parametrize("name", ["shapes_tiny", "asymflux2_tiny"])
def test_a_file_is_the_subspace_that_a_run_began_with_or_gone(tmp_path, name):
    finetune = name == "asymflux2_tiny"
    key = "finetune.subspace" if finetune else "subspace.file"
    about = dict(token_order="channel_first", color_space="oklab") if finetune else {}
    one, other = (Subspace.random(48, 8, seed=seed, patch_size=4, **about) for seed in (0, 1))
    more = ["finetune.base=base"] if finetune else ["subspace.rank=8"]
    config = load_config(name, [f"{key}={tmp_path / 'file'}", "data.path=data", *more])
    run, old = tmp_path / "run", tmp_path / "old"
    resumed = {"auto": run, str(old / "checkpoints" / "00000001"): old}
    for copy in ("run", "old"):
        (tmp_path / copy).mkdir()
    for resume, place in resumed.items():
        one.save(place / "subspace.safetensors")
        one.save(tmp_path / "file")
        found = initial_subspace(config, run, resume)
        assert found is None if place == run else torch.equal(found.basis, one.basis)
        (tmp_path / "file").unlink()
        other.save(tmp_path / "file")
        with pytest.raises(InputError, match=rf"another subspace than {place}/subspace.safetensors"):
            initial_subspace(config, run, resume)
        (tmp_path / "file").unlink()
        if place == run:
            assert initial_subspace(config, run, resume) is None
        (place / "subspace.safetensors").unlink()


def test_the_full_rank_is_the_same_model_in_every_basis():
    """u-prediction: P is the identity. It begins with the network as it is usually initialized."""
    config = load_config("shapes_tiny")
    patch = int(config.model.size.split("/")[1])
    dim = 3 * patch**2
    flows = []
    for subspace in (Subspace.full(dim, patch_size=patch), Subspace.random(dim, dim, patch_size=patch)):
        torch.manual_seed(0)
        flows.append(make_flow(config, subspace))
    for one, other in zip(flows[0].parameters(), flows[1].parameters(), strict=True):
        assert torch.equal(one, other)
    torch.manual_seed(0)
    rank_8 = make_flow(config, Subspace.random(dim, 8, patch_size=patch))
    weight, usual = (flow.backbone.x_embedder.proj1.weight for flow in (rank_8, flows[0]))
    assert not torch.equal(weight[:8], usual[:8])
    assert torch.equal(weight[8:], usual[8:])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 TiB"), MemoryError("Unable to allocate")]
)
def test_too_little_memory_is_one_line_that_says_what_takes_less(error):
    text, code = start.error_message(error, 0, "the same command")
    assert code == 1
    assert text.startswith("train_ddp.py: error: ")
    assert "too little memory: " in text
    assert "train.micro_batch_size" in text
    assert "\n" not in text
    assert "too little memory" not in start.error_message(RuntimeError("something else"), 0, "the same command")[0]
