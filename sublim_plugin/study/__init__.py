"""Studies: a strict YAML file, the grid of cells it stands for, and what runs them."""
