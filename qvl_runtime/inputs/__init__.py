"""What goes into a model: text to tokens, pictures to features."""
