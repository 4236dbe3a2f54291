"""Adapters for servers and frameworks. Each uses the public API only."""
