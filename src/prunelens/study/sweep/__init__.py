"""Run many recipes and seeds, and keep each as it is finished."""
