# %% [markdown]
# # A tour: from a swissroll to a model of shapes
#
# What an asymmetric flow model is, first on a toy in 256 dimensions, then on small images. Sections 1 to 3 use
# `nano_asymflow.py`, the whole method in one file. Sections 4 and 5 use the library `asymflow`.
#
# It takes about ten minutes on one CPU core, and most of them are the training in section 5. To run it yourself,
# install `asymflow` with the extra `library` as [Getting started](index.md) says, then open `docs/tour.ipynb` in
# Jupyter, or run `docs/tour.py`, which has the same cells.

# %%
import os

import matplotlib.pyplot as plt
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import nano_asymflow as nano
from asymflow import AsymFlow, fit_pca, flow_matching_loss, generate, noise_level, noisy, without_some
from asymflow.backbones.jit import JiT
from asymflow.data.shapes import Shapes
from asymflow.patches import patchify, unpatchify
from asymflow.pictures import basis_patches, draw_spectrum, image_grid, magnified
from nano_asymflow import MLP, Flow, ToyData, asymmetric_velocity, integrate, pca_basis, profile, recover_velocity

# %%
QUICK = bool(os.environ.get("TOUR_QUICK"))  # a few training steps only, to test that all cells run
torch.set_num_threads(1)  # the figures below were made with one
plt.rcParams |= {"figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 9}
print(f"torch {torch.__version__} on {torch.get_num_threads()} thread")

# %% [markdown]
# ## 1. The problem
#
# The data is a swissroll, a curve in a plane, and the plane lies somewhere in a space of $D = 256$ dimensions. Images
# are like this: they have many pixels, but most of what happens in them happens along few directions.
#
# A flow model turns noise into data. A straight path leads from a clean point $x_0$ to standard normal noise
# $\varepsilon$: $x_\sigma = (1 - \sigma)\,x_0 + \sigma\,\varepsilon$, with the noise level $\sigma$ from 0 to 1. Here
# are 1,500 points at five noise levels, seen in their plane.

# %%
data = ToyData("swissroll", dim=256)
random = nano.random_stream(0, "tour")  # a generator of random numbers
x0 = data.sample(1500, random)
eps = torch.randn(x0.shape, generator=random)
figure, panels = plt.subplots(1, 5, figsize=(12, 2.6), sharex=True, sharey=True)
for panel, sigma in zip(panels, (0, 0.25, 0.5, 0.75, 1), strict=True):
    x_sigma = torch.lerp(x0, eps, sigma)  # (1 - sigma) x0 + sigma eps
    panel.scatter(*(x_sigma @ data.frame).T, s=3, linewidths=0)  # the frame: two axes in the plane
    panel.set(title=f"sigma = {sigma}", aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
plt.show()

# %% [markdown]
# The velocity along this path is $dx_\sigma / d\sigma = u = \varepsilon - x_0$, an arrow that leads from the data to
# the noise. A network learns the mean of $u$ at each $x_\sigma$. Following it backwards, from $\sigma = 1$ to 0, turns
# noise into samples.
#
# On the left are thirty paths in the plane. On the right is the energy of $u$ along each of 256 orthogonal directions,
# of which the first two span the plane. Nearly all of it is noise in the other 254, where there is no data. A network
# that predicts $u$ has to repeat all this noise. Ours will be 128 numbers wide, and cannot.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.6))
start, arrow = (x0 @ data.frame)[:30], ((eps - x0) @ data.frame)[:30]
left.quiver(*start.T, *arrow.T, angles="xy", scale_units="xy", scale=1, color="0.6", width=0.006)
left.scatter(*start.T, s=12, color="C0")
left.set(title="paths in the plane, from data to noise", aspect="equal", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5))
axes = torch.cat([data.frame, data.outside], dim=1)
for name, vectors in {"velocity": eps - x0, "noise": eps, "data": x0}.items():
    right.plot(range(1, 257), (vectors @ axes).square().mean(0), ".", markersize=4, label=name)
right.set(title="energy along each direction", xlabel="direction")
right.legend()
plt.show()

# %% [markdown]
# ## 2. The velocity comes back
#
# Asymmetric flow predicts the noise only inside of a subspace. Let the columns of the matrix $A$, the `basis`, be $r$
# orthonormal directions, and $P = A A^\top$ the projection onto them. The network predicts $u_A = P\varepsilon - x_0$:
# the data in all dimensions, the noise in $r$ of them.
#
# The basis comes from the data: the $r$ directions of most energy (PCA). With $r = 2$ they span the plane.

# %%
samples = data.sample(10_000, random)
basis = pca_basis(samples, rank=2)
cosines = torch.linalg.svdvals(basis.mT @ data.frame)
print(f"basis: {tuple(basis.shape)}; cosines of the angles to the true plane: {cosines.tolist()}")
u, u_a = eps - x0, asymmetric_velocity(x0, eps, basis)
print("\nroot mean square, in the plane and outside of it")
for name, vectors in {"u": u, "u_a": u_a}.items():
    inside, outside = ((vectors @ axis).square().mean().sqrt().item() for axis in (data.frame, data.outside))
    print(f"{name:4} {inside:6.3f} {outside:9.6f}")

# %% [markdown]
# Nothing is lost. Inside of the subspace $u_A$ is the velocity itself. Outside, the input tells what the noise was,
# since $x_\sigma = x_0 + \sigma u$:
#
# $$u_\parallel = (u_A)_\parallel, \qquad u_\perp = \frac{x_{\sigma\perp} + (u_A)_\perp}{\sigma} .$$
#
# With $r = 0$ all is outside, and this is x0-prediction. With $r = D$ all is inside, and it is the usual prediction of
# $u$. Here is the largest error of the recovered velocity at each noise level, in float32: rounding errors only. What
# is outside is divided by $\sigma$, and so are its rounding errors; at $r = D$ nothing is divided.

# %%
bases, levels = {rank: pca_basis(samples, rank) for rank in (0, 2, 256)}, torch.logspace(-3, -0.1, 13)
for rank, columns in bases.items():
    errors, u_a = [], asymmetric_velocity(x0, eps, columns)
    for sigma in levels:
        recovered = recover_velocity(u_a, torch.lerp(x0, eps, sigma), sigma, columns)
        errors.append((recovered - (eps - x0)).abs().max().item())
    plt.loglog(levels, errors, "o-", markersize=4, label=f"rank {rank}")
    print(f"rank {rank:3}: error at most {max(errors):.1e}")
plt.gcf().set_size_inches(5.5, 3)
plt.gca().set(xlabel="sigma", ylabel="largest error of u", ylim=(1e-7, 1e-2))
plt.legend()
plt.show()

# %% [markdown]
# ## 3. Three predictions, one network
#
# Now the same network is trained three times, from the same start, on the same data and noise. Only what it predicts
# differs: `asym` ($r = 2$), `x0` ($r = 0$) and `u` ($r = D$). The loss is always that of the recovered velocity, so
# that the three curves can be compared.

# %%
steps, flows, losses = 5 if QUICK else 3000, {}, {"asym": [], "x0": [], "u": []}
for name, rank in {"asym": 2, "x0": 0, "u": 256}.items():

    def loss_kept(flow, x0, eps, sigma, kept=losses[name]):
        loss = nano.flow_loss(flow, x0, eps, sigma)
        kept.append(loss.item())
        return loss

    torch.manual_seed(0)
    flows[name] = Flow(MLP(data.dim, width=128), bases[rank])
    nano.train(flows[name], data.sample, steps, 256, nano.random_stream(0, "training"), loss=loss_kept, name=name)

# %%
smooth = lambda values: torch.tensor(values).unfold(0, len(values) // 60 + 1, 1).mean(1)  # a moving average
figure = plt.figure(figsize=(6, 3.2))
for name, values in losses.items():
    plt.semilogy(smooth(values), linewidth=1, label=name)
plt.gca().set(title="loss of the velocity", xlabel="training step")
plt.legend()
plt.show()

# %% [markdown]
# Samples: 2,048 points of noise follow the learned velocity from $\sigma = 1$ to 0, in 30 steps of Heun's method. The
# score compares them with fresh data: 0 % is pure noise, 100 % as good as another set of data. (`nano_asymflow.py`
# prints this table for 4,000 steps and more points.)

# %%
fresh = data.position(16 * 2048, random).view(16, 2048, 2)
reference = profile(fresh).mean(0)
noise = torch.randn(2048, data.dim, generator=random)
distance = lambda points: (profile(points) - reference).abs().mean().item()  # sliced Wasserstein-1
floor, start = distance(fresh), distance(noise @ data.frame)
paths = {}
print("prediction   rank   score  noise left outside the plane")
for name, flow in flows.items():
    paths[name] = torch.stack([(x := point) @ data.frame for point in integrate(flow, noise, steps=30)])
    score, outside = (start - distance(paths[name][-1])) / (start - floor), (x @ data.outside).square().mean().sqrt()
    print(f"{name:11} {flow.basis.shape[1]:>5} {score:7.0%} {outside:29.1%}")

# %%
figure, panels = plt.subplots(2, 4, figsize=(11, 5.6))
for (above, below), (name, path) in zip(panels.T, {"fresh data": fresh[:1], **paths}.items(), strict=True):
    color = "C3" if len(path) > 1 else "C0"
    above.set_title(name)
    above.scatter(*path[-1].T, s=3, linewidths=0, color=color)
    below.plot(*path[:, :100].permute(2, 0, 1), color="0.8", linewidth=0.6)
    below.scatter(*path[0, :100].T, s=5, color="0.4" if len(path) > 1 else color)
    below.scatter(*path[-1, :100].T, s=5, color=color)
for panel in panels.flat:
    panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Above are the samples, below the paths of a hundred of them, from noise (grey) to sample (red). With asymmetric
# prediction the roll is found; a score just above 100 % is chance. x0-prediction is on its way: points still lie
# between the arms of the roll ([longer training](toys.md) brings it there, too). u-prediction has learned nothing of
# the roll, and 71 % of the noise is left outside of the plane.
#
# The loss tells less: `asym` and `x0` are close, because most of it is what nobody can know about the noise.
#
# ## 4. From points to images
#
# The images are generated: one to three shapes of one kind and one colour, 32 x 32 pixels. There are 16 classes: four
# shapes in four colours.

# %%
shapes = Shapes(4000, size=32)
images = torch.stack([sample.image for sample in shapes]) / 127.5 - 1  # bytes to [-1, 1]
labels = torch.tensor([shapes.label(i) for i in range(len(shapes))])
print(f"images {tuple(images.shape)}; the first is of class {labels[0]}: {shapes.classes[labels[0]]}")
print(f"all classes: {', '.join(shapes.classes)}")
plt.figure(figsize=(9, 3.6))
plt.imshow(image_grid(images[:40], columns=10))
plt.axis("off")
plt.show()

# %% [markdown]
# A transformer sees an image as tokens: square patches, here of 4 x 4 pixels. With three colours, a token is a vector
# of $D = 48$ numbers, and an image is 64 tokens. The subspace is one of tokens, and it is the same for all of them.


# %%
def show(**pictures):
    """Draw images (n, 3, H, W) in [-1, 1] as grids, side by side, with their names above."""
    _, panels = plt.subplots(1, len(pictures), figsize=(3.6 * len(pictures), 3.9), squeeze=False)
    for panel, (name, images) in zip(panels[0], pictures.items(), strict=True):
        panel.imshow(image_grid(images), interpolation="nearest")
        panel.set_title(name.replace("_", " "))
        panel.axis("off")
    plt.show()


tokens = patchify(images, 4)
patches = images[:1].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(64, 3, 4, 4)
print(f"tokens: {tuple(tokens.shape)}")
show(an_image=magnified(images[:1]), its_64_patches=magnified(patches))

# %%
subspace = fit_pca([tokens], rank=8, patch_size=4)
figure = plt.figure(figsize=(10, 4.6))
panels = figure.subplot_mosaic([["left", "above"], ["left", "below"]], width_ratios=(1, 1))
panels["left"].imshow(image_grid(magnified(basis_patches(subspace, 48)), columns=3, gap=8))
panels["left"].set_title("the directions, drawn as patches")
panels["left"].axis("off")
draw_spectrum(subspace, panels["above"], panels["below"])
plt.show()

# %% [markdown]
# One direction, the grey level, has 94 % of the energy, and eight of the 48 together have 98.8 % of it. In the middle
# below is what these eight see of the images. What is missing is on the right (grey is 0): the sharp edges. This is
# what the network has to predict as data, without noise.

# %%
inside = subspace.project(tokens[:16])
show(
    images=images[:16],
    inside_of_the_subspace=unpatchify(inside, (8, 8), 4),
    outside_of_it=unpatchify(tokens[:16] - inside, (8, 8), 4),
)

# %% [markdown]
# ## 5. A model of shapes
#
# The network is a small JiT, a transformer that maps 64 tokens to 64 tokens, given the noise level and the class. It
# knows nothing of flows. `AsymFlow` makes a velocity model of it: it cuts the noisy image into tokens, asks the network
# for $u_A$, and recovers $u$. With `Subspace.empty(48)` the same lines are x0-prediction.

# %%
torch.manual_seed(0)
network = JiT.from_name("tiny/4", num_classes=16, image_size=32)
network.seed_patch_embedding(subspace)  # it starts by seeing the directions of the subspace
flow = AsymFlow(network, subspace)
optimizer = torch.optim.AdamW(flow.parameters(), lr=2e-3, weight_decay=0.0)
rate = lambda step: min(1, (step + 1) / 50) * (1 - step / 1600)  # the learning rate rises quickly, then falls to 0
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # of the last 100 steps or so, to sample from
losses = []
with torch.no_grad():
    u = flow(torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.9]), labels=torch.tensor([3, 16]))
