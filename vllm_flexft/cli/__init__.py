"""The `flexft` command."""
