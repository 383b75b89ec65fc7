"""Files, memory, processes, layers: helpers without knowledge of the rest."""
