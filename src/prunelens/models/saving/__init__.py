"""Write a changed model as a checkpoint that loads elsewhere."""
