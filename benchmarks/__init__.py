"""Side-by-side measurements against the peers; results in `README.md`."""
