"""LoRA fine-tuning: the default base, data sets, recipes and the trainer."""
