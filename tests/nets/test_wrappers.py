"""Wrapped networks against direct calls, their randomness, and what they refuse."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jflow import interpolants, objectives, parameterizations, reductions, types
from jflow.nets import MLP, check_independent, from_equinox, from_function, from_linen, from_nnx

X = np.asarray([[0.3, -0.8], [1.1, 0.2], [-0.4, 0.9]], np.float32)
S = np.asarray([0.0, 0.3, 0.6], np.float32)
T = np.asarray([1.0, 0.3, 0.9], np.float32)
KEY = jax.random.key(7)


class Linen(nn.Module):
    """One sample (s, t, x) or a batch of them; told apart by the axes."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, s, t, x, deterministic=True):
        h = jnp.concatenate([jnp.stack([s, t], -1), x], -1)
        h = nn.Dropout(self.rate)(jnp.tanh(nn.Dense(8)(h)), deterministic=deterministic)
        return nn.Dense(2)(h)


class Nnx(nnx.Module):
    def __init__(self, rate=0.0):
        rngs = nnx.Rngs(params=0, dropout=1)
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])
        self.dropout = nnx.List([nnx.Dropout(rate, rngs=rngs) for _ in range(2)])
        self.offset = nnx.Variable(jnp.full((2,), 0.25, jnp.float32))

    def __call__(self, s, t, x):
        h = jnp.concatenate([jnp.stack([s, t], -1), x], -1)
        h = self.dropout[1](self.dropout[0](jnp.tanh(self.layers[0](h))))
        out = self.layers[1](h)
        return out + jnp.broadcast_to(self.offset[...], out.shape)


class Eqx(eqx.Module):
    layers: list
    dropout: eqx.nn.Dropout

    def __init__(self, rate=0.0):
        a, b = jax.random.split(jax.random.key(0))
        self.layers = [
            eqx.nn.Linear(4, 8, key=a, dtype=jnp.float32),
            eqx.nn.Linear(8, 2, key=b, dtype=jnp.float32),
        ]
        self.dropout = eqx.nn.Dropout(rate)

    def __call__(self, s, t, x, *, key=None):
        h = jnp.tanh(self.layers[0](jnp.concatenate([jnp.stack([s, t]), x])))
        return self.layers[1](self.dropout(h, key=key))


def function(params, s, t, x):
    return jnp.tanh(jnp.concatenate([jnp.stack([s, t], -1), x], -1) @ params["w"])


WEIGHTS = {"w": jnp.asarray(np.random.RandomState(0).normal(size=(4, 2)), jnp.float32)}


def make(kind, batched=False, rate=0.0):
    """(wrapped, params, the network called directly with params)."""
    if kind == "linen":
        module = Linen(rate)
        params = jax.jit(module.init)(jax.random.key(0), S[0], T[0], X[0])["params"]
        return from_linen(module, batched=batched), params, lambda p, *a: module.apply({"params": p}, *a)
    if kind == "nnx":
        module = Nnx(rate)
        apply, params = from_nnx(module, batched=batched)
        module.eval()
        return apply, params, lambda p, *a: module(*a)
    if kind == "equinox":
        module = Eqx(rate)
        apply, params = from_equinox(module, batched=batched)
        return apply, params, lambda p, *a: eqx.nn.inference_mode(module)(*a)
    return from_function(function, batched=batched), WEIGHTS, function


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox", "function"])
def test_agrees_with_the_direct_call(kind):
    apply, params, direct = make(kind)
    expected = direct(params, S[0], T[0], X[0])
    np.testing.assert_allclose(apply(params, S[0], T[0], X[0]), expected, rtol=1e-6)
    f = jax.jit(apply)
    np.testing.assert_allclose(f(params, S[0], T[0], X[0]), expected, rtol=1e-5)
    # The network uses the parameters of the call, not those that it was made with.
    zero = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(f(zero, S[0], T[0], X[0]), 0.25 if kind == "nnx" else 0.0)


