"""Training of what is left: the smaller model, its teacher, losses, and the way back to a plan."""
