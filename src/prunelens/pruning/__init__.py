"""How a model is made smaller: recipes, calibration text, ranking."""
