"""How answers are scored: rules on plain text, and a judge."""