print(f"{sum(p.numel() for p in flow.parameters()):,} numbers to learn; the velocity is {tuple(u.shape)}")

# %% [markdown]
# The training loop is that of flow matching, whatever the network predicts. Most noise levels are high, because that is
# where the picture is decided. A tenth of the images come without their class (label 16), which guidance needs.


# %%
def train_on_images(steps):
    for _ in tqdm(range(steps), unit="step", leave=False):
        chosen = torch.randint(len(images), (32,))
        x0, sigma = images[chosen], noise_level(torch.randn(32))
        eps = flow.noise_scale * torch.randn_like(x0)
        u = flow(noisy(x0, eps, sigma), sigma, labels=without_some(labels[chosen], 16, 0.1))
        loss = flow_matching_loss(u, x0, eps, sigma).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(flow)
        losses.append(loss.item())


train_on_images(5 if QUICK else 400)
print(f"loss: {losses[0]:.3f} at first, {smooth(losses)[-1]:.3f} after {len(losses)} steps")

# %% [markdown]
# `generate` draws an image for each label: noise that depends only on the seed and the number of the image, then Heun's
# method from $\sigma = 1$ to 0. Below, each row is a shape and each column a colour. First after 400 steps, then after
# 1,200 more.

# %%
settings = dict(labels=range(16), seed=0, steps=20)  # one image of each class
early = generate(average.module.eval(), **settings, guidance=2.0)
train_on_images(5 if QUICK else 1200)
later = generate(average.module.eval(), **settings, guidance=2.0)
show(after_400_steps=early, after_1600_steps=later)

