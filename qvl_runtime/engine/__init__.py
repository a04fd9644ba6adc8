"""The family-independent engine: sequences, prefix cache, scheduler, generation, sampling, constraints."""
