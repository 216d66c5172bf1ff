"""Conditions by size and by name, features of numbers, vectors and tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import nets
from jflow.nets import conditioning

F32 = jnp.float32


class Guidance(NamedTuple):
    label: object
    w: object
    interval: object


COND = Guidance(jnp.int32(2), F32(1.5), (F32(0.2), F32(0.8)))


def test_the_condition_of_guided_training():
    """A label, a scale, and an interval of two scalars: three floating-point numbers."""
    label, floats = conditioning.split(COND, 5, 3)
    assert int(label) == 2
    np.testing.assert_allclose(jnp.stack(floats), [1.5, 0.2, 0.8], rtol=1e-6)
    assert conditioning.split(None, 5, 0)[0] == 5
    assert [net(num_classes=5).null_label for net in (nets.MLP, nets.Mixer, nets.DiT, nets.UNet)] == [5] * 4
    assert nets.MLP().null_label is None


def test_leaves_by_name_in_the_order_of_the_names():
    cond = {"w": F32(1.5), "label": 3, "y": jnp.asarray([0.1, 0.2], F32)}
    label, floats = conditioning.split(cond, 5, {"y": 2, "w": 1})
    assert label == 3 and [leaf.shape for leaf in floats] == [(2,), ()]
    # A NamedTuple with its fields, in another order.
    assert [
        leaf.shape for leaf in conditioning.split(COND._replace(interval=jnp.zeros(2)), 5, {"interval": 2, "w": 1})[1]
    ] == [
        (2,),
        (),
    ]
    for wrong, message in (
        ({"w": 1}, r"expected floating-point leaves named \['w'\] \(cond_features\), got \['w', 'y'\]"),
        ({"w": 1, "z": 2}, r"named \['w', 'z'\]"),
        ({"w": 2, "y": 2}, r"cond\['w'\]: expected 2 numbers \(cond_features\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            conditioning.split(cond, 5, wrong)
    with pytest.raises(ValueError, match=r"cond_features\['y'\]: expected a whole number of at least 1"):
        nets.MLP(cond_features={"y": 0})


@pytest.mark.parametrize(("cond", "error", "message"), [
    (True, TypeError, "^cond: expected an integer label or floating-point numbers, got dtype bool$"),
    ({"label": 1, "seen": np.True_}, TypeError, r"^cond\['seen'\]: expected an integer label or floating-point numbers"),
    ({"label": 1, "scale": 2}, ValueError, r"at most one label, got 2 integer leaves; write other numbers .* such as 2\.0$"),
])  # fmt: skip
def test_leaves_of_other_kinds_are_refused(cond, error, message):
    with pytest.raises(error, match=message):
        conditioning.split(cond, 5, 1)


@pytest.mark.parametrize("net", [nets.Mixer, nets.DiT, nets.UNet])
@pytest.mark.parametrize(("field", "value", "message"), [
    ("time_features", 7, "an even number, a sine and a cosine each, got 7"),
    ("scalar_features", 3, "an even number"),
    ("scalar_features", -2, "a whole number of at least 0"),
    ("max_frequency", 0.1, r"a number in \[0\.125, inf\]"),
])  # fmt: skip
def test_fields_of_embeddings_are_checked_by_name_at_construction(net, field, value, message):
    with pytest.raises(ValueError, match=f"^{field}: expected {message}"):
        net(**{field: value})


def test_a_perceptron_takes_named_conditions():
    net, x = nets.MLP(features=4, depth=1, num_classes=3, cond_features={"w": 1, "y": 2}), jnp.ones(2, F32)
    cond = {"y": jnp.asarray([0.1, 0.2], F32), "w": F32(1.5), "label": jnp.int32(1)}
    params = net.init(jax.random.key(0), F32(0), F32(1), x, cond)
    # trunk: features of two times, a row of the table, three numbers.
    assert params["params"]["trunk"]["kernel"].shape == (2 * 32 + 64 + 3, 64)


def test_features_of_times_and_numbers():
    s, t = jnp.float64(0.2), jnp.float64(0.7)
    gap, target = (conditioning.times(s, t, 4, second=second) for second in conditioning.TIMES)
    np.testing.assert_array_equal(gap[0], target[0])
    np.testing.assert_allclose(gap[1], nets.sinusoidal(jnp.float64(0.5), 4), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(target[1], nets.sinusoidal(jnp.float64(0.7), 4), rtol=1e-12, atol=1e-14)
    values = jnp.asarray([0.0, 1.5, -40.0], jnp.float64)
    found = conditioning.scalars(values, 4)
    expected = [[np.arcsinh(v), *nets.sinusoidal(jnp.float64(np.arcsinh(v)), 4)] for v in np.asarray(values)]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(conditioning.scalars(values, 0)[:, 0], values)
    # Guidance scales between 1 and 10 are told apart by more than rounding in bfloat16.
    scales = conditioning.scalars(jnp.linspace(1.0, 10.0, 91), 16)
    assert np.linalg.norm(np.diff(scales, axis=0), axis=1).min() > 0.03


def test_vector_by_hand():
    net = nets.Conditioning(features=4, num_classes=5, cond_features=3, time_features=4, scalar_features=2)
    s, t = F32(0.2), F32(0.7)
    variables = jax.jit(net.init)(jax.random.key(0), s, t, COND)
    params = variables["params"]
    e = np.concatenate(
        [*conditioning.times(s, t, 4), conditioning.scalars(jnp.asarray([1.5, 0.2, 0.8], F32), 2).ravel()]
    )
    h = jax.nn.silu(e @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    expected = h @ params["output"]["kernel"] + params["output"]["bias"] + params["label"][2]
    found = jax.jit(net.apply)(variables, s, t, COND)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.dtype == jnp.float32
    assert jax.eval_shape(net.apply, variables, jnp.float64(0), t, COND).dtype == jnp.float64


def test_tokens():
    net = nets.ConditionTokens(features=4, count=3, num_classes=5, cond_features=3, time_features=4)
    variables = jax.jit(net.init)(jax.random.key(0), F32(0), F32(1), COND)
    run = jax.jit(lambda cond: net.apply(variables, F32(0.2), F32(0.7), cond))
    tokens = np.asarray(run(COND)).reshape(6, 3, 4)  # two times, three numbers, the label
    changed = np.asarray(run(COND._replace(w=F32(2.0)))).reshape(6, 3, 4)
    assert [bool(np.any(a != b)) for a, b in zip(tokens, changed, strict=True)] == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    # The tokens of one condition differ by learned vectors alone.
    embedded = tokens - np.asarray(variables["params"]["tokens"])
    np.testing.assert_allclose(embedded, np.repeat(embedded[:, :1], 3, axis=1), atol=1e-5)
