"""Bases: the normal law against scipy; a base of one's own is accepted or, where a formula needs a normal law, refused."""

from __future__ import annotations

import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jflow import bases, couplings, datasets, interpolants, likelihood, objectives, oracles, samplers, solvers, types

LINEAR = interpolants.linear()
MEAN = {"a": np.array([0.7, -1.2]), "b": np.array(0.3)}
STD = {"a": np.array([0.4, 2.5]), "b": np.array(1.7)}
EVENT = {"a": jax.ShapeDtypeStruct((2,), jnp.float64), "b": jax.ShapeDtypeStruct((), jnp.float32)}
LAWS = [bases.Normal(), bases.Normal(-0.5, 2), bases.Normal(MEAN, 0.3), bases.Normal(MEAN, STD)]


class Cube:
    """Uniform on [-1, 2]^d: no pytree, and nothing but the four members of a base."""

    name = "cube"

    def sample(self, key, like, shape=()):
        leaves, structure = jax.tree.flatten(like)
        keys = jax.random.split(key, len(leaves))
        drawn = [
            jax.random.uniform(k, (*shape, *leaf.shape), leaf.dtype, -1.0, 2.0)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, drawn)

    def log_density(self, x):
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(x)])
        return jnp.where(jnp.all((flat >= -1.0) & (flat <= 2.0)), -flat.size * np.log(3.0), -jnp.inf)

    def score(self, x):
        return jax.tree.map(jnp.zeros_like, x)


def entries(law, which):
    """Mean or deviation of the three entries of EVENT."""
    value = getattr(law, which)
    return (
        np.full(3, value) if np.ndim(value) == 0 and not isinstance(value, dict) else np.append(value["a"], value["b"])
    )


def flat(x):
    return np.concatenate([np.atleast_1d(np.asarray(x["a"], float)), np.atleast_1d(np.asarray(x["b"], float))])


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_density_and_score_are_those_of_scipys_normal(law):
    x = {"a": jnp.array([0.2, -3.0]), "b": jnp.float32(1.5)}
    want = stats.norm(entries(law, "mean"), entries(law, "std")).logpdf(flat(x)).sum()
    np.testing.assert_allclose(law.log_density(x), want, rtol=1e-12)
    score = law.score(x)
    assert (score["a"].dtype, score["b"].dtype) == (jnp.float64, jnp.float32)
    np.testing.assert_allclose(flat(score), (entries(law, "mean") - flat(x)) / entries(law, "std") ** 2, rtol=1e-6)
    found = jax.jit(lambda law, x: jax.grad(law.log_density)(x))(law, x)
    np.testing.assert_allclose(flat(found), flat(score), rtol=1e-6)


def test_normals_are_equal_by_their_values():
    assert bases.Normal() == bases.STANDARD_NORMAL == bases.Normal(0, 1) == bases.Normal(np.float32(0.0), jnp.ones(()))
    same = [bases.Normal(make([0.5, 1.0])) for make in (np.array, jnp.array)]
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    assert bases.Normal() != bases.Normal(std=2.0) and bases.Normal(np.zeros(2)) not in (bases.Normal(np.ones(2)), None)
    assert bases.Normal(MEAN, STD) == bases.Normal(MEAN, STD) != bases.Normal(MEAN, 1.0)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_samples_have_the_law_in_every_entry_and_with_any_leading_axes(law, assert_mean):
    x = jax.jit(law.sample, static_argnums=2)(jax.random.key(0), jax.tree.map(jnp.zeros_like, EVENT_ARRAYS), (200, 100))
    assert x["a"].shape == (200, 100, 2) and x["b"].shape == (200, 100) and x["b"].dtype == jnp.float32
    rows = np.concatenate([np.asarray(x["a"]).reshape(-1, 2), np.asarray(x["b"], np.float64).reshape(-1, 1)], axis=1)
    z = (rows - entries(law, "mean")) / entries(law, "std")
    assert_mean(z, 0.0)
    assert_mean(z**2, 1.0)
    assert_mean(z[:, 0] * z[:, 1], 0.0)
    assert_mean(z[:, 0] * z[:, 2], 0.0)
    one = law.sample(jax.random.key(1), EVENT)
    assert one["a"].shape == (2,) and one["b"].shape == ()


EVENT_ARRAYS = {"a": np.zeros(2), "b": np.zeros((), np.float32)}


def test_a_mean_of_the_shape_of_the_leading_axes_is_not_taken_for_them():
    law = bases.Normal(jnp.array([0.0, 100.0]), 1e-3)
    x = law.sample(jax.random.key(0), jax.ShapeDtypeStruct((2,), jnp.float64), (2,))
    np.testing.assert_allclose(x, [[0.0, 100.0], [0.0, 100.0]], atol=0.1)


