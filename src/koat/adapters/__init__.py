"""The methods, where each model family keeps what they act on, and how they are attached and saved."""
