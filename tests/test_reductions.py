"""Reductions against their formulas, and their stop-gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import reductions

D = {"a": jnp.array([0.3, -0.4]), "b": jnp.array([[1.2]])}
SQUARE = 0.09 + 0.16 + 1.44
FORMULAS = {
    "squared": (reductions.squared, SQUARE, 2.0),
    "adaptive": (reductions.adaptive(0.75, 0.1), SQUARE / (SQUARE + 0.1) ** 0.75, 2 / (SQUARE + 0.1) ** 0.75),
    "normalised": (reductions.normalised(0.1), SQUARE / (SQUARE**0.5 + 0.1) ** 2, 2 / (SQUARE**0.5 + 0.1)),
    "clipped": (reductions.clipped(0.5), 0.25, 1.0 / SQUARE**0.5),
    "unclipped": (reductions.clipped(5.0), SQUARE, 2.0),
    "pseudo_huber": (reductions.pseudo_huber(0.2), (SQUARE + 0.04) ** 0.5 - 0.2, 1 / (SQUARE + 0.04) ** 0.5),
    "cauchy": (reductions.cauchy(0.7), 0.245 * np.log1p(SQUARE / 0.49), 1 / (1 + SQUARE / 0.49)),
}


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_value_and_gradient(name):
    """Each loss is radial: its gradient is a factor times D; the factor shows the stop-gradients."""
    reduction, value, factor = FORMULAS[name]
    found, gradient = jax.jit(jax.value_and_grad(lambda d: reduction(None, 0.0, 1.0, d)))(D)
    np.testing.assert_allclose(found, value, rtol=1e-12)
    for leaf, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(D), strict=True):
        np.testing.assert_allclose(leaf, factor * d, rtol=1e-12)


def test_clamped_cuts_every_entry_and_keeps_the_derivative():
    reduction = reductions.clamped(0.35)
    np.testing.assert_allclose(reduction(None, 0.0, 1.0, D), 0.09 + 2 * 0.35**2, rtol=1e-12)
    gradient = jax.grad(lambda d: reduction(None, 0.0, 1.0, d))(D)
    np.testing.assert_allclose(gradient["a"], [0.6, -0.7], rtol=1e-12)
    np.testing.assert_allclose(gradient["b"], [[0.7]], rtol=1e-12)


def test_a_value_is_shaped_before_the_reduction_that_follows():
    """The value of pseudo-Huber at D/(|D| + c); the gradient is its factor there times that value."""
    norm = SQUARE**0.5
    k, c = 1 / (norm + 0.1), 0.2
    reduction = reductions.normalised(0.1, then=reductions.pseudo_huber(c))
    root = ((k * norm) ** 2 + c**2) ** 0.5
    np.testing.assert_allclose(reduction(None, 0.0, 1.0, D), root - c, rtol=1e-12)
    gradient = jax.grad(lambda d: reduction(None, 0.0, 1.0, d))(D)
    np.testing.assert_allclose(gradient["a"], k * D["a"] / root, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(reductions.REDUCTIONS))
def test_registry_is_zero_and_smooth_at_zero(name):
    reduction = reductions.REDUCTIONS[name]()
    zero = jax.tree.map(jnp.zeros_like, D)
    value, gradient = jax.value_and_grad(lambda d: reduction(None, 0.0, 1.0, d))(zero)
    assert value == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_learned_weight_settles_at_the_log_of_the_mean_square():
    squares = np.array([0.5, 1.0, 4.0])
    reduction = reductions.learned(lambda w, s, t: w)

    def total(w):
        return sum(reduction(w, 0.0, 1.0, jnp.array([q**0.5])) for q in squares) / 3

    assert abs(jax.grad(total)(np.log(squares.mean()))) < 1e-12
    assert abs(jax.grad(total)(0.0)) > 0.1
    with pytest.raises(ValueError, match="log_weight"):
        reductions.learned(lambda w, s, t: jnp.zeros(2))(0.0, 0.0, 1.0, D)


def test_a_learned_weight_of_another_reduction_and_the_learned_cauchy_scale():
    weight = lambda w, s, t: w * t  # noqa: E731
    of = reductions.learned(weight, of=reductions.normalised(0.1))
    k = 1 / (SQUARE**0.5 + 0.1)
    np.testing.assert_allclose(of(0.4, 0.0, 0.5, D), np.exp(-0.2) * k**2 * SQUARE + 0.2, rtol=1e-12)
    cauchy = reductions.learned_cauchy(weight)
    np.testing.assert_allclose(cauchy(0.4, 0.0, 0.5, D), np.log1p(np.exp(-0.2) * SQUARE) + 0.1, rtol=1e-12)
    # The scale settles where half of e^{-w} |D|^2 / (1 + e^{-w} |D|^2) is left: at |D| for a single residual.
    slope = jax.grad(lambda w: cauchy(w, 0.0, 1.0, D))
    assert abs(slope(np.log(SQUARE))) < 1e-12 < abs(slope(0.0))


def test_half_precision_residuals_are_summed_in_float32():
    d = jnp.full((4096,), 0.5, jnp.bfloat16)
    assert reductions.squared(None, 0.0, 1.0, d) == 1024.0
    assert reductions.squared(None, 0.0, 1.0, d).dtype == jnp.float32


def value_and_slope(reduction, difference):
    return jax.value_and_grad(lambda d: reduction(None, 0.0, 1.0, d))(difference)


@pytest.mark.parametrize("of", ["squared", "adaptive", "normalised", "clipped", "unclipped", "pseudo_huber", "cauchy"])
def test_a_mean_over_entries_is_the_reduction_of_the_residual_over_the_root_of_their_number(of):
    """Three entries in two leaves: |D|^2 becomes |D|^2/3, in value and gradient."""
    then = FORMULAS[of][0]
    value, slope = value_and_slope(reductions.per_entry(then), D)
    small = jax.tree.map(lambda leaf: leaf / np.sqrt(3.0), D)
    expected, along = value_and_slope(then, small)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / np.sqrt(3.0), rtol=1e-12), slope, along)


def test_means_over_entries_of_images_and_cut_offs_outside_them():
    image = jnp.full((28, 28, 3), 0.5).at[0, 0, 0].set(40.0)
    np.testing.assert_allclose(
        reductions.per_entry()(None, 0.0, 1.0, image), np.mean(np.asarray(image) ** 2), rtol=1e-12
    )
    weighted = reductions.clamped(1.0, then=reductions.per_entry(reductions.adaptive(0.5, 1e-3)))
    mean = np.mean(np.minimum(np.asarray(image), 1.0) ** 2)
    np.testing.assert_allclose(weighted(None, 0.0, 1.0, image), mean * (mean + 1e-3) ** -0.5, rtol=1e-12)
    small = jnp.full((4,), 0.5, jnp.bfloat16)
    assert reductions.per_entry()(None, 0.0, 1.0, small).dtype == jnp.float32


@pytest.mark.parametrize("of", sorted(set(FORMULAS)))
def test_scaled_multiplies_value_and_gradient(of):
    then = FORMULAS[of][0]
    for got, plain in zip(
        jax.tree.leaves(value_and_slope(reductions.scaled(3.5, then), D)),
        jax.tree.leaves(value_and_slope(then, D)),
        strict=True,
    ):
        np.testing.assert_allclose(got, 3.5 * plain, rtol=1e-12)


@pytest.mark.parametrize(
    "reduction", [reductions.pseudo_huber(0.0), reductions.pseudo_huber(0.0, times_root_size=True)]
)
def test_pseudo_huber_of_width_zero_is_the_norm(reduction):
    value, slope = value_and_slope(reduction, D)
    np.testing.assert_allclose(value, SQUARE**0.5, rtol=1e-12)
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d / SQUARE**0.5, rtol=1e-12), slope, D)
    # At zero, alone and beside other rows, forwards and backwards: zero, not NaN.
    rows = jnp.array([[0.0, 0.0], [3.0, -4.0], [1e-30, 0.0]])
    values, slopes = jax.jit(jax.vmap(lambda d: value_and_slope(reduction, d)))(rows)
    np.testing.assert_allclose(values, [0.0, 5.0, 1e-30], rtol=1e-12)
    np.testing.assert_allclose(slopes, [[0.0, 0.0], [0.6, -0.8], [1.0, 0.0]], rtol=1e-12)
    _, forward = jax.jvp(lambda d: reduction(None, 0.0, 1.0, d), (rows[0],), (rows[1],))
    assert forward == 0.0


def test_pseudo_huber_s_width_grows_with_the_root_of_the_size():
    reduction = reductions.pseudo_huber(0.1, times_root_size=True)
    c = 0.1 * 3**0.5
    value, slope = value_and_slope(reduction, D)
    np.testing.assert_allclose(value, (SQUARE + c**2) ** 0.5 - c, rtol=1e-12)
    jax.tree.map(lambda a, d: np.testing.assert_allclose(a, d / (SQUARE + c**2) ** 0.5, rtol=1e-12), slope, D)
    # Without cancellation: |D|^2/(2c) where D is small beside c.
    tiny = jax.tree.map(lambda leaf: 1e-9 * leaf, D)
    np.testing.assert_allclose(reduction(None, 0.0, 1.0, tiny), 1e-18 * SQUARE / (2 * c), rtol=1e-9)


@pytest.mark.parametrize("make", [reductions.normalised, reductions.clipped, reductions.clamped, reductions.cauchy])
def test_bad_input(make):
    with pytest.raises(ValueError, match="c: expected"):
        make(0.0)
    with pytest.raises(ValueError, match="p: expected"):
        reductions.adaptive(p=-1.0)
    with pytest.raises(ValueError, match="c: expected"):
        reductions.adaptive(c=0.0)
    with pytest.raises(ValueError, match="c: expected"):
        reductions.pseudo_huber(-1e-9)
    for factor in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="factor: expected"):
            reductions.scaled(factor, reductions.squared)
    with pytest.raises(TypeError, match="factor: expected"):
        reductions.scaled("2", reductions.squared)


@pytest.mark.representatives("0.0-1e-30-float16", "0.001-1e-30-float32", "10000.0-0.001-bfloat16")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("c", [1e-30, 1e-3])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1e4])
def test_small_numbers_stay_finite(c, size, dtype):
    """In value and gradient, at D = 0 and far from it, in every dtype of the residual."""
    makers = (reductions.normalised, reductions.clipped, reductions.pseudo_huber, reductions.adaptive)
    losses = [functools.partial(make(c=c), None, 0.0, 1.0) for make in makers]
    found = jax.jit(lambda d: [jax.value_and_grad(loss)(d) for loss in losses])(np.asarray([size, 0.0], dtype))
    for make, (value, slope) in zip(makers, found, strict=True):
        assert np.isfinite(value) and np.isfinite(np.asarray(slope, np.float32)).all(), make


@pytest.mark.parametrize("size", [0.0, 1e-9, 0.3, 1.0, 1e6, 1e15])
def test_cauchy_far_out_and_near(size):
    d = jnp.float32(size)
    for c in (1e-10, 0.03, 1.0, 1e4):
        value, slope = jax.value_and_grad(lambda d: reductions.cauchy(c)(None, 0.0, 1.0, d))(d)  # noqa: B023
        square, wide = np.float64(d) ** 2, np.float64(np.float32(c)) ** 2
        np.testing.assert_allclose(value, 0.5 * wide * np.log1p(square / wide), rtol=2e-6)
        np.testing.assert_allclose(slope, np.float64(d) / (1.0 + square / wide), rtol=2e-6, atol=2e-35)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reductions.cauchy(1e-30), "^c: expected a number whose power 2 float32 can hold"),
        (lambda: reductions.adaptive(p=2.0, c=1e-30), "^c: expected a number whose power 2 float32 can hold"),
        (lambda: reductions.adaptive(c=1e-45), "^c: expected a number whose power 1 float32 can hold"),
        (lambda: reductions.normalised(1e-45), "^c: expected a number whose power 1 float32 can hold"),
    ],
)
def test_numbers_that_the_dtype_cannot_hold_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()(None, 0.0, 1.0, jnp.ones(2, jnp.bfloat16))
    if "cauchy" in message:
        make()(None, 0.0, 1.0, jnp.ones(2, jnp.float64))


def test_an_event_without_entries_has_no_mean():
    with pytest.raises(ValueError, match=r"^difference: expected an event with entries"):
        reductions.per_entry()(None, 0.0, 1.0, jnp.ones((0, 3)))
    assert reductions.per_entry()(None, 0.0, 1.0, (jnp.ones((0, 3)), jnp.full(2, 3.0))) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: reductions.per_entry(0.1), "then"),
        (lambda: reductions.normalised(then=1), "then"),
        (lambda: reductions.clipped(then=reductions.adaptive), "then"),
        (lambda: reductions.clamped(then="squared"), "then"),
        (lambda: reductions.shaped(0.5), "shape"),
        (lambda: reductions.weighted(0.3), "weight"),
        (lambda: reductions.scaled(2.0, 3.0), "of"),
        (lambda: reductions.scaled(reductions.squared, 2.0), "factor"),
        (lambda: reductions.learned(3.0), "log_weight"),
        (lambda: reductions.learned(lambda params: 0.0), "log_weight"),
        (lambda: reductions.learned(lambda params, s, t: 0.0, of=reductions.cauchy), "of"),
        (lambda: reductions.learned_cauchy("w"), "log_weight"),
        (lambda: reductions.check("reduction", reductions.adaptive), "reduction"),
        (lambda: reductions.check("reduction", 2.0), "reduction"),
    ],
)
def test_what_is_not_a_reduction_is_refused_by_name(make, name):
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        make()
