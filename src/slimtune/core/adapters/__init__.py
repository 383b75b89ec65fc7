"""Adapters on a base model: configs, adapted layers, PeftModel, PEFT's files."""
