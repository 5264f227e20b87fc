"""A recorder of live vLLM servers: no patch, and no other package than vLLM's own in the engine's process."""
