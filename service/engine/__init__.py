"""Everything that touches vLLM's internals, and nothing else does.

`seam` and `punica` are the two places inside a worker where a request's weights meet the LoRA layers,
`worker` brings them into every worker process, `proof` shows at start that they work there, and
`server` is the door the rest of the service uses.
"""
