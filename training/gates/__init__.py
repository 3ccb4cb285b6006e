"""Gates: small adapters that tell from a prompt how much weight its answer needs."""
