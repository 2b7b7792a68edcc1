"""What a model is: opening, finding its parts, taking parts out, reading its states."""
