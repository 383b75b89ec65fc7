"""What a method is made of: configs, sites and deltas, and the registry that finds the methods."""
