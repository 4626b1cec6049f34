"""toy/: the closed forms that the experiments rest on, and what their shared command line promises."""

import json

import matplotlib.image
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from asymflow.data.shapes import make_scene, render
from nano_asymflow import MLP, Flow, ToyData, flow_loss, random_stream
from toy import closed_form, common, shapes_oracle
from toy.digits import frechet, one_nn
from toy.latent_to_pixel import ScaledFlow, lift, procrustes, variance_reduced_loss, zoom
from toy.rank_sweep import off_surface

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.floats(0.05, 20)
DOUBLE = {"dtype": torch.float64}


def planted(seed, dim=7, rank=2):
    """A generator, and a basis (dim, rank) drawn from it."""
    generator = torch.Generator().manual_seed(seed)
    return generator, torch.linalg.qr(torch.randn(dim, dim, generator=generator, **DOUBLE)).Q[:, :rank]


# ---- closed_form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.7, 1.0])
def test_the_closed_form_is_the_conditional_mean_and_its_error_the_irreducible_loss(sigma):
    """Gaussian u - u* is what x_sigma does not explain: uncorrelated with it, and of the stated energy.

    To 6 standard errors over 100,000 draws: one in 64^2 correlations exceeds 5 with probability 0.2 %, 6 never.
    """
    n, data, generator = 100_000, closed_form.Gaussian(0, "cpu"), random_stream(0, "test")
    x0, eps = data.sample(n, generator), torch.randn(n, closed_form.DIM, generator=generator)
    level = torch.tensor([[sigma]])
    x = torch.lerp(x0, eps, level)
    rest = (eps - x0 - data.velocity(x, level)) @ data.axes
    x = x @ data.axes
    correlation = rest.mT @ x / (n * rest.square().mean(0).sqrt()[:, None] * x.square().mean(0).sqrt())
    assert correlation.abs().max() < 6 / n**0.5
    energy = rest.square().mean(1) * min(1, sigma / 0.05) ** 2
    assert abs(energy.mean() - data.irreducible(level).item()) < 6 * energy.std() / n**0.5


def test_the_exact_velocity_has_no_excess_and_a_shifted_one_has_the_shift():
    data, generator = closed_form.Gaussian(0, "cpu"), random_stream(0, "test")
    x0, eps = data.sample(50, generator), torch.randn(50, closed_form.DIM, generator=generator)
    sigma = torch.tensor([[0.01], [0.5], [1.0]])
    assert data.excess(data.velocity, x0, eps, sigma).abs().max() == 0
    shifted = data.excess(lambda x, s: data.velocity(x, s) + 0.5, x0, eps, sigma)
    torch.testing.assert_close(shifted, torch.tensor([0.01, 0.25, 0.25]))  # the weight at 0.01 is (1 / 5)^2


@pytest.mark.parametrize("rank", [0, 4, 16, closed_form.DIM])
def test_the_excess_that_width_forces_is_attained_by_the_best_network_and_no_smaller_one(rank):
    """The best output of a network, less its smallest DIM - WIDTH energies, has the stated excess, by drawing."""
    n, data, generator = 100_000, closed_form.Gaussian(0, "cpu"), random_stream(0, "test")
    level = torch.tensor([[0.3]])
    x = torch.lerp(data.sample(n, generator), torch.randn(n, closed_form.DIM, generator=generator), level)
    velocity = data.velocity(x, level) @ data.axes
    outside = velocity - x @ data.axes / level  # E[-x0 | x_sigma] / sigma: what a network can add outside the basis
    energy = torch.cat([velocity[:, :rank], outside[:, rank:]], 1).square()
    least = energy[:, energy.mean(0).argsort()[: closed_form.DIM - closed_form.WIDTH]].sum(1) / closed_form.DIM
    assert abs(least.mean() - data.forced(level, rank).item()) < 6 * least.std() / n**0.5


# ---- rank_sweep ------------------------------------------------------------------------------------------------------


def test_fresh_data_is_on_the_surface_and_a_step_outside_is_that_far_from_it():
    """In float32, numbers of a few units in 16 dimensions: errors below 1e-5."""
    data = ToyData("rings", 16, detail=0.5)
    x = data.sample(1000, random_stream(0, "test"))
    assert off_surface(x, data) < 1e-5
    assert off_surface(x + 0.3 * data.outside[:, 0], data) == pytest.approx(0.3, abs=1e-5)


# ---- latent_to_pixel -------------------------------------------------------------------------------------------------


@given(SEEDS, SCALES, st.integers(1, 4))
def test_procrustes_finds_the_planted_basis_and_scale(seed, scale, rank):
    """Exactly, when pixels are lifted latents: to 1e-8, as 50 random vectors in 4 dimensions are never near a line."""
    generator, basis = planted(seed, rank=rank)
    z = torch.randn(50, rank, generator=generator, **DOUBLE)
    found, s = procrustes(z, scale * z @ basis.mT)
    torch.testing.assert_close(found, basis, rtol=0, atol=1e-8)
    assert s == pytest.approx(scale, rel=1e-8)


