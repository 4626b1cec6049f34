"""Single steps of a training in this process: what they keep, wait for and say."""

import gc
import io
import json
import math
import os
import re
import signal
import sys
import time
import weakref
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from processes import environment_of, metrics, same_bits, tensors, words
from test_repa import save_dinov2

from asymflow.averages import Profile
from asymflow.backbones.jit import Block
from asymflow.bench import worker
from asymflow.errors import InputError
from asymflow.pictures import GRID_WIDTH, image_grid
from asymflow.training import loop
from asymflow.training.loader import Batches
from asymflow.training.loop import Training
from asymflow.training.objectives.class_conditional import ClassConditional
from asymflow.training.run.ranks import AgreedError, join_group, open_store, resolve_rank
from asymflow.training.start import build, parse
from asymflow.training.zero.internals import held_part
from asymflow.training.zero.shards import held_fragments


@pytest.fixture(scope="module")
def device():
    """That of a group of this process alone."""
    before, linear = dict(os.environ), torch.nn.functional.linear
    os.environ.update(environment_of(1))
    resolve_rank()
    yield join_group(open_store())
    dist.destroy_process_group()
    torch.nn.functional.linear = linear  # which ZeRO-3 replaces, for all of a process
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def training(device, tmp_path):
    """Makes a Training, with the settings `a.b=c` on top of TINY."""

    def make(*settings, out="run", resume="auto"):
        return build(parse([*words(tmp_path / out, "data.workers=0", *settings), "--resume", str(resume)]), device)

    return make


def stage(number, kind=""):
    half = ["train.precision=bf16", "deepspeed.bf16.enabled=true"]
    more = {
        "bf16": half,
        "float32 sums": [*half, "deepspeed.data_types={grad_accum_dtype: fp32}"],
        "offload": ["deepspeed.zero_optimization.offload_optimizer={device: cpu}"],
    }
    return [f"deepspeed.zero_optimization.stage={number}", *more.get(kind, [])]


# ---- Not finite ------------------------------------------------------------------------------------------------------
def bad_gradients(patch, factors):
    """The gradient of these samples is multiplied by something that is not finite; their loss stays."""
    losses = ClassConditional.losses

    def replaced(self, model, batch):
        value = losses(self, model, batch)
        for sample in factors.keys() & set(batch.samples):
            value.register_hook(lambda gradient, factor=factors[sample]: gradient * factor)
        return value

    patch.setattr(ClassConditional, "losses", replaced)


def without_steps(patch, first, count):
    """The data of these steps is never seen."""
    get = Batches.__getitem__
    later = lambda self, k: k + count * self.accumulation * (k >= first * self.accumulation)
    patch.setattr(Batches, "__getitem__", lambda self, k: get(self, later(self, k)))


def counts_of_adam(one):
    return {int(f.state["step"]) for f in held_fragments(one.engine)}


