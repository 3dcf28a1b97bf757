"""Shared by tests: real engines and independent references."""