@pytest.mark.parametrize("kind", ["linen", "nnx", "function"])
def test_batched_agrees_with_the_direct_call_and_its_gradient(kind):
    apply, params, direct = make(kind, batched=True)
    many = jax.vmap(apply, (None, 0, 0, 0))
    np.testing.assert_allclose(jax.jit(many)(params, S, T, X), direct(params, S, T, X), rtol=1e-5)
    if kind == "nnx":
        return  # its direct call has no params to differentiate

    def gradient(f):
        return jax.jit(jax.grad(lambda p: jnp.sum(f(p, S, T, X) ** 2)))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), gradient(many), gradient(direct))


@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox", "function"])
def test_forward_and_reverse_derivatives(kind):
    apply, params, _ = make(kind)
    tangents = (np.float32(0.7), np.float32(-1.1), X[1])

    def along(p, s, t, x):
        return jax.jvp(lambda s, t, x: apply(p, s, t, x), (s, t, x), tangents)[1]

    h = 1e-2
    f = jax.jit(apply)
    up, down = (f(params, *(a + i * h * d for a, d in zip((S[1], T[1], X[0]), tangents, strict=True))) for i in (1, -1))
    # float32: rounding 1e-7/h, truncation h^2.
    np.testing.assert_allclose(jax.jit(along)(params, S[1], T[1], X[0]), (up - down) / (2 * h), atol=1e-3)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(along(p, S[1], T[1], X[0]) ** 2)))(params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.representatives("nnx")
@pytest.mark.parametrize("kind", ["linen", "nnx", "equinox"])
def test_dropout_follows_the_key(kind):
    apply, params, _ = make(kind, rate=0.5)
    f = jax.jit(lambda key: apply(params, S[0], T[0], X[0], key=key))
    first, second = jax.random.split(jax.random.key(1))
    again = jax.random.split(jax.random.key(1))[0]
    out = f(first)
    assert np.abs(out - f(second)).max() > 1e-4
    np.testing.assert_array_equal(out, f(again))
    np.testing.assert_allclose(f(None), make(kind)[0](params, S[0], T[0], X[0]), rtol=1e-4)
    keys = jax.random.split(jax.random.key(2), 64)
    many = jax.jit(jax.vmap(lambda k: apply(params, S[0], T[0], X[0], key=k)))(keys)
    assert len(np.unique(np.round(many[:, 0], 5))) > 8


def test_dropout_layers_of_nnx_draw_different_masks():
    class Two(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(dropout=0)
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, s, t, x):
            return self.a(x) - self.b(x)

    apply, params = from_nnx(Two())
    assert np.abs(apply(params, 0.1, 0.2, jnp.ones(64), key=jax.random.key(0))).max() > 0


def test_several_streams_of_linen():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, s, t, x):
            return jax.random.normal(self.make_rng("a"), (2,)) - jax.random.normal(self.make_rng("b"), (2,))

    apply = from_linen(Two(), rngs=("a", "b"))
    assert np.abs(apply({}, 0.1, 0.2, jnp.ones(2), key=jax.random.key(0))).min() > 0
    with pytest.raises(ValueError, match="key: the network draws random numbers"):
        apply({}, 0.1, 0.2, jnp.ones(2))


@pytest.mark.parametrize("kind", ["equinox", "function"])
def test_an_objective_evaluates_a_network_that_draws_from_its_key_several_times(kind):
    """With one mask, and without an error of jax's key-reuse check: the loss is that of the masked network."""
    if kind == "equinox":

        class Dropped(eqx.Module):
            scale: jax.Array
            dropout: eqx.nn.Dropout

            def __call__(self, s, t, x, *, key=None):
                return self.scale * self.dropout(jnp.ones_like(x), key=key)

        network, params = from_equinox(Dropped(jnp.float64(2.0), eqx.nn.Dropout(0.5)))
    else:
        params = jnp.float64(2.0)
        network = from_function(
            lambda p, s, t, x, *, key=None: 2.0 * p * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
        )
    flow_map = parameterizations.flow_map(network, parameterizations.mean_velocity_form())
    zero = types.Batch(jnp.zeros((64, 1)), jnp.zeros((64, 1)))
    # v is 0 or 4 at all times and points, so that the Lagrangian residual v - v vanishes if the masks are equal.
    objective = objectives.lsd(flow_map, interpolants.linear(), diagonal=0.5, reduction=reductions.squared)
    loss, aux = jax.jit(objective)(params, jax.random.key(1), zero)
    np.testing.assert_array_equal(np.unique(loss), [0.0, 16.0])
    assert aux.metrics[f"{objective.term.name}/raw"].value() == 0.0


