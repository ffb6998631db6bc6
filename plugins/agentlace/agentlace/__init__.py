"""agentlace's API over edgeml: SERL's and HIL-SERL's scripts import this and run unchanged.

Names, signatures, defaults and return values are agentlace's; what carries them is edgeml. Nothing
is pickled. What is not kept is listed in ``docs/guides/agentlace.md``.
"""

from agentlace import data, internal

__all__ = ["data", "internal"]
