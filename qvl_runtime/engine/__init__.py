"""From a prompt's tokens to an answer's: sequences, generation, sampling, constraints. Knows no model family."""