def test_keys_reach_functions():
    apply = from_function(lambda params, s, t, x, key=None: x + jax.random.normal(key, (2,)))
    assert np.abs(apply(None, 0.1, 0.2, jnp.zeros(2), key=jax.random.key(0))).min() > 0


def test_params_of_nnx_are_plain_and_the_module_is_untouched():
    module = Nnx(rate=0.5)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    apply, params = from_nnx(module)
    assert list(params["layers"]) == ["0", "1"] and set(params) == {"layers"}
    apply(params, 0.1, 0.2, jnp.ones(2, jnp.float32))
    assert not module.dropout[0].deterministic
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def test_our_own_net_wrapped():
    net = MLP(features=8, depth=2, num_classes=3, zero_init=False)
    like = jax.eval_shape(net.init, jax.random.key(0), 0.5, 0.5, jnp.ones(2))["params"]
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), like)
    apply = from_linen(net)

    @jax.jit
    def both(label):
        args = 0.2, 0.7, jnp.ones(2)
        pairs = [(apply(params, *args, c), net.apply({"params": params}, *args, c)) for c in (label, None)]
        return jnp.asarray(pairs)

    (a, direct_a), (b, direct_b) = both(1)
    np.testing.assert_allclose(a, direct_a, rtol=1e-6)
    np.testing.assert_allclose(b, direct_b, rtol=1e-6)
    assert np.abs(a - b).max() > 1e-4


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, s, t, x):
        return nn.BatchNorm(use_running_average=False, name="norm")(x)


def test_batch_normalisation_is_refused():
    x = jnp.ones(2, jnp.float32)
    with pytest.raises(TypeError, match="norm is a BatchNorm, which mixes the samples"):
        from_linen(LinenNorm(), batched=True)({}, 0.1, 0.2, x)
    with pytest.raises(TypeError, match="params: holds 'batch_stats'"):
        from_linen(LinenNorm())({"params": {}, "batch_stats": {}}, 0.1, 0.2, x)
    with pytest.raises(TypeError, match="constants: holds 'batch_stats'"):
        from_linen(LinenNorm(), constants={"batch_stats": {}})

    class NnxNorm(nnx.Module):
        def __init__(self):
            self.inner = nnx.List([nnx.BatchNorm(2, rngs=nnx.Rngs(0))])

    with pytest.raises(TypeError, match="inner/0 is a BatchNorm"):
        from_nnx(NnxNorm())

    class EqxNorm(eqx.Module):
        norm: eqx.Module

    with pytest.raises(TypeError, match="equinox BatchNorm"):
        from_equinox(EqxNorm(eqx.nn.BatchNorm(2, "batch", mode="batch", dtype=jnp.float32)))


def test_check_independent():
    batch = (jnp.asarray(S), jnp.asarray(T), jnp.asarray(X))
    check_independent(lambda *a: function(WEIGHTS, *a), *batch)
    with pytest.raises(ValueError, match="mixes the samples"):
        check_independent(lambda *a: function(WEIGHTS, *a) + 1e-3 * jnp.mean(a[2], axis=0, keepdims=True), *batch)
    with pytest.raises(ValueError, match="does not depend on its input"):
        check_independent(lambda s, t, x: jnp.zeros_like(x), *batch)
    with pytest.raises(ValueError, match="B of 2 or more"):
        check_independent(lambda x: x, jnp.ones((1, 2)))