# %% [markdown]
# After 400 steps there are only coloured patches, on a noisy ground. After 1,600 the colours are right, and most shapes
# can be told, but they are rough, they touch, and some pictures have more than three. This is a small network after a
# few minutes; the [gallery](gallery.md) shows what larger trainings draw.

# %%
plt.figure(figsize=(6, 3.2))
plt.semilogy(losses, linewidth=0.4, color="0.7")
plt.semilogy(smooth(losses), linewidth=1.2)
plt.gca().set(title="loss of the velocity", xlabel="training step")
plt.show()

# %% [markdown]
# **Guidance** compares two velocities, one with the class and one without, and goes further in the direction in which
# they differ: $u = u_\text{class} + (g - 1)\,(u_\text{class} - u_\text{none})$. Here are the same noise and the same
# model at three scales $g$.

# %%
model = average.module.eval()
weak, strong = (generate(model, **settings, guidance=scale) for scale in (1.0, 6.0))
show(guidance_1=weak, guidance_2=later, guidance_6=strong)

# %% [markdown]
# At scale 1 the images are paler, and there are fewer shapes. At 2 the colours are stronger. At 6 it is too much: the
# colours are not those of the data, and noise and the edges of the patches show.
#
# **The interval** says at which noise levels guidance acts. Here is the scale 6 again, at all of them, only above
# $\sigma = 0.5$, and only below.

