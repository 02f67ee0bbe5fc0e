"""What any long computation needs, whatever it computes. Nothing here imports anything else of the project."""