def test_refusals():
    x = jnp.ones(2)
    identity = from_function(lambda p, s, t, x: x)
    with pytest.raises(ValueError, match=r"net: expected output shaped like x, \(2,\), got \(3,\)"):
        from_function(lambda p, s, t, x: jnp.ones(3))(None, 0.1, 0.2, x)
    with pytest.raises(ValueError, match=r"net: expected output shaped like x, \(2,\), got \(\(2,\), \(2,\)\)"):
        from_function(lambda p, s, t, x: (x, x))(None, 0.1, 0.2, x)
    with pytest.raises(ValueError, match=r"net: .*with a batch axis, \(1, 2\), got \(2,\)"):
        from_function(lambda p, s, t, x: x[0], batched=True)(None, 0.1, 0.2, x)
    with pytest.raises(TypeError, match="x: expected floating-point"):
        identity(None, 0.1, 0.2, jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match=r"s: expected a scalar .*jax.vmap"):
        identity(None, jnp.ones(3), 0.2, x)
    with pytest.raises(ValueError, match=r"t: expected a scalar"):
        jax.eval_shape(identity, None, 0.1, jnp.ones(3), x)
    with pytest.raises(TypeError, match=r"signature: the network takes \(s, t, x\), not 's t x cond': too many"):
        identity(None, 0.1, 0.2, x, 1)
    with pytest.raises(ValueError, match="cond: the network was wrapped with signature 's t x'"):
        from_function(lambda p, s, t, x: x, signature="s t x")(None, 0.1, 0.2, x, 1)
    with pytest.raises(ValueError, match="params: expected the collection"):
        from_linen(Linen())({"params": {}}, 0.1, 0.2, x)


# --- Layers with state -----------------------------------------------------------------------------------------------


class Spectral(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(params=0, dropout=1)
        self.norm = nnx.SpectralNorm(nnx.Linear(2, 2, use_bias=False, rngs=rngs), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, s, t, x):
        return self.dropout(self.norm(x[None]))[0]


class Counts(nnx.Module):
    """A layer with a state that is not a batch statistic and that no mode switches off."""

    def __init__(self, kind):
        self.kind = kind
        self.seen = nnx.data(jnp.zeros(())) if kind == "array" else nnx.Variable(jnp.zeros(()))
        self.inner = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])

    def __call__(self, s, t, x):
        if self.kind == "array":
            self.seen = self.seen + 1
        elif self.kind == "new":
            self.last = nnx.Cache(x)
        else:
            self.seen[...] += jnp.sum(x).astype(self.seen.dtype)
        return self.inner[0](x)


TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda p, s, t, x: jax.vmap(f, (None, None, None, 0))(p, s, t, x[None]),
    "grad": lambda f: jax.grad(lambda p, s, t, x: jnp.sum(f(p, s, t, x))),
}


@pytest.mark.representatives(
    "spectral-without a key-eager", "array-without a key-vmap", "variable-with a key-grad", "new-with a key-vmap"
)
@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("key", [None, KEY], ids=["without a key", "with a key"])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Spectral, r"norm/batch_stats/.*sigma.* \(BatchStat\), norm/batch_stats/.*u.* \(BatchStat\) changes"),
        (lambda: Counts("array"), "net: seen changes"),
        (lambda: Counts("variable"), r"net: seen \(Variable\) changes"),
        (lambda: Counts("new"), r"net: last \(Cache\) changes"),
    ],
    ids=["spectral", "array", "variable", "new"],
)
def test_variables_of_nnx_that_change_in_a_call_are_refused_by_name(module, name, key, how):
    apply, params = from_nnx(module())
    for _ in range(2):  # not at the first call alone
        again = None if key is None else jax.random.clone(key)
        call = TRANSFORMS[how](lambda p, s, t, x, key=again: apply(p, s, t, x, key=key))
        with pytest.raises(TypeError, match=name + ".*module.eval()"):
            call(params, 0.1, 0.2, jnp.asarray(X[0]))


