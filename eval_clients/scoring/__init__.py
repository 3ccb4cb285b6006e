"""Score answers, by rules on plain text or by a judge."""
