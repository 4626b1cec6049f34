"""A backbone, data, an objective, a sampler and an optimizer that are not of this library, named in a YAML."""

import json
import os
import re
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, Launched, metrics, same_bits, tensors
from ways_to_end import dies, everything

from asymflow import AsymFlow, InputError, Subspace
from asymflow.cli import main as asymflow
from asymflow.cli.drawing import draw_missing
from asymflow.cost import count
from asymflow.training import loop
from asymflow.training.config.derived import make_backbone
from asymflow.training.config.reading import load_config
from asymflow.training.datasets import make_dataset
from asymflow.training.objectives.class_conditional import ClassConditional
from asymflow.training.objectives.cost import Step, images, needed_flops
from asymflow.training.start import make_flow
from asymflow.training.zero.engine import check_optimizer

MODULE = '''
import torch
from torch import nn

from asymflow.data.sample import Sample
from asymflow.training.objectives.class_conditional import ClassConditional


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Net(nn.Module):
    def __init__(self, image_size, num_classes, width=32, depth=2, heads=2, patch=4):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.patch_size, self.num_classes, self.grid = patch, num_classes, (image_size // patch,) * 2
        self.inside, self.outside = nn.Linear(3 * patch**2, width), nn.Linear(width, 3 * patch**2)
        self.positions = nn.Parameter(0.02 * torch.randn(self.grid[0] * self.grid[1], width))
        self.classes, self.level = nn.Embedding(num_classes + 1, width), nn.Linear(2, width)
        self.register_buffer("waves", torch.tensor([1.0, 9.0]), persistent=False)  # in no file
        self.blocks = nn.ModuleList(Layer(width, heads) for _ in range(depth))

    def forward(self, tokens, tau, labels):
        condition = self.classes(labels) + self.level((tau[:, None] * self.waves).sin().to(tokens.dtype))
        x = self.inside(tokens) + self.positions + condition[:, None]
        for block in self.blocks:
            x = block(x)
        return self.outside(x)


class Stripes:
    """Grey stripes, as wide as their class says."""

    def __init__(self, size, seed, count=64, classes=3):
        self.size, self.seed, self.count, self.num_classes = size, seed, count, classes

    def __len__(self):
        return self.count

    def label(self, index):
        return (index + self.seed) % self.num_classes

    def __getitem__(self, index):
        wide = 1 + self.label(index)
        stripes = (torch.arange(self.size) // wide % 2 * 255).to(torch.uint8)
        return Sample(stripes.expand(3, self.size, self.size).contiguous(), self.label(index), f"stripes/{index}")


class Floats(Stripes):
    def __getitem__(self, index):
        return super().__getitem__(index)._replace(image=torch.rand(3, self.size, self.size))


class Exact(Stripes):
    def __init__(self, size, seed, count):
        super().__init__(size, seed, count)


class Blind(Net):
    def forward(self, tokens, tau):
        return tokens


class Stubborn(Net):
    def __init__(self, width=16, loud=1.0):
        super().__init__(16, 3, width)
        self.noise_scale = loud


class Halved(ClassConditional):
    def __init__(self, config, flow, factor=0.5):
        super().__init__(config, flow)
        self.factor = factor

    def losses(self, model, batch):
        return self.factor * super().losses(model, batch)


def midpoint(velocity, x, sigmas):
    for sigma, target in zip(sigmas, sigmas[1:]):
        half = x + (target - sigma) / 2 * velocity(x, sigma)
        x = x + (target - sigma) * velocity(half, (sigma + target) / 2)
    return x


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv 2302.06675: one moment, and no count of steps."""

    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            fast, slow = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(torch.lerp(p.grad, moment, fast).sign(), alpha=group["lr"])
                    moment.lerp_(p.grad, 1 - slow)
'''
YAML = """
model: {backbone: "NAME:Net", options: {width: 16}, image_size: 16, num_classes: 3, checkpoint_every: 1}
subspace: {rank: 4, images: 16}
data: {kind: "NAME:Stripes", options: {count: 32}, workers: 1}
loss: {objective: "NAME:Halved", options: {factor: 0.25}}
optimizer: {kind: "NAME:Lion", lr: 1.0e-3, warmup_steps: 2}
train: {steps: 20, global_batch_size: 8, micro_batch_size: 2, seed: 0}
ema: {decays: [0.9]}
checkpoint: {every: 5}
sample: {every: 10, num: 4, steps: 2, method: "NAME:midpoint"}
deepspeed: {zero_optimization: {stage: 2}}
"""


def on_path(folder, then=lambda: None):
    sys.path.insert(0, str(folder))
    then()


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with the module, whose name no other test has, and a configuration that names what is in it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "stranger_net.py").write_text(MODULE)
    (folder / "own.yaml").write_text(YAML.replace("NAME", "stranger_net"))
    return folder


