"""What is installed, by its hash, and whether another vLLM has what the engine needs (`vllm_names`)."""
