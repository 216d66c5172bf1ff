"""Experiments of images: the data, the presets, and the model of a kept configuration."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import fashion, loading
from experiments.shared import images, options
from jflow import conditions, objectives

OUT = pathlib.Path("unused")


def test_drawn_shapes_are_ten_classes_in_mnists_format(tmp_path):
    images.write_shapes(tmp_path, train=200, held_out=100)
    split = images.load(tmp_path, False)
    assert split.train.x1.shape == (200, 28, 28, 1) and split.train.x1.dtype == np.uint8
    assert set(np.unique(split.train.cond)) == set(range(10)) == set(np.unique(split.held_out.cond))
    # The outlined classes are grey, the others near white.
    grey = split.train.cond >= 5
    assert split.train.x1[grey].max() <= 128 < split.train.x1[~grey].max()
    x1, labels = images.shapes(200, 0)
    np.testing.assert_array_equal(split.train.x1[..., 0], x1)
    np.testing.assert_array_equal(split.train.cond, labels)


def test_missing_files_name_the_package_and_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data"):
        images.load(tmp_path / "nothing", False)


def test_a_preset_changes_the_options_that_were_not_given():
    plain = fashion._chosen(fashion.Config(out=OUT))
    assert plain.model.network == "mixer" and plain.optimizer.batch == 128
    model = images.ImageNetwork(network="dit")
    gpu = fashion._chosen(fashion.Config(out=OUT, preset="gpu", model=model))
    assert gpu.model.network == "dit" and gpu.optimizer.steps == fashion.GPU["steps"]
    quick = fashion._chosen(fashion.Config(out=OUT, output=options.Output(quick=True)))
    assert quick.drawn and quick.optimizer.steps == fashion.QUICK["steps"]


@pytest.mark.parametrize(("method", "message"), [
    (images.ImageMethod(conditional=False), "--guidance: expected none with --no-conditional"),
    (images.ImageMethod(scale=0.5), "--scale: expected a number from 1"),
    (images.ImageMethod(diagonal=1.0), "--diagonal: expected less than 1"),
])  # fmt: skip
def test_refusals(method, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(fashion.Config(out=OUT), method=method).check()


def test_guidance_and_labels_are_those_of_the_configuration():
    this = images.problem(images.load(None, True), 16, 0, True, lambda x: x)
    network = images.ImageNetwork(network="mlp", features=8, depth=1)
    for guidance, fed in (("none", None), ("fixed", False), ("drawn", True)):
        method = images.ImageMethod(guidance=guidance, diagonal_start=0.0)
        model = images.build(network, method, this)
        assert model.flow_map.null == 10
        objective = images.objective_of(method, model, 100)
        assert isinstance(objective, objectives.Objective)
        assert objective.label_dropout == 0.1
        assert (objective.guidance is None) == (fed is None)
        assert objective.guidance is None or objective.guidance.fed is fed


def test_the_model_of_a_run_is_rebuilt_from_what_it_keeps():
    """With drawn scales: the network receives them."""
    config = fashion.Config(
        out=OUT,
        drawn=True,
        model=images.ImageNetwork(network="mlp", features=8, depth=1),
        method=images.ImageMethod(guidance="drawn"),
    )
    kept = {**config.kept(), "experiment": "fashion"}
    subject = loading.make(kept)
    this = fashion.problem(config)
    params = fashion.model_of(config, this).init(jax.random.key(0))
    cond = subject.cond(jax.random.key(0), 4)
    assert isinstance(cond, conditions.Scaled) and set(np.asarray(cond.scale)) == {2.0}
    x = jnp.ones((4, 28, 28, 1), jnp.float32)
    jump = jax.jit(jax.vmap(lambda x, c: subject.model.jump(params, 0.0, 1.0, x, c)))
    assert jump(x, cond).shape == x.shape
    np.testing.assert_array_equal(subject.data(jax.random.key(0), 5), this.reference(jax.random.key(0), 5))