@pytest.fixture(scope="module")
def run(own):
    """Trained on two ranks: straight on, and once more after a rank was killed."""
    for name, patches in (("straight", [None]), ("killed", [partial(dies, 1, 13, "kill"), None])):
        for patch in patches:
            arguments = ["--config", str(own / "own.yaml"), "--out", str(own / name)]
            launched = Launched(2, arguments=arguments, patch=partial(on_path, own, *([patch] if patch else [])))
            assert (launched.wait() == [0, 0]) == (patch is None), launched.said()
    return own / "straight"


@pytest.fixture
def importable(own, monkeypatch):
    monkeypatch.syspath_prepend(own)
    yield
    sys.modules.pop("stranger_net", None)


@pytest.mark.slow
def test_it_learns_and_is_resumed_to_the_bit(own, run):
    straight, killed = metrics(run), metrics(own / "killed")
    assert len(straight) == 20
    assert straight == killed
    assert sum(m["loss"] for m in straight[-5:]) < sum(m["loss"] for m in straight[:5])
    assert same_bits(tensors(run, 20), tensors(own / "killed", 20))
    assert {kind for kind, _ in tensors(run, 20)} == {"weights", "moment", "ema-0.9", "ema-rel-0.050", "ema-rel-0.100"}
    assert everything(run) == everything(own / "killed")


@pytest.mark.slow
def test_it_is_exported_loaded_and_sampled(own, run, importable, tmp_path, capsys):
    code = ["--backbone", "stranger_net:Net"]
    assert asymflow(["export", "--run", str(run), "--out", str(tmp_path / "model"), *code]) == 0
    assert asymflow(["info", str(tmp_path / "model"), *code]) == 0
    assert asymflow(["info", str(run), *code]) == 0
    said = capsys.readouterr().out
    assert said.count("class Net, image_size 16, num_classes 3, width 16") == 2
    assert said.count("GFLOPs an image") == 2 * 2
    drawn = {}
    for model in (run, tmp_path / "model"):
        out = tmp_path / f"drawn-{model.name}"
        method = ["--method", "stranger_net:midpoint"]
        options = ["--num", "2", "--steps", "2", "--device", "cpu", "--out", str(out), *method, *code]
        assert asymflow(["sample", "--model", str(model), *options]) == 0
        drawn[model] = [np.asarray(Image.open(path)) for path in sorted((out / "images").iterdir())]
        assert "stranger_net:midpoint" in (out / "samples.json").read_text()
    assert all(np.array_equal(a, b) for a, b in zip(*drawn.values(), strict=True))
    import stranger_net

    flow = AsymFlow.from_pretrained(tmp_path / "model", backbone=stranger_net.Net)
    assert flow.backbone.blocks[0].norm1.weight.numel() == 16


@pytest.mark.slow
def test_no_file_of_a_run_or_a_model_makes_code_run(own, run, tmp_path, capsys, monkeypatch):
    """It could be imported: but nobody said that it may."""
    monkeypatch.syspath_prepend(own)
    for command in (
        ["export", "--run", str(run), "--out", str(tmp_path / "out")],
        ["info", str(run)],
        ["sample", "--model", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"],
    ):
        assert asymflow(command) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "add --backbone stranger_net:Net" in line
    assert "stranger_net" not in sys.modules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.backbone": "stranger:Net"}, "there is no module stranger"),
        ({"model.backbone": "stranger_net:Ned"}, "stranger_net has no Ned: did you mean Net?"),
        ({"model.options.witdh": 3}, "model.options.witdh is no argument of Net: did you mean width?"),
        ({"model.options.image_size": 3}, "model.options.image_size is what other keys of the configuration say"),
        ({"model.options.width": "wide"}, "model.options: Net refuses them"),
        (
            {"model.backbone": "stranger_net:Stubborn", "model.num_classes": 4},
            "num_classes 3, but training uses 4",
        ),
        ({"model.backbone": "stranger_net:Stubborn", "model.image_size": 32}, r"grid \(4, 4\), but .* uses \(8, 8\)"),
        ({"model.backbone": "stranger_net:Stubborn", "model.options.loud": 3.0}, "noise_scale 3.0, but .* uses 1.0"),
        ({"model.dropout": 0.1}, "model.dropout is given, but stranger_net:Net has no such argument"),
        (
            {"model.backbone": "stranger_net:Lion", "model.options": {}},
            "model.options.width is no argument of Lion",
        ),
        ({"model.backbone": "stranger_net:Blind"}, "stranger_net:Blind needs an argument labels of its forward"),
        ({"data.kind": "stranger_net:Floats"}, "must give images of torch.uint8, \\(3, 16, 16\\), but"),
        ({"data.options.cuont": 3}, "data.options.cuont is no argument of Stripes: did you mean count?"),
        ({"data.options.classes": 4}, "stranger_net:Stripes has 4 classes, but model.num_classes is 3"),
        ({"data.path": "images"}, "data.path is given, but stranger_net:Stripes has no argument path"),
        ({"data.kind": "stranger_net:Exact", "data.options": None}, "data.size is needed: it is the argument count"),
    ],
)
def test_what_does_not_fit_is_one_line(own, importable, change, message):
    settings = [f"{key}={json.dumps(value)}" for key, value in change.items()]
    config = load_config(own / "own.yaml", settings)
    with pytest.raises(InputError, match=message) as error:
        _ = make_backbone(config.model), make_dataset(config)
    assert "\n" not in str(error.value)


