"""Formulas that read the mean and deviation of a normal base, against closed forms; neither is at its default."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from jflow import bases, interpolants, likelihood, oracles, samplers, solvers
from jflow.objectives import Row, velocity_estimates

NUMBERS = bases.Normal(0.8, 0.6)
ENTRIES = bases.Normal(np.array([0.8, -1.3]), np.array([0.6, 1.9]))
BASES = {"numbers": NUMBERS, "entries": ENTRIES, "mean alone": bases.Normal(np.array([0.8, -1.3]))}
WEIGHTS = np.array([0.7, 0.3])
MEANS = np.array([[-1.0, 0.5], [1.4, -0.3]])
COVS = np.array([[[0.5, 0.2], [0.2, 0.3]], [[0.15, -0.05], [-0.05, 0.4]]])
PARAMS = {
    "gaussian": oracles.gaussian_params(MEANS[0], COVS[0]),
    "mixture": oracles.mixture_params(WEIGHTS, MEANS, COVS),
    "quantile": oracles.mixture_params(WEIGHTS, MEANS[:, :1], COVS[:, :1, :1]),
}
LINE = {"numbers": NUMBERS, "entries": bases.Normal(np.array([0.8]), np.array([0.6]))}
X = np.array([[0.4, -1.0], [1.3, 0.2], [-0.7, 0.9]])
TIMES = np.array([0.0, 0.3, 0.55, 0.8, 1.0])


def moments(base):
    return (np.broadcast_to(value, 2) for value in (base.mean, base.std))


def log_density(base, alpha, beta, x):
    """log rho_t by scipy: sum_k w_k N(alpha m0 + beta m_k, alpha^2 diag(s^2) + beta^2 C_k)."""
    mean, std = moments(base)
    joint = [
        np.log(w) + multivariate_normal(alpha * mean + beta * m, np.diag((alpha * std) ** 2) + beta**2 * c).logpdf(x)
        for w, m, c in zip(WEIGHTS, MEANS, COVS, strict=True)
    ]
    return logsumexp(joint, axis=0)


@functools.cache
def make(name, base, path="linear"):
    law = (LINE if name == "quantile" else BASES)[base]
    return oracles.ORACLES[name](interpolants.INTERPOLANTS[path](), base=law)


# --- oracles ----------------------------------------------------------------------------------------------------------


@pytest.mark.representatives("linear-entries", "variance_exploding-numbers")
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("path", ["linear", "variance_exploding"])
def test_density_score_denoiser_and_velocity_of_the_oracle(base, path):
    """The density by scipy; its gradient; Tweedie for the base's mean and deviation; d rho/dt + div(rho b) = 0."""
    oracle, p = make("mixture", base, path), PARAMS["mixture"]

    def at(t, x):
        log_rho, gradient = jax.value_and_grad(lambda x: oracle.log_density(p, t, x))(x)
        in_time = jax.jvp(lambda t: oracle.log_density(p, t, x), (t,), (jnp.ones_like(t),))[1]
        b = oracle.velocity(p, t, x)
        divergence = jnp.trace(jax.jacfwd(lambda x: oracle.velocity(p, t, x))(x))
        law = oracle.marginal(p, t)
        return (
            log_rho,
            gradient,
            oracle.score(p, t, x),
            oracle.denoiser(p, t, x),
            b,
            in_time + divergence + gradient @ b,
            law,
        )

    t, x = (jnp.asarray(values) for values in (np.repeat(TIMES, 3), np.tile(X, (5, 1))))
    log_rho, gradient, score, denoiser, b, balance, law = jax.jit(jax.vmap(at))(t, x)
    c = jax.tree.map(np.asarray, jax.vmap(oracle.interpolant.coefficients)(t))
    law = jax.tree.map(np.asarray, law)
    x, score, denoiser = (np.asarray(value) for value in (x, score, denoiser))
    mean, std = moments(BASES[base])
    for i in range(len(t)):
        want = log_density(BASES[base], float(c.alpha[i]), float(c.beta[i]), np.asarray(x[i]))
        np.testing.assert_allclose(log_rho[i], want, rtol=1e-10, atol=1e-10)
        cov = np.einsum("kia,ka,kja->kij", law.bases[i], law.variances[i], law.bases[i])
        np.testing.assert_allclose(
            cov, np.diag((c.alpha[i] * std) ** 2) + c.beta[i] ** 2 * COVS, rtol=1e-10, atol=1e-12
        )
        np.testing.assert_allclose(law.means[i], c.alpha[i] * mean + c.beta[i] * MEANS, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(score, gradient, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(balance, 0.0, atol=1e-8)
    alpha, beta = c.alpha[:, None], c.beta[:, None]
    noise = mean - alpha * std**2 * score
    np.testing.assert_allclose(alpha * noise + beta * denoiser, x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(c.alpha_dot[:, None] * noise + c.beta_dot[:, None] * denoiser, b, rtol=1e-8, atol=1e-8)


@pytest.mark.representatives("gaussian-entries")
@pytest.mark.parametrize("base", [pytest.param("numbers", marks=pytest.mark.slow), "entries"])
@pytest.mark.parametrize("name", ["gaussian", "mixture", "quantile"])
def test_the_map_of_the_oracle_is_a_solve_of_its_velocity(name, base):
    oracle, p = make(name, base, "trigonometric"), PARAMS[name]
    solved = solvers.solve(oracle.velocity, "tsit5", rtol=1e-10, atol=1e-10)
    x = jnp.asarray(X if name != "quantile" else X[:, :1])

    def both(s, t, x):
        diagonal = oracle.flow_map.mean_velocity(p, s, s, x)
        return oracle.flow_map.jump(p, s, t, x), solved.jump(p, s, t, x), diagonal, oracle.velocity(p, s, x)

    compiled = jax.jit(jax.vmap(both, (None, None, 0)))
    for s, t in ((0.0, 1.0), (0.0, 0.4), (0.9, 0.2)):
        exact, found, diagonal, b = compiled(jnp.float64(s), jnp.float64(t), x)
        np.testing.assert_allclose(exact, found, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(diagonal, b, rtol=1e-9, atol=1e-9)


def test_a_deviation_of_equal_entries_is_a_number():
    equal = oracles.mixture(interpolants.linear(), base=bases.Normal(0.8, np.array([0.6, 0.6])))
    methods = ("velocity", "score", "denoiser", "log_density")
    one, other = (
        jax.jit(lambda x, o=o: [getattr(o, method)(PARAMS["mixture"], 0.4, x) for method in methods])(X[0])
        for o in (make("mixture", "numbers"), equal)
    )
    for got, want in zip(one, other, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11)


# --- conversions, the batch's velocity --------------------------------------------------------------------------------


@functools.cache
def conversions(base):
    """The exact values of each kind, and each converted to each, in one program."""
    oracle, p, t = make("mixture", base, "trigonometric"), PARAMS["mixture"], 0.4

    @jax.jit
    def both(x):
        c = oracle.interpolant.coefficients(t)
        data = oracle.denoiser(p, t, x)
        values = {
            "velocity": oracle.velocity(p, t, x),
            "score": jax.grad(lambda x: oracle.log_density(p, t, x))(x),
            "noise": (x - c.beta * data) / c.alpha,
            "data": data,
        }
        convert = functools.partial(interpolants.convert, oracle.interpolant, t, x, base=BASES[base])
        return values, {a: {b: convert(values[a], a, b) for b in interpolants.KINDS} for a in interpolants.KINDS}

    return both(X[0])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("source", interpolants.KINDS)
@pytest.mark.parametrize("target", interpolants.KINDS)
def test_conversions_are_those_of_the_exact_law(base, source, target):
    values, converted = conversions(base)
    np.testing.assert_allclose(converted[source][target], values[target], rtol=1e-8)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("t", [0.0, 0.5, 0.95])
def test_the_batchs_velocity_is_the_conditional_mean_given_the_point(base, t):
    """Of data that are the batch itself; whichever pair made the point."""
    path, law = interpolants.trigonometric(), BASES[base]
    mean, std = moments(law)
    c = jax.tree.map(np.asarray, path.coefficients(jnp.float64(t)))
    data = np.random.default_rng(0).normal(0.3, 0.5, (12, 2))
    x = c.alpha * (mean + std * X[0]) + c.beta * data[0]
    p = np.exp(-0.5 * np.sum(((x - c.beta * data - c.alpha * mean) / (c.alpha * std)) ** 2, axis=1))
    x0 = (x - c.beta * data) / c.alpha
    want = np.sum((p / p.sum())[:, None] * (c.alpha_dot * x0 + c.beta_dot * data), axis=0)
    for got in estimates(base)(t, x0, data, data):
        np.testing.assert_allclose(got, want, rtol=1e-9)


@functools.cache
def estimates(base):
    path, law = interpolants.trigonometric(), BASES[base]
    of_row = lambda t, x0, x1, data: velocity_estimates.batch(blank_row(path, t, x0, x1, data, law))  # noqa: E731
    return jax.jit(jax.vmap(of_row, (None, 0, 0, None)))


def blank_row(path, t, x0, x1, data, law):
    """A Row with the fields that the estimate of the batch's velocity reads."""
    rest = dict.fromkeys(("cond", "key", "gamma", "step", "own", "frozen", "ema", "teacher", "estimate"))
    t, x = jnp.asarray(t), path.interpolate(t, x0, x1)
    return Row(s=t, t=t, x0=x0, x1=x1, x=x, data=data, interpolant=path, base=law, **rest)


# --- the SDE and re-noising -------------------------------------------------------------------------------------------

COUNT = 12_000


def off(samples, law):
    """Errors of the mean, variance, third central moment and covariance, in units of four standard errors."""
    weights, means = np.exp(np.asarray(law.log_weights)), np.asarray(law.means)
    covs = np.einsum("kia,ka,kja->kij", *(np.asarray(value) for value in (law.bases, law.variances, law.bases)))
    mean = weights @ means
    shift = means - mean
    variances = np.einsum("kii->ki", covs)
    want = [np.zeros_like(mean), weights @ (variances + shift**2), weights @ (shift**3 + 3 * shift * variances)]
    d = np.asarray(samples, np.float64) - mean
    rows = [d, d**2, d**3]
    if d.shape[1] == 2:
        rows.append(d[:, :1] * d[:, 1:])
        want.append(np.array([weights @ (covs[:, 0, 1] + shift[:, 0] * shift[:, 1])]))
    return max(
        float(np.max(np.abs(row.mean(0) - value) / (4 * row.std(0) / np.sqrt(len(d)))))
        for row, value in zip(rows, want, strict=True)
    )


def started(oracle, p, key, t=0.0, count=COUNT):
    return jax.jit(lambda key: oracle.sample(oracle.marginal(p, jnp.float64(t)), key, count))(key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "method", "diffusion"),
    [
        pytest.param("numbers", "heun", 1.0, marks=pytest.mark.slow),
        ("entries", "heun", 2.0),
        pytest.param("entries", "heun", lambda t: 1.2 * jnp.sqrt(1.0 - t), marks=pytest.mark.slow),
    ],
    ids=["number", "entries", "sigma"],
)
def test_the_sde_keeps_the_marginals(base, method, diffusion):
    """Half way, where the base still is in the law; with the standard normal's correction it does not."""
    oracle, p = make("mixture", base), PARAMS["mixture"]
    start_key, noise_key = jax.random.split(jax.random.key(5))
    x0, grid = started(oracle, p, start_key), jnp.linspace(0.0, 0.5, 21)

    @jax.jit
    def end(law):
        simulate = solvers.sde(oracle.velocity, oracle.interpolant, method=method, diffusion=diffusion, base=law)
        keys = jax.random.split(jax.random.clone(noise_key), COUNT)
        return jax.vmap(lambda key, x: simulate(p, key, grid, x))(keys, x0)

    law = oracle.marginal(p, jnp.float64(0.5))
    assert off(end(BASES[base]), law) < 1.0
    # Arrays of the shapes of the base's own, for one program.
    mean, std = np.zeros(np.shape(BASES[base].mean)), np.ones(np.shape(BASES[base].std))
    assert off(end(bases.Normal(mean, std)), law) > 2.0
    assert off(end(bases.Normal(mean, BASES[base].std)), law) > 2.0


def test_the_default_diffusion_is_proportional_to_the_deviation_and_its_correction_finite_at_both_ends():
    path, c = interpolants.linear(), 0.7
    step = solvers.sde_step(lambda p, t, x, cond=None, *, key=None: 0.3 * x, path, diffusion=c, base=ENTRIES)
    for s, t in ((0.0, 0.1), (0.9, 1.0)):
        x = jnp.asarray(X[0])
        keys = jax.random.split(jax.random.key(0), 4000)
        y, noise = jax.vmap(lambda k, s=s, t=t, x=x: step(None, k, s, t, x, like=x))(keys)
        mean, std = moments(ENTRIES)
        np.testing.assert_allclose(noise[0], np.sqrt(2 * c * (1 - s) * (t - s)) * std, rtol=1e-12)
        drift = 0.3 * X[0] + c * (s * 0.3 * X[0] - X[0] + mean)
        np.testing.assert_allclose(y.mean(0), X[0] + (t - s) * drift, atol=float(4 * np.max(noise[0]) / np.sqrt(4000)))
        np.testing.assert_allclose(y.std(0), noise[0], rtol=4 / np.sqrt(8000))


# Quick in samplers/test_renoising.
@pytest.mark.slow
@pytest.mark.parametrize("kappa", [0.5, 1.0])
@pytest.mark.parametrize("base", ["numbers", "entries"])
def test_renoise_keeps_the_marginals(base, kappa):
    """By the exact map of a mixture on the line; without the base's mean or deviation it does not."""
    oracle, p, grid, count = make("quantile", base), PARAMS["quantile"], [0.1, 0.3, 0.6], COUNT // 2
    start_key, key = jax.random.split(jax.random.key(6))
    x0, bound = started(oracle, p, start_key, grid[0], count), oracle.flow_map.bind(p)
    keys, law = jax.random.split(key, count), oracle.marginal(p, jnp.float64(grid[-1]))

    @jax.jit
    def run(law):
        sampler = samplers.Renoise(bound, oracle.interpolant, kappa, law)
        return jax.vmap(lambda k, x: samplers.run(sampler, k, x, grid))(keys, x0)

    own = LINE[base]
    assert off(run(own), law) < 1.0
    # Arrays of the shapes of the base's own, for one program.
    assert off(run(bases.Normal(np.zeros(np.shape(own.mean)), own.std)), law) > 2.0
    assert off(run(bases.Normal(own.mean, np.ones(np.shape(own.std)))), law) > 2.0


def test_renoise_of_entries_with_laws_of_their_own():
    oracle, p, grid = make("gaussian", "entries"), PARAMS["gaussian"], [0.0, 0.3, 0.5]
    start_key, key = jax.random.split(jax.random.key(7))
    x0, bound = started(oracle, p, start_key), oracle.flow_map.bind(p)
    sampler = samplers.Renoise(bound, oracle.interpolant, 0.8, ENTRIES)
    found = jax.jit(jax.vmap(lambda k, x: samplers.run(sampler, k, x, grid)))(jax.random.split(key, COUNT), x0)
    assert off(found, oracle.marginal(p, jnp.float64(0.5))) < 1.0


# --- likelihood -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("base", ["numbers", "entries"])
def test_the_density_along_the_ode_through_jumps_and_of_the_batch(base):
    oracle, p, law = make("gaussian", base), PARAMS["gaussian"], BASES[base]
    bound = oracle.flow_map.bind(p)
    ode = likelihood.along_ode(oracle.velocity, base=law, rtol=1e-9, atol=1e-9)

    @jax.jit
    @jax.vmap
    def densities(x):
        through = likelihood.log_density(bound, x, np.array([0.0, 0.6, 1.0]), base=law)
        of_another_base = likelihood.log_density(bound, x, [0.0, 1.0])
        found = (ode.log_density(p, x), through, of_another_base)
        return oracle.log_density(p, 1.0, x), *(each.log_density for each in found)

    want, along, through, other = densities(X)
    np.testing.assert_allclose(along, want, rtol=1e-7)
    np.testing.assert_allclose(through, want, rtol=1e-9)
    assert np.all(np.abs(other - want) > 1e-2)


@pytest.mark.slow
def test_the_density_of_renoised_samples_tends_to_the_data():
    oracle, p, count = make("gaussian", "entries"), PARAMS["gaussian"], 4096
    bound = oracle.flow_map.bind(p)
    base_key, key = jax.random.split(jax.random.key(8))
    x0, keys = ENTRIES.sample(base_key, jnp.zeros(2), (count,)), jax.random.split(key, count)
    grid = (0.0, 0.3, 0.6, 1.0)

    @jax.jit
    def density(x):
        before = likelihood.renoised(bound, x0, grid, keys=keys, interpolant=oracle.interpolant, base=ENTRIES)
        at = jax.vmap(lambda x: likelihood.log_density(bound, x, grid[-2:], base=before.base).log_density)(x)
        want = jax.vmap(lambda x: oracle.log_density(p, 1.0, x))(x)
        x = before.states[0]
        drawn = before.base.sample(jax.random.key(9), x, (20_000,))
        return at, want, before.base.score(x), jax.grad(before.base.log_density)(x), drawn

    at, want, score, gradient, drawn = density(X[:2])
    np.testing.assert_allclose(at, want, atol=0.15)
    np.testing.assert_allclose(score, gradient, rtol=1e-12)
    law = oracle.marginal(p, jnp.float64(0.6))
    np.testing.assert_allclose(np.mean(drawn, axis=0), law.means[0], atol=0.05)
    cov = np.asarray(law.bases[0]) * np.asarray(law.variances[0]) @ np.asarray(law.bases[0]).T
    np.testing.assert_allclose(np.cov(np.asarray(drawn).T), cov, atol=0.06)