def test_the_default_is_the_stream_of_one_key_for_each_leaf_drawn_in_float32_at_least():
    key, like = jax.random.key(3), {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros((2, 2))}
    x = bases.STANDARD_NORMAL.sample(key, like, (5,))
    first, second = jax.random.split(jax.random.clone(key), 2)
    np.testing.assert_array_equal(x["a"], jax.random.normal(first, (5, 3), jnp.float32).astype(jnp.bfloat16))
    np.testing.assert_array_equal(x["b"], jax.random.normal(second, (5, 2, 2), jnp.float64))
    batch = jax.tree.map(lambda leaf: jnp.zeros((5, *leaf.shape), leaf.dtype), like)
    paired = couplings.independent(jax.random.clone(key), batch)
    jax.tree.map(np.testing.assert_array_equal, paired, x)


def test_a_normal_of_numbers_is_hashable_and_any_is_a_pytree_with_a_short_repr():
    assert bases.Normal() == bases.STANDARD_NORMAL and len({bases.Normal(), bases.Normal(0, 1)}) == 1
    static = jax.jit(lambda x, base: base.log_density(x), static_argnames="base")
    np.testing.assert_allclose(static(jnp.zeros(2), base=bases.Normal(std=3.0)), -2 * np.log(3) - np.log(2 * np.pi))
    law = bases.Normal(MEAN, 2.0)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, law)
    np.testing.assert_array_equal(doubled.mean["a"], 2 * MEAN["a"])
    assert doubled.std == 4.0
    assert repr(bases.Normal()) == "Normal(mean=0.0, std=1.0)"
    assert repr(bases.Normal(np.zeros(10_000))) == "Normal(mean=float64[10000], std=1.0)"
    means = jax.vmap(lambda law: law.log_density(jnp.float64(1.0)))(bases.Normal(jnp.arange(3.0), jnp.ones(3)))
    np.testing.assert_allclose(means, stats.norm(np.arange(3.0)).logpdf(1.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bases.Normal(std=0.0), ValueError, "std: expected positive finite"),
        (lambda: bases.Normal(std=np.array([1.0, -1.0])), ValueError, "std: expected positive finite"),
        (lambda: bases.Normal(std={"a": np.nan}), ValueError, "std: expected positive finite"),
        (lambda: bases.Normal(mean=jnp.array([np.inf])), ValueError, "mean: expected finite"),
        (lambda: bases.Normal(mean="0"), TypeError, "mean: expected real numbers.*str"),
        (lambda: bases.Normal(std=True), TypeError, "std: expected real numbers.*bool"),
        (lambda: bases.Normal(mean=None), TypeError, "mean: expected a number"),
        (
            lambda: bases.Normal(np.zeros(3)).log_density(jnp.zeros(2)),
            ValueError,
            r"base.mean: .*\(2,\), got shape \(3,\)",
        ),
        (lambda: bases.Normal(std=np.ones(2)).score({"a": jnp.zeros(2)}), ValueError, "base.std: .*structure"),
        (lambda: bases.Normal().log_density(jnp.arange(3)), TypeError, "x: expected floating"),
        (lambda: bases.check(bases.Normal), TypeError, "base: expected a base.*Normal itself"),
        (lambda: couplings.Independent(lambda x: x), TypeError, "base: expected a base.*function"),
        (lambda: likelihood.along_ode(lambda p, t, x, c=None, *, key=None: x, base=0.5), TypeError, "got float"),
        (lambda: bases.gaussian(None, "f"), TypeError, "base: expected a base.*NoneType"),
    ],
)
def test_wrong_bases_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- a base of one's own ----------------------------------------------------------------------------------------------


def shifted(params, s, t, x, cond=None, *, key=None):
    """The mean velocity of x0 -> 2 x0 + 1 by the ODE dx/dt = log(2) (x + 1)."""
    return ((x + 1.0) * (2.0 ** (t - s)) - 1.0 - x) / (t - s)


def rate(params, t, x, cond=None, *, key=None):
    return np.log(2.0) * (x + 1.0)


GROWS = types.FlowMap(shifted, types.BOTH, velocity_override=rate).bind(None)


def test_the_base_of_the_docstring_is_the_law_that_it_says():
    source = textwrap.dedent("    class Laplace:" + bases.__doc__.split("    class Laplace:")[1])
    space = {"jax": jax, "jnp": jnp, "objectives": objectives, "interpolants": interpolants, "flow_map": GROWS.flow_map}
    exec(source, space)
    base, x = space["objective"].coupling.base, jnp.array([0.3, -1.7])
    assert isinstance(base, space["Laplace"])
    np.testing.assert_allclose(base.log_density(x), stats.laplace.logpdf(x).sum(), rtol=1e-6)
    np.testing.assert_allclose(base.score(x), jax.grad(base.log_density)(x), rtol=1e-6)
    drawn = couplings.Independent(base)(jax.random.key(0), jnp.zeros((4000, 2)))
    assert stats.kstest(np.ravel(drawn), "laplace").pvalue > 0.01
    batch = types.Batch(jnp.zeros((8, 2)))
    assert jax.eval_shape(space["objective"], None, jax.random.key(1), batch)[0].shape == (8,)


