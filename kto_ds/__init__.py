"""KTO alignment on DeepSpeed with an offline reference stage."""

__version__ = "0.1.0"
