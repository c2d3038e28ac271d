"""What a mixture is: its parameters as a module, its codes, its files."""