@pytest.mark.slow
def test_any_base_serves_densities_of_jumps_and_of_the_ode():
    """Uniform on [-1, 2]^2 comes out as uniform on [-1, 5]^2."""
    inside, outside = jnp.array([4.9, -0.9]), jnp.array([5.1, 0.0])
    ode = likelihood.along_ode(rate, base=Cube())
    for at in (ode.log_density(None, inside), likelihood.log_density(GROWS, inside, [0.0, 0.4, 1.0], base=Cube())):
        np.testing.assert_allclose(at.log_density, -2 * np.log(6.0), rtol=1e-7)
    pushed = likelihood.push(GROWS, jnp.array([1.9, -0.5]), [0.0, 0.4, 1.0], base=Cube())
    np.testing.assert_allclose(pushed.log_density, -2 * np.log(6.0), rtol=1e-12)
    assert ode.log_density(None, outside).log_density == -jnp.inf
    objective = likelihood.maximum_likelihood(rate, base=Cube())
    loss, _ = jax.jit(objective)(None, jax.random.key(0), types.Batch(inside[None]))
    np.testing.assert_allclose(loss, 2 * np.log(6.0), rtol=1e-5)


def test_any_base_serves_couplings_pairs_of_a_map_and_samplers():
    x1 = jnp.zeros((4000, 2))
    for x0 in (
        couplings.Independent(Cube())(jax.random.key(0), x1),
        couplings.reflow(GROWS, jax.random.key(1), x1[0], 4000, base=Cube()).x0,
    ):
        assert float(jnp.min(x0)) >= -1.0 and float(jnp.max(x0)) <= 2.0
        assert abs(float(jnp.mean(x0)) - 0.5) < 4 * np.sqrt(0.75 / 8000)
    drawn = samplers.draw(samplers.Jumps(GROWS), jax.random.key(2), 4000, [0.0, 1.0], like=x1[0], base=Cube())
    assert drawn.min() >= -1.0 and drawn.max() <= 5.0
    assert abs(drawn.mean() - 2.0) < 4 * np.sqrt(3.0 / 8000)


def test_any_base_serves_optimal_transport():
    pytest.importorskip("ott")
    x0 = couplings.sinkhorn(base=Cube())(jax.random.key(3), jnp.linspace(-1.0, 1.0, 64)[:, None])
    assert float(jnp.min(x0)) >= -1.0 and float(jnp.max(x0)) <= 2.0


X, T = jnp.zeros(2), 0.4
ONLY_GAUSSIAN = {
    "interpolants.convert to the score": lambda b: interpolants.convert(LINEAR, T, X, X, "data", "score", base=b),
    "interpolants.convert from the score": lambda b: interpolants.convert(LINEAR, T, X, X, "score", "noise", base=b),
    "solvers.sde": lambda b: solvers.sde(rate, LINEAR, base=b),
    "samplers.renoise": lambda b: samplers.renoise(
        GROWS, X, [0.0, 0.5], key=jax.random.key(0), interpolant=LINEAR, kappa=1.0, base=b
    ),
    "velocity_estimates.batch": lambda b: objectives.flow_matching(
        GROWS.flow_map, LINEAR, base=b, velocity=objectives.velocity_estimates.batch
    ),
    "oracles.gaussian": lambda b: oracles.gaussian(LINEAR, base=b),
    "oracles.mixture": lambda b: oracles.mixture(LINEAR, base=b),
    "oracles.quantile": lambda b: oracles.quantile(LINEAR, base=b),
}
ALSO = {
    "sde sampler": lambda b: samplers.sde(GROWS, X, [0.0, 0.5], key=jax.random.key(0), interpolant=LINEAR, base=b),
    "sde state": lambda b: samplers.SDE(GROWS, LINEAR, base=b).init(X, 0.0),
    "renoise state": lambda b: samplers.Renoise(GROWS, LINEAR, 0.5, base=b).init(X, 0.0),
    "renoised": lambda b: likelihood.renoised(
        GROWS, X[None], [0.0, 0.5, 1.0], keys=jax.random.split(jax.random.key(0), 1), interpolant=LINEAR, base=b
    ),
}


@pytest.mark.parametrize("name", [*ONLY_GAUSSIAN, *ALSO])
def test_formulas_of_a_gaussian_base_refuse_another_by_name(name):
    who = re.escape(name) if name in ONLY_GAUSSIAN else "(solvers.sde|samplers.renoise)"
    with pytest.raises(ValueError, match=f"base: {who} holds for a Gaussian base only.*'cube'"):
        {**ONLY_GAUSSIAN, **ALSO}[name](Cube())


def test_conversions_without_a_score_take_any_base():
    for source, target in (("velocity", "noise"), ("noise", "data"), ("data", "velocity")):
        assert jnp.all(jnp.isfinite(interpolants.convert(LINEAR, T, X, X, source, target, base=Cube())))


def test_examples_of_the_datasets_are_no_bases():
    with pytest.raises(TypeError, match="base: expected a base"):
        likelihood.push(GROWS, X, [0.0, 1.0], base=datasets.checkerboard)
