"""edgeml connects machines with little compute to machines with a lot."""