@given(SEEDS)
def test_procrustes_agrees_with_scipy_on_noisy_pairs(seed):
    """scipy wants square problems: latents with as many dimensions as pixels."""
    generator, _ = planted(seed)
    z, x = torch.randn(2, 50, 5, generator=generator, **DOUBLE)
    expected, _ = scipy.linalg.orthogonal_procrustes(z.numpy(), x.numpy())
    found, _ = procrustes(z, x)
    np.testing.assert_allclose(found.mT.numpy(), expected, atol=1e-8)


@given(SEEDS, SCALES, st.floats(1e-3, 1))
def test_a_perfect_network_gives_the_velocity_at_every_scale(seed, scale, sigma):
    """u_a = P eps - x0 / s. Rounding: numbers up to 20 times 1 / sigma, 7 dimensions; 1e-9 is ample in float64."""
    generator, basis = planted(seed)
    x0, eps = torch.randn(2, 20, 7, generator=generator, **DOUBLE)
    oracle = lambda x, tau: eps @ basis @ basis.mT - x0 / scale
    level = torch.full((20, 1), sigma, **DOUBLE)
    u = ScaledFlow(oracle, basis, scale)(torch.lerp(x0, eps, level), level)
    torch.testing.assert_close(u, eps - x0, rtol=0, atol=1e-9)


@given(SEEDS, SCALES, st.floats(0, 1))
def test_inside_the_subspace_a_pixel_network_sees_the_latent_path(seed, scale, sigma):
    generator, basis = planted(seed)
    z, noise = torch.randn(20, 2, generator=generator, **DOUBLE), torch.randn(20, 7, generator=generator, **DOUBLE)
    x_sigma, k = (1 - sigma) * scale * z @ basis.mT + sigma * noise, zoom(sigma, scale)
    tau = k * sigma
    torch.testing.assert_close(k * x_sigma @ basis, (1 - tau) * z + tau * noise @ basis, rtol=0, atol=1e-12)


def double_network(dim, seed):
    """An MLP in float64 whose output is not zero."""
    torch.manual_seed(seed)
    network = MLP(dim, 8).double()
    for weight in network.output.parameters():
        torch.nn.init.normal_(weight)
    return network


@given(SEEDS)
def test_a_scale_of_1_is_nano_asymflow_and_a_lifted_network_is_the_latent_one(seed):
    generator, basis = planted(seed)
    x, sigma = torch.randn(5, 7, generator=generator, **DOUBLE), torch.rand(5, 1, generator=generator, **DOUBLE) + 0.1
    latent = double_network(2, seed % 1000)
    pixel = lift(latent, basis)
    torch.testing.assert_close(pixel(x, sigma) @ basis, latent(x @ basis, sigma), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        ScaledFlow(pixel, basis, 1.0)(x, sigma), Flow(pixel, basis)(x, sigma), rtol=0, atol=1e-11
    )


@given(SEEDS, SCALES)
def test_where_the_latent_model_knows_everything_the_variance_reduced_loss_is_the_plain_one(seed, scale):
    """Then nothing can be foreseen better: d_low = 0, and the target is the data. Otherwise the two losses differ."""
    generator, basis = planted(seed)
    x0, eps = torch.randn(2, 9, 7, generator=generator, **DOUBLE)
    sigma = 0.5 + 0.4 * torch.rand(9, 1, generator=generator, **DOUBLE)
    encode, flow = (lambda x: x @ basis / scale), Flow(double_network(7, 0), basis)
    know = {"basis": basis, "scale": scale, "encode": encode}
    plain = flow_loss(flow, x0, eps, sigma)
    oracle = lambda z_tau, tau: eps @ basis - encode(x0)
    blind = lambda z_tau, tau: torch.zeros_like(z_tau)
    torch.testing.assert_close(variance_reduced_loss(flow, x0, eps, sigma, latent=oracle, **know), plain)
    other = variance_reduced_loss(flow, x0, eps, sigma, latent=blind, **know).item()
    assert other != pytest.approx(plain.item(), rel=1e-9)


# ---- What all of them do with their files ----------------------------------------------------------------------------


def test_an_earlier_file_is_renamed_and_never_overwritten(tmp_path):
    file = tmp_path / "results.json"
    assert common.keep_earlier(file) == file
    for n in range(5):
        file.write_text(str(n))
        assert common.keep_earlier(file) == file
        assert not file.exists()
    assert sorted(f.read_text() for f in tmp_path.iterdir()) == list("01234")
    assert all(f.suffix == ".json" for f in tmp_path.iterdir())
    file.symlink_to(tmp_path / "nowhere")
    common.keep_earlier(file)
    assert (tmp_path / "results.6.json").is_symlink()


