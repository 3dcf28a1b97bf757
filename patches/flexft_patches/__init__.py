"""Patches of vLLM, one file a patched symbol; the ledger is `patches/README.md`."""