FURTHER = [*product((1, 2), ["float32 sums"]), (2, "offload")]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        pytest.param(*case, marks=[] if case in ((0, ""),) else pytest.mark.slow)
        for case in [*product(range(4), ("", "bf16")), *FURTHER]
    ],
)
def test_a_gradient_that_is_not_finite_leaves_no_trace(training, tmp_path, monkeypatch, capfd, number, kind):
    """Weights and moments are those of a training that never saw the data of steps 3 and 4; so is the way on."""
    settings = [
        *stage(number, kind),
        "checkpoint={every: 1, keep_last: 9}",
        "train.micro_batch_size=4",
        "train.skip_nonfinite=2",
        "deepspeed.gradient_clipping=0.1",
    ]
    with monkeypatch.context() as patch:
        bad_gradients(patch, {8 * 2 + 1: math.nan, 8 * 3 + 5: math.inf})
        skipping = training(*settings, "train.steps=6", out="skipping")
        skipping.fit()
        fourth = tmp_path / "skipping" / "checkpoints" / "00000004"
        resumed = training(*settings, "train.steps=6", out="resumed", resume=fourth)
        assert counts_of_adam(resumed) == {2}
        resumed.fit()
    without_steps(monkeypatch, 2, 2)
    without = training(*settings, "train.steps=4", out="without")
    without.fit()
    assert counts_of_adam(skipping) == counts_of_adam(resumed) == counts_of_adam(without) == {4}
    said = [line for line in capfd.readouterr().err.splitlines() if "not finite" in line]
    assert said == [f"the gradient of step {n} is not finite: skipped, {n - 2} of 2" for n in (3, 4)]

    states, expected = {n: tensors(tmp_path / "skipping", n) for n in (2, 3, 4, 6)}, tensors(tmp_path / "without", 4)
    for key in (key for key in expected if not key[0].startswith("ema")):
        assert torch.equal(states[2][key], states[3][key]), key
        assert torch.equal(states[2][key], states[4][key]), key
        assert torch.equal(states[6][key], expected[key]), key
    assert same_bits(states[6], tensors(tmp_path / "resumed", 6))
    for (kind, name), value in states[3].items():  # the averages go on, with the weights as they are
        if kind == "ema-0.5":
            share = Profile(decay=0.5).share_at(3)
            assert torch.equal(value, torch.lerp(states[2][kind, name], states[2]["weights", name], share))
    taken = metrics(tmp_path / "skipping")
    assert [m["grad_norm"] for m in taken[2:4]] == [None, None]
    assert all(math.isfinite(m["loss"]) for m in taken)
    numbers = lambda entries: [(m["loss"], m["grad_norm"]) for m in entries]
    assert numbers(taken[:2] + taken[4:]) == numbers(metrics(tmp_path / "without"))
    assert numbers(taken[4:]) == numbers(metrics(tmp_path / "resumed"))


# ---- Waiting ---------------------------------------------------------------------------------------------------------
WAITS = ("item", "tolist", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
# What makes batches: in this test, without a worker.
BY_WORKERS = ("asymflow.data.", "asymflow.training.loader", "asymflow.streams")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")


@pytest.mark.parametrize("number", range(4))
def test_a_step_waits_once_and_talks_to_the_others_once(training, monkeypatch, number):
    """Beside what DeepSpeed does. To copy a number to the device by `torch.tensor` would be to wait for it, too."""
    calls, steps, one_step = [], [], Training.one_step

    def counted(owner, name):
        function = getattr(owner, name)

        def replaced(*args, **options):
            caller = sys._getframe(1).f_globals["__name__"]
            if caller.startswith("asymflow.") and not caller.startswith(BY_WORKERS):
                calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, replaced)

    for owner, names in ((torch.Tensor, WAITS), (dist, COLLECTIVES), (torch, ["tensor", "equal"])):
        for name in names:
            counted(owner, name)

    def replaced(self, stream):
        calls.clear()
        value = one_step(self, stream)
        steps.append(sorted(calls))
        return value

    monkeypatch.setattr(Training, "one_step", replaced)
    settings = [*stage(number), "train.steps=3", "checkpoint.every=3", "train.micro_batch_size=2"]
    training(*settings).fit()
    assert steps == [["all_reduce", "tolist"]] * 3