@pytest.mark.parametrize("how", ["eager", "jit"])
def test_a_frozen_spectral_norm_has_norm_one_and_keeps_its_dropout(how):
    module = Spectral()
    for _ in range(50):
        before = nnx.state(module, nnx.Param)
        module(0.1, 0.2, jnp.asarray(X[0]))
        nnx.update(module, before)  # the layer overwrites its weights with the normalised ones
    module.eval()
    apply, params = from_nnx(module)
    run = TRANSFORMS[how](lambda p, s, t, x, key=None: apply(p, s, t, x, key=key))
    matrix = jnp.stack([run(params, 0.1, 0.2, row) for row in jnp.eye(2, dtype=jnp.float32)])
    np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1.0, rtol=1e-5)
    out = {
        run(params, 0.1, 0.2, jnp.asarray(X[0]), k).tolist().__str__()
        for k in jax.random.split(jax.random.clone(KEY), 16)
    }
    assert len(out) > 1


def test_variables_of_nnx_that_a_call_returns_as_they_were_are_accepted():
    """Transformations hand all variables through, as other arrays with the same values."""

    class Through(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(params=0, dropout=1)
            self.linear, self.dropout = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)
            self.offset, self.same = nnx.Variable(jnp.ones(2)), nnx.Variable(jnp.ones(2))

        def __call__(self, s, t, x, cond=0, deterministic=True):
            assert cond in (None, 3) and isinstance(deterministic, bool)
            self.same[...] = self.same[...] * 1.0
            body = nnx.remat(lambda m, x: m.dropout(m.linear(x)) + m.offset[...].astype(x.dtype))
            return body(self, x)

    apply, params = from_nnx(Through())
    for how in TRANSFORMS.values():
        for key in (None, KEY):
            key = None if key is None else jax.random.clone(key)
            out = how(lambda p, s, t, x, key=key: apply(p, s, t, x, 3, key=key))(params, 0.1, 0.2, jnp.asarray(X[0]))
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(out))


def test_weight_norm_of_nnx_is_no_state():
    class Weight(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.norm = nnx.WeightNorm(nnx.Linear(2, 2, use_bias=False, rngs=rngs), rngs=rngs, use_scale=False)

        def __call__(self, s, t, x):
            return self.norm(x)

    apply, params = from_nnx(Weight())
    matrix = jnp.stack([apply(params, 0.1, 0.2, row) for row in jnp.eye(2, dtype=jnp.float32)])
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), 1.0, rtol=1e-5)


