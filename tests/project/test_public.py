"""What the public classes have in common, so that one who knows some of them can guess the rest."""

from __future__ import annotations

import inspect

import pytest

import edgeml
import edgeml.control
import edgeml.core
import edgeml.data
import edgeml.services

CLASSES = sorted(
    {
        each
        for package in (edgeml, edgeml.control, edgeml.core, edgeml.data, edgeml.services)
        for each in (getattr(package, name) for name in package.__all__)
        if inspect.isclass(each) and not issubclass(each, Exception)
    },
    key=lambda each: each.__qualname__,
)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__qualname__)
def test_a_fact_is_an_attribute_and_a_list_is_asked_for(kind):
    """``server.port``, but ``server.clients()``, ``server.store_names()``, ``client.stats()``."""
    collections = ("list", "dict", "tuple", "set", "frozenset", "Sequence", "Mapping", "Iterator")
    for name, member in inspect.getmembers(kind):
        if isinstance(member, property) and not name.startswith("_"):
            returns = str(inspect.signature(member.fget).return_annotation)
            assert not returns.startswith(collections), f"{name} is to be a method"
