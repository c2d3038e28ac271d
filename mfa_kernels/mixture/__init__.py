"""The mixture: its parameters as a module, its codes, its files."""
