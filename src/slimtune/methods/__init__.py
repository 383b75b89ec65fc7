"""The methods: one file (or folder) is one method, and its name is the entry in the registry."""
