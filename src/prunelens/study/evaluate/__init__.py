"""Run tasks on models, and judge each class of use."""