def test_a_noise_scale_that_is_given_comes_before_that_of_the_backbone(own, importable):
    given = ["model.backbone=stranger_net:Stubborn", "model.options.loud=3.0"]
    for more in (["model.noise_scale=2.0"], ["model.noise_scale=3.0"]):
        config = load_config(own / "own.yaml", [*given, *more])
        assert make_flow(config, Subspace.random(48, 4)).noise_scale == config.model.noise_scale


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        *((kind, None) for kind in ("AdamW", "SGD", "RMSprop")),
        ("NAdam", "mu_product"),
        ("Rprop", "step_size"),
        ("ASGD", "keeps eta"),
        ("Adagrad", "before its first step"),
        ("LBFGS", "treat each number by itself"),
    ],
)
def test_an_optimizer_of_another_state_is_refused(kind, said):
    """One whose state does not begin at zero would train as something else, and be resumed as another."""
    optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    if said is None:
        check_optimizer(optimizer, kind)
    else:
        with pytest.raises(InputError, match=said):
            check_optimizer(optimizer, kind)


def test_null_removes_the_options_of_a_base(own):
    (own / "above.yaml").write_text("base: own.yaml\nmodel: {options: {depth: 3}}\n")
    assert load_config(own / "above.yaml").model.options == {"width": 16, "depth": 3}
    for key in ("model", "data", "loss", "optimizer"):
        assert getattr(load_config(own / "above.yaml", [f"{key}.options=null"]), key).options == {}
    jit = ["model.backbone=JiT", "model.size=tiny/4", "model.options=null", "data.kind=shapes", "data.size=9"]
    assert set(load_config(own / "own.yaml", [*jit, "data.options=null"]).model.options.values()) == {None}


def test_what_a_sampler_makes_of_nothing_is_said(tmp_path, monkeypatch, capsys):
    """Not a black picture without a word."""
    nothing = lambda *_: torch.full((2, 3, 4, 4), torch.nan)
    args = SimpleNamespace(out=tmp_path, images=tmp_path, batch=2, base=None, device="cpu")
    with pytest.raises(InputError, match="image 5, of 1, has numbers that are NaN"):
        draw_missing(args, [(5, 1), (6, 2)], nothing)
    monkeypatch.setattr(loop, "all_gather_rows", lambda rows: rows)
    training = SimpleNamespace(rank=0, world=1, micro=2, step=7, objective=SimpleNamespace(draw=nothing))
    training.config = SimpleNamespace(sample=SimpleNamespace(num=2))
    training.engine = SimpleNamespace(monitor=SimpleNamespace(tb_monitor=None, wandb_monitor=None))
    training.model_to_show, training.picture = lambda: nullcontext(None), lambda: tmp_path / "7.png"
    loop.Training.draw(training)
    assert "2 of 2 samples at step 7 have numbers that are NaN or infinite" in capsys.readouterr().err


def test_recomputed_blocks_have_the_gradients_of_kept_ones(own, importable):
    gradients = []
    for every in (0, 1):
        torch.manual_seed(0)
        net = make_backbone(load_config(own / "own.yaml", [f"model.checkpoint_every={every}"]).model)
        tokens, labels = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])
        net(tokens, torch.tensor([0.1, 0.9]), labels).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(map(torch.equal, *gradients))


def test_what_ones_own_blocks_recompute_is_not_needed(own, importable):
    needed = []
    for every in (0, 1):
        config = load_config(own / "own.yaml", [f"model.checkpoint_every={every}"])
        flow = AsymFlow(make_backbone(config.model), Subspace.random(48, 4)).train()
        step = Step(config, ClassConditional(config, flow), flow)
        needed.append(needed_flops(step, images(2, (3, 16, 16))))
    assert needed[0] == needed[1] < count(step, lambda step: step(images(1, (3, 16, 16)))).flops


def test_a_module_that_breaks_when_it_is_imported_shows_where(own, importable, tmp_path, monkeypatch):
    (tmp_path / "broken_net.py").write_text(
        textwrap.dedent("""
        import nothing_of_that_name
    """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        make_backbone(load_config(own / "own.yaml", ["model.backbone=broken_net:Net"]).model)


@pytest.mark.slow
def test_the_page_on_backbones_does_what_it_shows(tmp_path):
    """Its module, its YAML and its three commands, word for word, in a folder that has train_ddp.py."""
    page = (ROOT / "docs/backbones.md").read_text()
    python, yaml, commands = (
        re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "yaml", "sh")
    )
    (tmp_path / "mynet.py").write_text(python)
    (tmp_path / "dit.yaml").write_text(yaml)
    (tmp_path / "train_ddp.py").symlink_to(ROOT / "train_ddp.py")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", commands], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "runs/dit_samples/images").iterdir())) == 4
