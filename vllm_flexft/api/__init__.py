"""HTTP side of co-serving: runs in the API server process."""