# %%
above, below = (generate(model, **settings, guidance=6.0, interval=ends) for ends in ((0.5, 1.0), (0.0, 0.5)))
show(everywhere=strong, only_above_one_half=above, only_below_one_half=below)

# %% [markdown]
# High noise levels decide what is in the picture: with guidance there, shapes are added, and the colours stay close to
# those of the data. Low ones decide what it looks like: most shapes are where they were at scale 1, but with the strong
# colours and the noise.
#
# **The number of steps** says how closely the path is followed. Each of Heun's steps evaluates the network twice (with
# guidance: also without the class), but for the last.

# %%
settings["steps"] = 2
two = generate(model, **settings, guidance=2.0)
settings["steps"] = 5
five = generate(model, **settings, guidance=2.0)
show(two_steps=two, five_steps=five, twenty_steps=later)

# %% [markdown]
# With two steps many shapes are missing. With five the images are nearly those of twenty steps.
#
# ## 6. Where to go next
#
# - The formulas, and why they hold: [The method](method.md). What was measured on toys: [Toys](toys.md).
# - All that `AsymFlow` and `generate` can do, and published models: [The library](library.md).
# - [A network of your own](backbones.md), in the same loop.
# - A real training, of your own images: [Training](training.md), [Your own data](data.md), and [the whole way, step
#   by step](examples/own_data.md).
# - Real images: [3,781 emoji](emoji64.md), and the [gallery](gallery.md).
# - A latent model that becomes a pixel model: [Finetuning FLUX.2](finetuning.md).
# - Numbers instead of pictures: [Evaluation](evaluation.md).
