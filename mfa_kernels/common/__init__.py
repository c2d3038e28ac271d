"""What every other part stands on: checks of arguments, files and their locks, modes of PyTorch, processes."""
