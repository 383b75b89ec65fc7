"""Attaching adapters to a base: targets, the adapted layer, the PeftModel, PEFT's files."""
