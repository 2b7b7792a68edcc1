"""Write a pruned checkpoint with its card."""
