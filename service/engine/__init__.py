"""Everything that touches vLLM's internals, and nothing else does.

`server` is the door the rest of the service uses, `core` an engine's life, `core_process` what it runs, `death` why it
ended, `flags` its command line, `models` vLLM's view of model names. `seam` and `punica` are the two places inside a
worker where a request's weights meet the LoRA layers, `worker` brings them into every worker process, `proof` shows at
start that they work there. `patches` holds what is replaced in the server's own process; `supported` checks every
replaced name first.
"""
