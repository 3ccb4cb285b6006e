"""What a recipe does to adapters: `fuse`, `plan`, `diff`, `stack`. Public names are in `adapters`."""
