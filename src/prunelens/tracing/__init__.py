"""What is run to compare two models."""
