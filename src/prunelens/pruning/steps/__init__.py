"""The steps that a recipe is made of, one file for each kind; importing them needs no torch."""
