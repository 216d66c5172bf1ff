"""Arguments of joining processes and of the watchdog."""

from __future__ import annotations

import jax
import pytest

from jflow.training import distributed

HERE = "localhost:12345"


def joined(*arguments, **options):
    with distributed.processes(*arguments, **options):
        pass


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        pytest.param(
            lambda: distributed.Watchdog(0),
            ValueError,
            r"^seconds: expected a number in \(0, inf\], got 0$",
            id="no patience",
        ),
        pytest.param(
            lambda: distributed.Watchdog("10m"),
            TypeError,
            "^seconds: expected a number, got str '10m'$",
            id="patience in words",
        ),
        pytest.param(
            lambda: joined(HERE),
            ValueError,
            "^coordinator, count, index: expected all three or none, got .*12345', None, None",
            id="a coordinator alone",
        ),
        pytest.param(
            lambda: joined("node1", 2, 0),
            ValueError,
            "^coordinator: expected HOST:PORT, got 'node1'$",
            id="a host without a port",
        ),
        pytest.param(
            lambda: joined("node1:http", 2, 0),
            ValueError,
            "^coordinator: expected HOST:PORT, got 'node1:http'$",
            id="a port in words",
        ),
        pytest.param(
            lambda: joined(":1234", 2, 0),
            ValueError,
            "^coordinator: expected HOST:PORT, got ':1234'$",
            id="a port without a host",
        ),
        pytest.param(
            lambda: joined("node1:70000", 2, 0),
            ValueError,
            "^coordinator: expected HOST:PORT, got 'node1:70000'$",
            id="a port too high",
        ),
        pytest.param(
            lambda: joined(1234, 2, 0), ValueError, "^coordinator: expected HOST:PORT, got 1234$", id="a port alone"
        ),
        pytest.param(
            lambda: joined(HERE, 2, 2),
            ValueError,
            "^index: expected a whole number of at least 0 and at most 1, got 2$",
            id="processes counted from one",
        ),
        pytest.param(
            lambda: joined(HERE, 0, 0),
            ValueError,
            "^count: expected a whole number of at least 1, got 0$",
            id="no processes",
        ),
        pytest.param(
            lambda: joined(HERE, "2", 0),
            TypeError,
            "^count: expected a whole number, got str '2'$",
            id="a number from the environment",
        ),
        pytest.param(
            lambda: joined(heartbeat_seconds=0),
            ValueError,
            "^heartbeat_seconds: expected a whole number of at least 1, got 0$",
            id="no heartbeat",
        ),
        pytest.param(
            lambda: joined(start_seconds=0.5),
            TypeError,
            r"^start_seconds: expected a whole number, got float 0\.5$",
            id="half a second to start",
        ),
        pytest.param(
            lambda: [jax.devices(), joined(HERE, 1, 0)],
            RuntimeError,
            "must be called before any JAX calls that might initiali",
            id="joined too late",
        ),
        pytest.param(
            lambda: distributed.Watchdog(float("nan")),
            ValueError,
            r"^seconds: expected a number in \(0, inf\], got nan$",
            id="a watchdog that never waits",
        ),
    ],
)
def test_refused_in_words(attempt, error, message):
    with pytest.raises(error, match=message) as caught:
        attempt()
    # Not by a sub-class that means something else.
    assert caught.type is error
