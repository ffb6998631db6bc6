"""The built-in codecs: plugins like any other, found by entry point."""