# ---- digits ----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(0.1, 5))
def test_the_frechet_distance_is_0_from_itself_the_square_of_a_shift_and_that_of_normal_distributions(seed, scale):
    """Scaled by c, covariance C becomes c^2 C: the distance is tr(C) (c - 1)^2, if the means are 0."""
    a = np.random.default_rng(seed).normal(size=(40, 3))
    a -= a.mean(0)
    energy = np.trace(np.cov(a.T))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6 * energy)
    assert frechet(a, a + np.array([scale, 0, 0])) == pytest.approx(scale**2, rel=1e-6, abs=1e-6 * energy)
    assert frechet(a, scale * a) == pytest.approx(energy * (scale - 1) ** 2, rel=1e-6, abs=1e-6 * energy * scale)


def test_nearest_neighbours_tell_far_sets_apart_and_copies_fool_them():
    """Two sets of one distribution: one half, to 5 standard errors of 1,000 votes, of which neighbours share some."""
    real, other = torch.randn(2, 1000, 3, generator=random_stream(0, "test"))
    assert one_nn(other + 100, real) == 1
    assert one_nn(real + 1e-4, real) == 0
    assert abs(one_nn(other, real) - 0.5) < 2 * 5 * 0.5 / 1000**0.5


# ---- shapes_oracle ---------------------------------------------------------------------------------------------------


def test_pictures_get_the_noise_and_the_blur_that_are_named():
    """Noise to 5 standard errors, blur to the rounding of one level, against scipy's sampled kernel; of 0, nothing."""
    pictures = [render(make_scene(shapes_oracle.FIRST_SEED, index), 64) for index in range(3)]
    for damage in (shapes_oracle.with_noise, shapes_oracle.with_blur):
        assert all(map(torch.equal, damage(pictures, 0), pictures))
    grey = [torch.full((3, 64, 64), 128, dtype=torch.uint8)] * 2
    one, other = (picture.double() - 128 for picture in shapes_oracle.with_noise(grey, 20))
    for noise in (one, other):
        assert abs(noise.std() - (20**2 + 1 / 12) ** 0.5) < 5 * 20 / (2 * noise.numel()) ** 0.5
    assert abs((one * other).mean()) < 5 * 20**2 / one.numel() ** 0.5
    for picture, soft in zip(pictures, shapes_oracle.with_blur(pictures, 2), strict=True):
        expected = scipy.ndimage.gaussian_filter(picture.double().numpy(), (0, 2, 2), mode="wrap")
        assert np.abs(soft.numpy() - expected).max() < 1


# ---- The command line they share -------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Run an experiment that does nothing but note its arguments; return the exit code."""

    def experiment(args):
        figure = Figure()
        figure.subplots().plot([0, 1], [0, args.seed])
        return figure, {"noise": torch.rand(3, generator=random_stream(args.seed, "test")).tolist()}

    def run(*argv, experiment=experiment, **options):
        argv = ["--out", str(tmp_path / "out"), *argv]
        return common.main("trial", experiment, "About.", argv=argv, **{"steps": 30, "quick_steps": 3} | options)

    return run


def results(tmp_path):
    return json.loads((tmp_path / "out" / "trial.json").read_text())


def test_an_experiment_leaves_a_picture_and_its_settings_and_never_overwrites(run, tmp_path):
    assert run() == 0
    assert run("--quick", "--seed", "7") == 0
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["trial.1.json", "trial.1.png", "trial.json", "trial.png"]
    assert {"quick": True, "seed": 7, "steps": 3}.items() <= results(tmp_path).items()
    assert {"quick": False, "seed": 0, "steps": 30}.items() <= json.loads(
        (tmp_path / "out" / "trial.1.json").read_text()
    ).items()
    assert matplotlib.image.imread(tmp_path / "out" / "trial.png").std() > 0.01
    assert run("--quick", "--steps", "5") == 0
    assert results(tmp_path)["steps"] == 5


@pytest.mark.parametrize(
    "argv",
    ["--steps -1", "--steps many", "--seed -1", "--device nonsense", "--nonsense", "--quickly", "--out {file}/below"],
)
def test_what_makes_no_sense_ends_in_one_line(run, tmp_path, capsys, argv):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        run(*argv.format(file=tmp_path / "file").split())
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert argv.split()[0] in line


def test_what_an_experiment_has_no_use_for_it_does_not_take(run, tmp_path, capsys):
    for option, without in ((["--steps", "5"], {"steps": 0}), (["--device", "cpu"], {"devices": False})):
        with pytest.raises(SystemExit):
            run(*option, **without)
        assert f"unrecognized arguments: {option[0]}" in capsys.readouterr().err
        assert run(**without) == 0
    assert {"steps": 30, "device": "cpu"}.items() <= results(tmp_path).items()


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("a\nb"), 2), (OSError("a"), 2), (RuntimeError("a"), 2), (KeyboardInterrupt(), 130)]
)
def test_an_experiment_that_fails_ends_in_one_line_and_writes_nothing(run, tmp_path, capsys, error, code):
    def fail(args):
        raise error

    assert run(experiment=fail) == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []
