"""The conformance suites: subclass them to hold a plugin or store of your own to its promise."""

import pytest

# So that a failing assertion in a suite shows its values; it has to come before the imports.
pytest.register_assert_rewrite(
    *(
        f"edgeml.testing.{each}"
        for each in (
            "codecs",
            "deadlines",
            "doors",
            "ends",
            "resolvers",
            "safety",
            "stores",
            "transports",
        )
    )
)

from edgeml.testing.codecs import CodecTests  # noqa: E402
from edgeml.testing.doors import DoorClient, DoorTests, Refused  # noqa: E402
from edgeml.testing.resolvers import ResolverTests  # noqa: E402
from edgeml.testing.stores import StoreTests  # noqa: E402
from edgeml.testing.transports import TransportTests  # noqa: E402

__all__ = [
    "CodecTests",
    "DoorClient",
    "DoorTests",
    "Refused",
    "ResolverTests",
    "StoreTests",
    "TransportTests",
]
