"""Dynamic batching: calls of all clients are stacked, answered by one run of a function, and split.

From the bottom: `stack` (many payloads as one, and one result as many), `patience` (when it pays to
wait for clients that were just answered) and `batcher`, which takes calls and runs the function.
"""

from edgeml.services.batching.batcher import Batcher, Batching

__all__ = ["Batcher", "Batching"]
