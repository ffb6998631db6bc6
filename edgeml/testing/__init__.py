"""The conformance suites: subclass them to hold a transport, a codec or a store of your own to its promise."""
