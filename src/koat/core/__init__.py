"""The ground floor: configuration, errors, run folders. Imports no PyTorch."""
