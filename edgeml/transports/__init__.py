"""The built-in transports: plugins like any other, found by entry point."""
