"""mptrain: mixed-precision training that explains itself."""

__version__ = "0.1.0"
