"""RLDS datasets of episodes (https://github.com/google-research/rlds), without TensorFlow.

What agents do is logged as a dataset that tensorflow_datasets reads, and such datasets, of
whichever origin, are read into stores.
"""

from edgeml.data.rlds.logger import RLDSLogger
from edgeml.data.rlds.reader import (
    make_datastore,
    populate_datastore,
    read_episodes,
    transitions_of,
)

__all__ = [
    "RLDSLogger",
    "make_datastore",
    "populate_datastore",
    "read_episodes",
    "transitions_of",
]
