"""The ground of all other parts: checks of arguments, files and their locks, modes of PyTorch, processes."""
