"""Features of images by a network, computed in batches over the devices, their moments, and a cache of both on disk.

For example::

    net = train_classifier(train.x1, train.cond)
    reference = statistics(net, held_out.x1, cache="features")
    score = frechet_score(features(net, samples), reference)
    print(score.to_json())
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jflow import checks, sharding
from jflow.datasets import PIXELS, Affine
from jflow.datasets.paths import Path
from jflow.metrics.feature_nets import FeatureNet, Outputs, digest
from jflow.metrics.moments import GROUPS, GroupedMoments, Moments, as_labels, moments_by_label
from jflow.metrics.samples import Points
from jflow.types import Array, Params

Transform = Affine | Callable[[Array], Array]
# The version of the files of the cache.
FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of images, with their origin; made by ``features``.

    Attributes:
      values: the features, ``[n, d]``, float32 or wider, numpy.
      network: the name of the network.
      network_hash: its hash.
      data_hash: the hash of the images and of the transform.
      logits: the network's logits, ``[n, K]``, or None.
      labels: the labels of the images, ``[n]``, or None.
    """

    values: np.ndarray
    network: str
    network_hash: str
    data_hash: str
    logits: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def where(self, rows: np.ndarray) -> Features:
        """The features of some rows, given by a mask or by indices."""
        logits, labels = (None if z is None else z[rows] for z in (self.logits, self.labels))
        return dataclasses.replace(self, values=self.values[rows], logits=logits, labels=labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Moments of the features of a data set, with their origin; made by ``statistics``.

    Attributes:
      moments: of all images, in the groups of the jackknife.
      by_label: of the images of each label; empty without labels.
      network: the name of the network.
      network_hash: its hash.
      data_hash: the hash of the images, the labels and the transform.
    """

    moments: GroupedMoments
    by_label: Mapping[int, Moments]
    network: str
    network_hash: str
    data_hash: str


def features(
    network: FeatureNet,
    images: Points,
    *,
    labels: Points | None = None,
    transform: Transform | None = None,
    batch_size: int = 512,
    mesh: Mesh | None = None,
    cache: Path | None = None,
) -> Features:
    """Computes the features of images.

    Args:
      network: the feature network.
      images: ``[n, ...]``, numpy or memory-mapped; with several processes, the same on each.
      labels: whole numbers ``[n]``, kept with the features.
      transform: a map of the batch ``[B, ...]`` before the network, traced: an Affine, or a function. By default, uint8 images
        are mapped to [-1, 1] (``PIXELS``), others are passed as they are. The network's images must be floating-point.
      batch_size: rows per batch; the last batch is padded, so that one program is compiled.
      mesh: a mesh from ``sharding.mesh``, over whose devices a batch is spread; None for the default device.
      cache: a folder for the features, or None.

    Returns:
      The features of all rows, in order, on the host of every process.

    Raises:
      ValueError: if a shape is wrong, there are no images, a feature or logit is not finite, or a file of the cache is
        damaged or was made by other arguments. With a cache, also if the transform has no lasting name: pass an Affine, or a
        function defined at the top of a module.
      TypeError: if an argument has the wrong type.

    Example:
      >>> import numpy as np
      >>> from jflow import metrics
      >>> net = metrics.FeatureNet("mean", np.float32(2.0), lambda p, x: metrics.Outputs(p * x.mean(axis=(1, 2))))
      >>> metrics.features(net, np.full((5, 8, 8, 3), 255, np.uint8)).values[:, 0].tolist()
      [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    origin, labels = _origin(network, images, labels, transform, cache)
    file = None if cache is None else _CacheFile(cache, {**origin, "kind": "features"})
    if file is not None and (found := file.read()) is not None:
        return Features(found["values"], **_names(origin), logits=found.get("logits"), labels=labels)
    parts = list(_batches(network, images, transform, batch_size, mesh))
    values = np.concatenate([part.features for part in parts])
    logits = None if parts[0].logits is None else np.concatenate([np.asarray(part.logits) for part in parts])
    if file is not None:
        file.write({"values": values} | ({} if logits is None else {"logits": logits}))
    return Features(values, **_names(origin), logits=logits, labels=labels)


def statistics(
    network: FeatureNet,
    images: Points,
    *,
    labels: Points | None = None,
    transform: Transform | None = None,
    batch_size: int = 512,
    mesh: Mesh | None = None,
    cache: Path | None = None,
    groups: int = GROUPS,
) -> Statistics:
    """Computes the moments of the features of images, without holding the features of all images.

    Args:
      network, images, transform, batch_size, mesh: as in ``features``.
      labels: whole numbers ``[n]``, for moments by label.
      cache: a folder for the moments, or None.
      groups: the number of groups of the jackknife.

    Raises:
      ValueError, TypeError: as ``features``.
    """
    checks.integer("groups", groups, low=2)
    origin, labels = _origin(network, images, labels, transform, cache)
    file = None if cache is None else _CacheFile(cache, {**origin, "kind": "statistics", "groups": groups})
    if file is not None and (found := file.read()) is not None:
        return _unpacked(found, groups, origin)
    moments, by_label, start = None, {}, 0
    for part in _batches(network, images, transform, batch_size, mesh):
        values = np.asarray(part.features)
        moments = GroupedMoments.of(values, groups=groups) if moments is None else moments.add(values)
        if labels is not None:
            by_label = moments_by_label(values, labels[start : start + len(values)], by_label)
        start += len(values)
    assert moments is not None
    found = Statistics(moments, by_label, **_names(origin))
    if file is not None:
        file.write(_packed(found))
    return found


def _batches(
    network: FeatureNet, images: Points, transform: Transform | None, batch_size: int, mesh: Mesh | None
) -> Iterator[Outputs]:
    """Yields the outputs of the network, numpy arrays without padding, batch by batch."""
    checks.integer("batch_size", batch_size, low=1)
    step = 1 if mesh is None else mesh.size
    batch_size = -(-batch_size // step) * step
    rows = None if mesh is None else sharding.rows(mesh)
    params = network.params if mesh is None else sharding.place(network.params, sharding.whole(mesh))

    @jax.jit
    def run(params: Params, batch: Array) -> Outputs:
        if isinstance(transform, Affine):
            batch = transform.forward(batch)
        elif transform is not None:
            batch = transform(batch)
        elif batch.dtype == jnp.uint8:
            batch = PIXELS.forward(batch)
        checks.floating("images", batch)
        outputs = network.apply(params, batch)
        if not isinstance(outputs, Outputs):
            raise TypeError(f"network: expected one that returns Outputs, got {type(outputs).__name__}")
        checks.shape("the network's features", outputs.features, (batch_size, None))
        checks.floating("the network's features", outputs.features)
        if outputs.logits is not None:
            checks.shape("the network's logits", outputs.logits, (batch_size, None))
            checks.floating("the network's logits", outputs.logits)
        # Features in half precision are held in float32, which numpy's files know.
        return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), outputs)

    for start in range(0, len(images), batch_size):
        part = np.asarray(images[start : start + batch_size])
        count = len(part)
        # Repeat the last row, which has the range of an image, where zeros might not.
        part = np.concatenate([part, np.repeat(part[-1:], batch_size - count, axis=0)])
        batch = part if rows is None or mesh is None else sharding.split(part, mesh, name="images")
        outputs = sharding.local(run(params, batch))
        outputs = jax.tree.map(lambda leaf: np.asarray(leaf)[:count], outputs)  # noqa: B023
        for name, values in outputs._asdict().items():
            if values is not None and not np.isfinite(values).all():
                raise ValueError(
                    f"the network's {name}: expected finite values, in rows {start} to {start + count - 1}"
                )
        yield outputs


def _origin(
    network: FeatureNet, images: Points, labels: Points | None, transform: Transform | None, cache: Path | None
) -> tuple[dict[str, Any], np.ndarray | None]:
    """The facts that identify a result, for the key of the cache, and the labels, checked."""
    if not isinstance(network, FeatureNet):
        raise TypeError(f"network: expected a FeatureNet, got {type(network).__name__}")
    count = checks.rows("images", images)
    labels = None if labels is None else as_labels("labels", labels, count)
    images = images if isinstance(images, np.ndarray) else np.asarray(images)
    name = _transform_name(transform, lasting=cache is not None)
    arrays = {"images": images} | ({} if labels is None else {"labels": labels})
    hashed = digest({"transform": name}, arrays)
    return {"network": network.name, "network_hash": network.hash, "data_hash": hashed}, labels


def _names(origin: Mapping[str, Any]) -> dict[str, str]:
    return {name: origin[name] for name in ("network", "network_hash", "data_hash")}


def _transform_name(transform: Transform | None, lasting: bool) -> str:
    if transform is None or isinstance(transform, Affine):
        return repr(transform)
    checks.function("transform", transform, "of a batch of images")
    name = f"{getattr(transform, '__module__', '')}.{getattr(transform, '__qualname__', '')}"
    if lasting and ("<" in name or name.startswith("__main__") or not hasattr(transform, "__qualname__")):
        raise ValueError(
            "transform: expected an Affine, or a function defined at the top of a module, whose name identifies it in the "
            f"cache, got {transform!r}"
        )
    return name


@dataclasses.dataclass(frozen=True)
class _CacheFile:
    """A file of arrays in a folder, named by the hash of the facts that identify it, which it also holds."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def path(self) -> pathlib.Path:
        key = digest({**self.facts, "format": FORMAT}, {})
        return pathlib.Path(self.folder).expanduser() / f"{self.facts['kind']}-{key[:24]}.npz"

    def read(self) -> dict[str, np.ndarray] | None:
        """The arrays, or None if there is no file.

        Raises:
          ValueError: if the file is damaged, or holds something else.
        """
        path = self.path
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            facts, found = json.loads(str(arrays.pop("facts"))), str(arrays.pop("hash"))
        except (zipfile.BadZipFile, OSError, TypeError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"cache: {path} cannot be read, delete it to compute it again: {error}") from error
        if facts != dict(self.facts) or found != digest(facts, arrays):
            raise ValueError(
                f"cache: {path} does not hold what its name says, or was changed; delete it to compute it again"
            )
        return arrays

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the file in one step, so that a reader never sees a part of it."""
        path = self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".npz", delete=False) as file:
            try:
                stored: dict[str, Any] = dict(arrays)
                stored |= {
                    "facts": np.array(json.dumps(dict(self.facts))),
                    "hash": np.array(digest(self.facts, arrays)),
                }
                np.savez(file, **stored)
            except BaseException:
                os.unlink(file.name)
                raise
        os.replace(file.name, path)


def _packed(found: Statistics) -> dict[str, np.ndarray]:
    """The arrays of all moments: counts, and per moments the centre, the offset and the root."""
    each = [*found.moments.groups, *found.by_label.values()]
    arrays = {
        f"{place}.{name}": getattr(m, name) for place, m in enumerate(each) for name in ("centre", "offset", "root")
    }
    arrays["labels"] = np.array(list(found.by_label), np.int64)
    arrays["counts"] = np.array([m.count for m in each], np.int64)
    return arrays


def _unpacked(arrays: Mapping[str, np.ndarray], groups: int, origin: Mapping[str, Any]) -> Statistics:
    each = [
        Moments(int(count), *(arrays[f"{place}.{name}"] for name in ("centre", "offset", "root")))
        for place, count in enumerate(arrays["counts"])
    ]
    by_label = dict(zip((int(label) for label in arrays["labels"]), each[groups:], strict=True))
    return Statistics(GroupedMoments(tuple(each[:groups])), by_label, **_names(origin))
