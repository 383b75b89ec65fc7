"""Loading a base: an alias, a GGUF file, a Hugging Face folder or a Hub id."""
