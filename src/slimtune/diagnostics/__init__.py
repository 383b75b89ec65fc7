"""What `slimtune doctor` looks at: the facts of a machine, and the checks that say what is wrong with them."""
