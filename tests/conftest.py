"""Test settings: jax in its strictest modes, and eight virtual devices."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Jax reads these when it is first imported, so they are set before; the subprocesses of tests inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation takes most of the time, because the programs are small and run once or twice. These flags halve it. The last one
# chooses an older code generator, which compiles faster; jaxlib after 0.10 lacks it, and aborts at a flag it does not know.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    f"{' --xla_cpu_use_fusion_emitters=false' if version('jaxlib').startswith('0.10.') else ''}"
).strip()
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)

# Tracing makes many long-lived objects; collecting garbage less often saves a twentieth of the time.
gc.set_threshold(200_000, 20, 20)

# Cache every program: by default jax caches only those that take a second to compile, and none here does.
CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# Files of few and long tests. They go first; otherwise one process would run the last of them while the other is idle.
LONG = ("test_command_lines", "test_crash_resume", "test_processes", "test_bias", "test_density", "test_small_noise")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the cases beside the representatives as slow, and puts the longest files first.

    pytest-xdist keeps this order with --no-loadscope-reorder.
    """
    unknown: dict[str, set[str]] = {}
    for item in items:
        if (marker := item.get_closest_marker("representatives")) is None:
            continue
        test, _, case = item.nodeid.partition("[")
        unknown.setdefault(test, set(marker.args)).discard(case.removesuffix("]"))
        if case.removesuffix("]") not in marker.args:
            item.add_marker(pytest.mark.slow)
    # A single case chosen on the command line is collected without the others.
    if not any("::" in argument for argument in config.args):
        assert not any(unknown.values()), f"representatives that are not cases: {unknown}"
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def key() -> jax.Array:
    """A new key for each test, because jax's key-reuse check rejects a key that an earlier test consumed."""
    return jax.random.key(0)


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For tests of flax's LayerNorm, GroupNorm and RMSNorm in float64 or bfloat16.

    They multiply by float32 statistics. The whole test runs under standard promotion, so it should test nothing else.
    """
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def unchecked_keys() -> Iterator[None]:
    """For tests of Diffrax's VirtualBrownianTree, and of the gradient of ``jax.checkpoint`` outside ``jit``.

    The tree splits a key in a while loop and discards half of it; rematerialising a draw repeats it. Both are correct,
    but jax reports key reuse.
    """
    with jax.debug_key_reuse(False):
        yield


@pytest.fixture
def compilations() -> Iterator[list[float]]:
    """The seconds of each compilation since the test began; programs loaded from the cache on disk count too.

    A test empties the list, calls again what has been compiled, and expects the list to be empty still. Arguments of
    another dtype, weak type or sharding would have been compiled anew.
    """
    found: list[float] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1.0)(np.zeros(3))
        assert found, "jax reports its compilations under another name"
        found.clear()
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def assert_mean() -> Callable[..., None]:
    """Compares a sample mean with its expectation; the tolerance is a multiple of the standard error."""

    def check(samples: Any, expected: Any, *, errors: float = 4.0, floor: float = 0.0) -> None:
        """Each entry of the mean of ``samples`` [n, ...] within ``errors`` standard errors plus ``floor``."""
        samples = np.asarray(samples, np.float64)
        allowed = errors * samples.std(axis=0, ddof=1) / np.sqrt(len(samples)) + floor
        off = np.abs(samples.mean(axis=0) - np.asarray(expected, np.float64))
        assert np.all(off <= allowed), f"off by up to {np.max(off / allowed) * errors:.1f} standard errors"

    return check