# ---- Compiled --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("number", "kind"), [*product(range(4), ("", "bf16")), *FURTHER])
def test_compiled_blocks_may_read_16_bytes_at_a_time(training, monkeypatch, number, kind):
    """Only if all weights begin at multiples of 16 bytes: in all stages but a few rare cases, and the graphs differ."""
    seen, compile_ = [], torch.compile

    def noted(function, **options):
        if isinstance(getattr(function, "__self__", None), Block):  # DeepSpeed compiles something as well
            seen.append(options["options"])
        return compile_(function, **options)

    monkeypatch.setattr(torch, "compile", noted)
    flow = training(*stage(number, kind), "train.compile=true", "optimizer.multipliers={w12: 2.0}").engine.module
    assert len(seen) == len(flow.backbone.blocks)
    if number < 3:  # at stage 3 they are elsewhere
        assert any(p.numel() % 8 for p in flow.backbone.blocks.parameters())  # which could shift others
    aligned = not any(held_part(p).data_ptr() % 16 for p in flow.parameters())
    assert seen == [None if aligned else {"triton.divisible_by_16": False}] * len(seen)
    assert aligned == (number < 3 and (number, kind) != (1, "float32 sums"))


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_linear_layers_are_those_of_torch(training, monkeypatch, compiled):
    """At stage 3 DeepSpeed replaces them for the whole process; torch 2.11 would compile these to wrong gradients."""
    monkeypatch.setattr(F, "linear", torch._C._nn.linear)  # an earlier test may have had them replaced
    training(*stage(3), f"train.compile={compiled}")
    assert (F.linear is torch._C._nn.linear) == compiled


def test_linear_layers_of_deepspeed_are_not_compiled(training):
    settings = "train.compile=true", "deepspeed.zero_optimization.memory_efficient_linear=true"
    with pytest.raises(AgreedError, match=r"memory_efficient_linear cannot be true with train\.compile"):
        training(*stage(3), *settings)


# ---- The configuration -----------------------------------------------------------------------------------------------
def test_a_configuration_that_was_edited_by_hand_is_not_taken_for_the_one_before(training, tmp_path):
    """Neither by the command that began the run nor by one that agrees with the edited file."""
    training("train.steps=2", "optimizer.lr=0.001").fit()
    path = tmp_path / "run" / "config.yaml"
    assert "lr: 0.001" in path.read_text()
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.002"))
    for lr, said in (
        (0.001, r"optimizer.lr: 0\.002 there, 0\.001 here"),
        (0.002, r"optimizer.lr: 0\.001 there, 0\.002"),
    ):
        with pytest.raises(InputError, match=f"another configuration.*{said}"):
            training("train.steps=4", f"optimizer.lr={lr}")
    training(
        "train.steps=4", "optimizer.lr=0.002", out="branch", resume=path.parent / "checkpoints" / "00000002"
    )  # meant to be another


# ---- Memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("aligned", [False, True])
def test_memory_does_not_grow_with_the_number_of_micro_batches(training, tmp_path, monkeypatch, aligned):
    """Of eight in a step, at most three are there at a time: one that is used, and those that are made ready."""
    settings = []
    if aligned:
        save_dinov2(tmp_path / "dinov2")
        settings = [f"loss.repa={{model: {tmp_path / 'dinov2'}, after: 1, hidden: 16}}"]
    alive, most, get = [], 0, Batches.__getitem__

    def counted(self, k):
        nonlocal most
        batch = get(self, k)
        alive.append(weakref.ref(batch.eps))
        most = max(most, sum(reference() is not None for reference in alive))
        return batch

    monkeypatch.setattr(Batches, "__getitem__", counted)
    training("train.steps=1", "train.micro_batch_size=1", *settings).fit()
    assert len(alive) == 8
    assert most <= 3


# ---- Drawing ---------------------------------------------------------------------------------------------------------
def sizes_of_batches(model, sizes):
    return model.register_forward_pre_hook(lambda module, args, options: sizes.append(len(args[0])), with_kwargs=True)


def test_a_grid_is_drawn_in_micro_batches(training, tmp_path):
    """Without guidance, which doubles them; the images are those of one large batch, to rounding."""
    one = training("train.micro_batch_size=4", "sample={num: 36, steps: 2, guidance: 1}")
    sizes = []
    hook = sizes_of_batches(one.engine.module, sizes)
    one.draw()
    hook.remove()
    assert max(sizes) == 4
    with one.model_to_show() as flow, torch.no_grad():
        whole = image_grid(one.objective.draw(flow, range(36)), width=GRID_WIDTH)
    drawn = Image.open(tmp_path / "run" / "samples" / "00000000.png")
    difference = np.asarray(drawn).astype(int) - np.asarray(whole).astype(int)
    assert abs(difference).max() <= 1


