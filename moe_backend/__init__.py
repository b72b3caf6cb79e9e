"""A mixture-of-experts backend for vLLM and ATOM: right or refused; says what it does; fast."""

__version__ = "0.1.0"
