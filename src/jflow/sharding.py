r"""Sharding: layouts of batches and training states over the devices of a mesh, and solves that run on each device alone.

For example::

    mesh = sharding.mesh(fsdp=4)                        # of 8 devices: data 2 x fsdp 4
    state = sharding.init(make_state, mesh, key)        # parameters in four parts, nothing whole on any device
    chunk = make_chunk(step, dataset.batch, batch_sharding=sharding.rows(mesh), state_sharding=sharding.parts(state, mesh))

A batch is spread over all devices, for every shape of the mesh. With ``fsdp=1`` every device holds the whole state (data
parallelism). With ``fsdp=n`` every large array of the state is split into n parts, which the compiler gathers where a layer
needs them (fully sharded data parallelism, FSDP). Random numbers do not depend on the layout, so the losses of different
layouts agree to rounding.

With several processes (``training.distributed``), each calls these functions with the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jflow import checks, trees
from jflow.types import Device, PyTree

Tree = TypeVar("Tree")

AXES = ("data", "fsdp")
# Arrays with fewer elements are not split, since gathering their parts would cost more than it saves.
SMALLEST = 2**12


def mesh(fsdp: int = 1, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh with axes ``data`` and ``fsdp``, of sizes devices/fsdp and fsdp.

    Args:
      fsdp: the number of parts into which the state's arrays are split.
      devices: the devices; by default all devices of all processes.

    Raises:
      ValueError: if ``fsdp`` is below 1 or does not divide the number of devices, or there are no devices.
      TypeError: if ``fsdp`` is not a whole number.

    Example:
      >>> from jflow import sharding
      >>> mesh = sharding.mesh()
      >>> mesh.axis_names
      ('data', 'fsdp')
    """
    devices = jax.devices() if devices is None else list(devices)
    checks.integer("fsdp", fsdp, low=1)
    if not devices:
        raise ValueError("devices: expected at least one, got none")
    if len(devices) % fsdp:
        raise ValueError(f"fsdp: expected a divisor of the number of devices, {len(devices)}, got {fsdp}")
    return jax.make_mesh((len(devices) // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def whole(mesh: Mesh) -> NamedSharding:
    """The sharding in which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The sharding in which the leading axis is spread over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def parts(tree: PyTree, mesh: Mesh, smallest: int = SMALLEST) -> PyTree:
    """The shardings of a state, in which each array is split along the longest axis that the ``fsdp`` axis divides.

    Arrays with fewer than ``smallest`` elements, and arrays without such an axis, are whole on every device. With ``fsdp=1``
    all arrays are. The rule depends only on the shapes, so an average has the layout of its parameter.

    Args:
      tree: arrays or ``jax.ShapeDtypeStruct``.
      mesh: from ``mesh``.
      smallest: the smallest number of elements of an array that is split.

    Returns:
      A pytree of NamedSharding like ``tree``.

    Raises:
      ValueError: if the mesh does not have the axes of ``sharding.mesh``.
    """
    if mesh.axis_names != AXES:
        raise ValueError(f"mesh: expected the axes {AXES}, as sharding.mesh makes them, got {mesh.axis_names}")
    size = mesh.shape["fsdp"]

    def of(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % size == 0]
        if size == 1 or not axes or math.prod(leaf.shape) < smallest:
            return whole(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "fsdp"))

    return jax.tree.map(of, tree)


def init(make: Callable[..., Tree], mesh: Mesh, *args: PyTree) -> Tree:
    """Computes ``make(*args)`` so that every device makes only its own parts, for states that are too large for one device.

    Args:
      make: a function that jax can trace, such as one that calls ``init_state``.
      mesh: from ``mesh``.
      args: the arguments, arrays.
    """
    return jax.jit(make, out_shardings=parts(jax.eval_shape(make, *args), mesh))(*args)


def place(tree: Tree, shardings: PyTree) -> Tree:
    """Copies arrays to devices with the given shardings.

    Args:
      tree: host or jax arrays; every process passes the same values.
      shardings: one NamedSharding for all arrays, or a pytree of them with the structure of ``tree``.

    Returns:
      The copies, which share no memory with ``tree``.

    Raises:
      ValueError: if the structures differ, or a value does not fit the dtype that jax gives it (``checks.fits``).
    """
    checks.fits("tree", tree)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    got, expected = jax.tree.structure(shardings), jax.tree.structure(tree)
    if got != expected:
        raise ValueError(f"shardings: expected one, or the pytree structure of the arrays, {expected}, got {got}")
    return jax.tree.map(_placed, tree, shardings)


def split(tree: Tree, mesh: Mesh, *, name: str = "tree") -> Tree:
    """Spreads the rows of host arrays over all devices; pads with rows of zeros if their number is not divisible.

    Each process reads only the rows of its own devices, so it loads only those of a memory-mapped array.

    Args:
      tree: numpy or memory-mapped arrays, [N, ...].
      mesh: from ``mesh``.
      name: the name of the arrays in error messages.

    Returns:
      jax arrays [M, ...], where M is N rounded up to a multiple of the number of devices.

    Raises:
      ValueError: if an array has no leading axis, or a value in this process's rows does not fit the dtype that jax gives it
        (``checks.fits``).
    """
    sharding = rows(mesh)

    def of(path: Any, leaf: Any) -> jax.Array:
        if not getattr(leaf, "shape", ()):
            raise ValueError(f"tree: expected arrays [N, ...], got {type(leaf).__name__} without a leading axis")
        count, *rest = leaf.shape
        padded = -(-count // mesh.size) * mesh.size

        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            # jax's type allows None, for a shard without rows; with a NamedSharding there is always an index.
            assert index is not None
            start, stop, _ = index[0].indices(padded)
            part = np.asarray(leaf[start : min(stop, count)])
            checks.fits(f"{name}{jax.tree_util.keystr(path)}", part)
            missing = stop - start - len(part)
            return np.concatenate([part, np.zeros((missing, *rest), part.dtype)]) if missing else part

        return jax.make_array_from_callback((padded, *rest), sharding, block)

    return jax.tree_util.tree_map_with_path(of, tree)


def local(tree: PyTree) -> PyTree:
    """Copies whole arrays to this process, as numpy arrays (typed keys as jax arrays). All processes must call it."""

    def on_host(data: jax.Array) -> np.ndarray:
        if not (data.is_fully_addressable or data.is_fully_replicated):
            sharding = data.sharding
            # All layouts of the library are NamedShardings, and the mesh of an array is not abstract.
            assert isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
            data = jax.jit(lambda x: x, out_shardings=whole(sharding.mesh))(data)
        return np.array(data.addressable_data(0) if data.is_fully_replicated else data)

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return np.asarray(leaf)
        return trees.on_words(lambda words: jnp.asarray(on_host(words)), leaf) if trees.is_key(leaf) else on_host(leaf)

    return jax.tree.map(of, tree)


def vmap(
    function: Callable[..., Tree], mesh: Mesh, in_axes: int | Sequence[int | None] | None = 0
) -> Callable[..., Tree]:
    """``jax.vmap(function, in_axes)`` in which each device evaluates its own rows independently.

    It is meant for Diffrax's adaptive solves. A plain vmap of sharded rows runs one loop for all rows, and the devices
    synchronise at every step to decide whether to stop. Here each device takes only the steps that its own rows need.

    Args:
      function: a function of one row.
      mesh: from ``mesh``.
      in_axes: 0 for arguments with a leading axis of rows, whose number is a multiple of the number of devices; None for
        arguments that all rows share, such as parameters, which every device then holds whole. Pass one value for all
        arguments, or one for each. Traced arrays must be arguments; the function must not close over them.

    Raises:
      ValueError: at a call, if ``in_axes`` is not 0 or None for each argument with at least one 0, or the numbers of rows
        differ or are not a multiple of the number of devices.
    """

    def mapped(*args: PyTree) -> Tree:
        axes = (in_axes,) * len(args) if in_axes is None or isinstance(in_axes, int) else tuple(in_axes)
        if len(axes) != len(args) or set(axes) - {0, None} or 0 not in axes:
            raise ValueError(f"in_axes: expected 0 or None for each of {len(args)} arguments, and one 0, got {in_axes}")
        spread = [arg for arg, axis in zip(args, axes, strict=True) if axis == 0]
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(spread)}
        if len(lengths) != 1 or lengths == {()} or next(iter(lengths))[0] % mesh.size:
            got = sorted(lengths)
            raise ValueError(f"rows: expected one number of rows, a multiple of {mesh.size} devices, got {got}")
        specs = tuple(PartitionSpec(AXES) if axis == 0 else PartitionSpec() for axis in axes)
        # Disable check_vma: no sum over devices occurs here, and Diffrax's loops do not track what varies over devices.
        return jax.shard_map(
            jax.vmap(function, axes), mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXES), check_vma=False
        )(*args)

    return mapped


def each_device(function: Callable[..., PyTree], shared: PyTree, *rows: PyTree) -> list[PyTree]:
    """Calls ``function(shared, *rows)`` so that each device of the training step's mesh evaluates its share of the rows.

    If every device holds the whole parameters, each device works alone and sums the gradients of all terms, so that the
    devices exchange a single sum. If the parameters are split, the rows are sharded and the compiler gathers the parts that it
    needs. Outside a training step the function is called directly.

    Args:
      function: ``(shared, *rows) -> [part, ...]``, with one part for each of ``rows`` and the same leading axis.
      shared: values that all rows share, such as parameters.
      rows: pytrees whose leaves have one leading axis, or None. The numbers of rows need not be divisible by the number of
        devices. A row may be a group of samples, which is then kept on one device.

    Returns:
      The result of the function.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXES:
        return function(shared, *rows)
    spread, same = PartitionSpec(AXES), PartitionSpec()
    counts = [len(jax.tree.leaves(part)[0]) if jax.tree.leaves(part) else 0 for part in rows]
    padded = [_pad(part, -count % mesh.size) for part, count in zip(rows, counts, strict=True)]
    if mesh.shape["fsdp"] > 1:
        results = function(shared, *jax.lax.with_sharding_constraint(padded, spread))
    else:
        each = jax.shard_map(function, in_specs=(same, *[spread] * len(rows)), out_specs=spread, check_vma=False)
        results = each(shared, *padded)
    return [jax.tree.map(lambda leaf, n=n: leaf[:n], part) for part, n in zip(results, counts, strict=True)]


def _pad(rows: PyTree, more: int) -> PyTree:
    """Appends ``more`` copies of the first row (zeros for keys); the caller drops their results."""

    def leaf_rows(leaf: jax.Array) -> jax.Array:
        # Do not copy keys, because jax's key-reuse check rejects a key that is used twice.
        last = jnp.zeros_like if trees.is_key(leaf) else lambda first: first

        def padded(words: jax.Array) -> jax.Array:
            return jnp.concatenate([words, jnp.broadcast_to(last(words[:1]), (more, *words.shape[1:]))])

        return trees.on_words(padded, leaf)

    return jax.tree.map(leaf_rows, rows) if more else rows


def _placed(leaf: Any, sharding: NamedSharding) -> jax.Array:
    def place(words: Any) -> jax.Array:
        value = np.array(words)
        placed = jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
        # On CPU the buffer may share memory with numpy, which is not allowed for a donated state.
        return jnp.copy(placed)

    return trees.on_words(place, leaf)
