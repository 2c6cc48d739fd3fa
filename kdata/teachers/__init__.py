"""Who believes: vLLM in this process, a vLLM server, transformers; one protocol."""