@pytest.mark.parametrize("ending", ["killed", "stopped"])
def test_a_picture_is_drawn_later_if_the_training_ends_between_saving_and_drawing(training, tmp_path, ending):
    settings = ["train.steps=4", "checkpoint.every=2", "sample={every: 2, num: 2, steps: 1, method: euler}"]
    training(*settings, out="straight").fit()
    one = training(*settings)
    save, losses = one.save, one.objective.losses

    def save_and_die():
        save()
        raise SystemExit

    if ending == "killed":
        one.save = save_and_die
        with pytest.raises(SystemExit):
            one.fit()
    else:
        one.objective.losses = lambda *args: (one.step == 1 and signal.raise_signal(signal.SIGTERM)) or losses(*args)
        assert one.fit() == "SIGTERM"
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["00000000.png"]
    one.held.close()
    training(*settings).fit()
    straight, later = (
        {path.name: path.read_bytes() for path in (tmp_path / run / "samples").iterdir()} for run in ("straight", "run")
    )
    assert len(later) == 3
    assert later == straight


# ---- Saying ----------------------------------------------------------------------------------------------------------
LINE = r"step (\d+) of 6: loss (\S+), gradient norm (\S+), (\S+) images/s, (\d+)% waiting for data, (\S+) left"


def test_a_log_file_has_a_line_for_the_first_the_last_and_every_nth_step(training, tmp_path, capfd):
    """With the mean of the loss since the line before."""
    settings = ["train.steps=6", "checkpoint.every=6", "sample={every: 3, num: 2, steps: 1}"]
    training(*settings, "train.log_every=2").fit()
    said = capfd.readouterr().err.splitlines()
    lines = [re.fullmatch(LINE, line).groups() for line in said if line.startswith("step ")]
    assert not any("%|" in line for line in said)
    losses = [m["loss"] for m in metrics(tmp_path / "run")]
    assert [int(step) for step, *_ in lines] == [1, 2, 4, 6]
    expected = [losses[0], losses[1], sum(losses[2:4]) / 2, sum(losses[4:6]) / 2]
    assert [float(loss) for _, loss, *_ in lines] == pytest.approx(expected, abs=1e-4)
    assert lines[-1][-1] == "00:00"


def test_a_terminal_has_a_bar_and_no_lines(training, monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    one = training("train.steps=3", "train.log_every=1", "checkpoint.every=3")
    monkeypatch.setattr(sys, "stderr", shown)
    one.fit()
    assert "training: 100%" in shown.getvalue()
    assert "step 1 of 3" not in shown.getvalue()


def test_the_share_of_a_step_that_was_spent_waiting_for_data(training, tmp_path, monkeypatch):
    get = Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda self, k: time.sleep(3 * (k == 1)) or get(self, k))
    training("train.steps=2", "checkpoint.every=2").fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = 8 / lines[1]["images_per_second"]
    assert 3 <= lines[1]["waiting"] * seconds <= seconds


def test_what_the_gpu_is_waited_for_is_not_waiting_for_data(training, tmp_path, monkeypatch):
    def slow(batches, device):
        for batch in batches:
            time.sleep(3)  # as `on_device` waits for a copy, which waits for the computation
            yield batch

    monkeypatch.setattr(loop, "on_device", slow)
    training("train.steps=1", "checkpoint.every=1").fit()
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = 8 / line["images_per_second"]
    assert line["waiting"] * seconds <= seconds - 3


# ---- Watched ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [0, 1, 2])
def test_nothing_is_left_of_a_training_that_a_benchmark_watched(training, number):
    """The next one would find its weights on the GPU. (After stage 3 the process is ended.)"""
    one, watch = training(*stage(number)), worker.Watch()
    left = weakref.ref(next(one.engine.module.parameters()))
    watch.before(one)
    watch.after(one)
    del one
    gc.collect()
    assert left() is None
