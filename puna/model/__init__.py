"""The network and its shapes."""
