"""The fusion service: OpenAI requests answered by any weighted combination of LoRA adapters."""
