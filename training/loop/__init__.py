"""The training loop and the model that it trains."""
