"""Training rows: read as chats, encoded as tokens, grouped into forward passes."""
