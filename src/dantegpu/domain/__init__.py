"""The pure core: values and decisions, no I/O. Standard library and NumPy only; time and randomness are arguments."""
