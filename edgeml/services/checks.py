"""Contracts as a server holds them: calls are checked, and so is what clients expect."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary, WeakSet

from edgeml.core.dispatch import Call, Caller, unknown
from edgeml.core.errors import ConfigMismatch, Malformed, shown
from edgeml.services.contract import PolicyContract, differences, join_findings

__all__ = ["EXTENSION", "Check", "Checks", "Contracts"]

EXTENSION = "contracts"
"""The extension by which a client says what it expects, in every hello."""

Check = Literal["first", "all", "none"]
"""Which calls are checked: of each client those until one has passed, all of them, or none."""


class Checks:
    """What the calls of one version of a function are checked by.

    Args:
        name: of the interface.
        contract: what is checked.
        which: calls.
        refused: clients that expect another contract, and how this one differs.
    """

    def __init__(
        self,
        name: str,
        contract: PolicyContract,
        which: Check,
        refused: WeakKeyDictionary[Caller, str],
    ) -> None:
        self.contract = contract
        self.which = which
        self._name = name
        self._refused = refused
        self._passed = WeakSet[Caller]()

    def check_payload(self, call: Call, payload: Any) -> None:
        """Raise for a call that is not to be carried out.

        Raises:
            Malformed: the payload doesn't fit.
            ConfigMismatch: the client expects another contract.
        """
        self._require_agreement(call.caller)
        if self._is_due(call.caller):
            try:
                self.contract.check_observation(payload)
            except ValueError as error:
                raise Malformed(f"interface {self._name!r} does not take this: {error}") from None

    def check_again(self, call: Call, before: Checks | None) -> None:
        """Raise for a call that waited while the function that it was checked for was replaced.

        Raises:
            ConfigMismatch: the client expects another contract, or the call was made for one.
        """
        self._require_agreement(call.caller)
        if before is None or before.contract.observation != self.contract.observation:
            raise ConfigMismatch(
                f"interface {self._name!r} was given another contract while this call waited, so "
                "it was not carried out: ask for the contract, and call again"
            )

    def check_result(self, call: Call, result: Any) -> None:
        """Raise a ValueError for a result that is not to be given."""
        if self._is_due(call.caller):
            try:
                self.contract.check_action(result)
            except ValueError as error:
                raise ValueError(
                    f"interface {self._name!r} returned what its contract does not state: {error}"
                ) from None
            self._passed.add(call.caller)

    def _is_due(self, caller: Caller) -> bool:
        return self.which == "all" or (self.which == "first" and caller not in self._passed)

    def _require_agreement(self, caller: Caller) -> None:
        if self._refused and (why := self._refused.get(caller)) is not None:
            raise ConfigMismatch(why)


class Contracts:
    """The contracts of a server's interfaces, and what its clients expect of them.

    Args:
        interfaces: the names of all that is served; looked at when a client comes.

    Attributes:
        changing: to be held from `offer` on until calls are checked by what that returns, so that
            no client comes in between and is compared with one contract and served by another.
    """

    def __init__(self, interfaces: Collection[str]) -> None:
        self.changing = threading.RLock()
        self._interfaces = interfaces
        self._offered: dict[str, PolicyContract] = {}
        self._which: dict[str, Check] = {}
        self._expected: WeakKeyDictionary[Caller, dict[str, PolicyContract]] = WeakKeyDictionary()

    def offer(
        self, name: str, contract: PolicyContract | None, which: Check | None = None
    ) -> Checks | None:
        """Give an interface a contract, in place of any other.

        Args:
            name: of the interface.
            contract: None for the one that it has.
            which: calls are checked; None for those that were before.

        Returns:
            What its calls are to be checked by; None where it has no contract.

        Raises:
            TypeError, ValueError: this is no contract, or says of no calls that they are checked.
        """
        if contract is not None and not isinstance(contract, PolicyContract):
            raise TypeError(f"contract is a PolicyContract, not {shown(contract)}")
        if which not in (*get_args(Check), None):
            raise ValueError(f'check is "first", "all" or "none", not {shown(which)}')
        with self.changing:
            which = self._which.setdefault(name, which or "first")
            offered = self._offered.get(name) if contract is None else contract
            if offered is None:
                return None
            self._offered[name] = offered
            refused: WeakKeyDictionary[Caller, str] = WeakKeyDictionary()
            for caller, expected in self._expected.items():
                if name in expected and (found := differences(expected[name], offered)):
                    refused[caller] = _told(name, found)
            return Checks(name, offered, which, refused)

    def find(self, name: str) -> PolicyContract | None:
        """Return the contract of an interface, if it has one."""
        return self._offered.get(name)

    def tell(self, name: Any) -> dict[str, Any] | None:
        """Return the plain form of an interface's contract, for whoever asks; None if it has none.

        Raises:
            UnknownInterface: there is no interface of that name.
            Malformed: what was asked is no name.
        """
        if not isinstance(name, str):
            raise Malformed("a contract is asked for by its interface's name")
        if name not in self._interfaces:
            raise unknown("interface", name, self._interfaces)
        contract = self._offered.get(name)
        return None if contract is None else contract.to_plain()

    def negotiate(self, asked: Any, caller: Caller) -> list[str]:
        """Compare what a client expects with what there is; for `Server.extend`.

        Returns:
            The names of the interfaces whose contracts are as the client expects.

        Raises:
            ConfigMismatch: they differ; the text names all that does.
            Malformed: what the client said is no dict of contracts.
        """
        if not isinstance(asked, dict) or not all(isinstance(name, str) for name in asked):
            raise Malformed("what a client expects is a map of contracts by interfaces' names")
        expected: dict[str, PolicyContract] = {}
        for name, plain in asked.items():
            try:
                expected[name] = PolicyContract.from_plain(plain)
            except Malformed as error:
                raise Malformed(f"what the client expects of {shown(name, 200)}: {error}") from None
        with self.changing:
            found = [text for name in expected if (text := self._compare(name, expected[name]))]
            if found:
                raise ConfigMismatch("; ".join(found))
            self._expected[caller] = expected
        return sorted(expected)

    def _compare(self, name: str, expected: PolicyContract) -> str:
        offered = self._offered.get(name)
        if offered is not None:
            found = differences(expected, offered)
            return _told(name, found) if found else ""
        if name in self._interfaces:
            return f"interface {shown(name, 200)} has no contract, and the client expects one"
        known = ", ".join(sorted(self._interfaces)) or "none"
        return f"the client expects an interface {shown(name, 200)}; the server has {known}"


def _told(name: str, found: list[str]) -> str:
    return f"interface {name!r} is not what the client expects: {join_findings(found)}"