def test_batch_normalisation_with_running_averages_is_accepted_frozen():
    x = jnp.asarray(X[0])
    expected = (x - 0.5) / jnp.sqrt(4.0 + 1e-5)

    class NnxNorm(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(params=0, dropout=1)
            self.norm, self.dropout = nnx.BatchNorm(2, rngs=rngs), nnx.Dropout(0.0, rngs=rngs)
            self.norm.mean[...], self.norm.var[...] = jnp.full(2, 0.5), jnp.full(2, 4.0)

        def __call__(self, s, t, x):
            return self.dropout(self.norm(x))

    module = NnxNorm()
    module.eval()
    apply, params = from_nnx(module, batched=True)
    for key in (None, jax.random.clone(KEY)):
        np.testing.assert_allclose(jax.jit(apply)(params, 0.1, 0.2, x, key=key), expected, rtol=1e-5)
    assert set(params["norm"]) == {"bias", "scale"}

    class LinenFrozen(nn.Module):
        by_argument: bool

        @nn.compact
        def __call__(self, s, t, x):
            if self.by_argument:
                return nn.BatchNorm(name="norm")(x, use_running_average=True)
            return nn.BatchNorm(use_running_average=True, name="norm")(x)

    stats = {"batch_stats": {"norm": {"mean": jnp.full(2, 0.5, jnp.float32), "var": jnp.full(2, 4.0, jnp.float32)}}}
    weights = {"norm": {"scale": jnp.ones(2, jnp.float32), "bias": jnp.zeros(2, jnp.float32)}}
    for by_argument in (False, True):
        apply = from_linen(LinenFrozen(by_argument), batched=True, constants=stats)
        np.testing.assert_allclose(apply(weights, 0.1, 0.2, x), expected, rtol=1e-5)
        with pytest.raises(ValueError, match=r"constants: expected every collection.*batch_stats"):
            from_linen(LinenFrozen(by_argument), batched=True)(weights, 0.1, 0.2, x)


class LinenSpectral(nn.Module):
    update: bool

    @nn.compact
    def __call__(self, s, t, x):
        return nn.SpectralNorm(nn.Dense(2, use_bias=False))(x[None], update_stats=self.update)[0]


class LinenCount(nn.Module):
    @nn.compact
    def __call__(self, s, t, x):
        count = self.variable("count", "n", lambda: jnp.zeros(()))
        count.value += 1
        return x


@pytest.mark.parametrize("how", ["eager", "jit"])
def test_collections_of_linen_that_change_in_a_call_are_refused_by_name(how):
    x = jnp.asarray(X[0])
    wrap = TRANSFORMS[how]
    variables = LinenSpectral(True).init(jax.random.key(0), 0.1, 0.2, x)
    params, stats = variables["params"], {"batch_stats": variables["batch_stats"]}
    message = 'changes in a call.*u" in "/SpectralNorm_0" because collection "batch_stats"'
    with pytest.raises(TypeError, match=message):
        wrap(from_linen(LinenSpectral(True), constants=stats))(params, 0.1, 0.2, x)
    frozen = wrap(from_linen(LinenSpectral(False), constants=stats))(params, 0.1, 0.2, x)
    np.testing.assert_allclose(frozen, LinenSpectral(False).apply(variables, 0.1, 0.2, x), rtol=1e-6)
    with pytest.raises(TypeError, match=r'changes in a call.*"n" in "/" because collection "count"'):
        wrap(from_linen(LinenCount(), constants={"count": {"n": jnp.zeros(())}}))({}, 0.1, 0.2, x)
    with pytest.raises(ValueError, match=r'constants: expected every collection.*"count"'):
        wrap(from_linen(LinenCount()))({}, 0.1, 0.2, x)


def test_layers_of_equinox_with_state_are_refused_and_frozen_ones_go_through_a_function():
    class Net(eqx.Module):
        norm: eqx.nn.SpectralNorm

        def __init__(self):
            one, two = jax.random.split(jax.random.key(0))
            linear = eqx.nn.Linear(2, 2, use_bias=False, key=one)
            self.norm = eqx.nn.SpectralNorm(linear, "weight", num_power_iterations=50, key=two)

        def __call__(self, s, t, x, state):
            return self.norm(x, state)

    class Holds(eqx.Module):
        index: eqx.nn.StateIndex

        def __call__(self, s, t, x):
            return x

    class HoldsState(Holds):
        index: eqx.nn.State

    net, state = eqx.nn.make_with_state(Net)()
    with pytest.raises(TypeError, match=r"equinox SpectralNorm, whose state changes in a call.*from_function"):
        from_equinox(net)
    with pytest.raises(TypeError, match="equinox StateIndex"):
        from_equinox(Holds(eqx.nn.StateIndex(jnp.zeros(()))))
    with pytest.raises(TypeError, match="equinox State, "):
        from_equinox(HoldsState(state))
    _, state = net(0.1, 0.2, jnp.ones(2), state)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    apply = from_function(lambda p, s, t, x: eqx.nn.inference_mode(eqx.combine(p, static))(s, t, x, state)[0])
    matrix = jnp.stack([jax.jit(apply)(params, 0.1, 0.2, row) for row in jnp.eye(2)])
    np.testing.assert_allclose(np.linalg.norm(matrix, 2), 1.0, rtol=1e-5)
